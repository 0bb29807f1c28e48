"""Manifests of checkpoints: each array's shape, dtype and digests, from each process that saves."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from bigmodel.checkpoint import digests
from bigmodel.config import InputError

Manifest = dict[str, Any]  # processes, meta, arrays: {path: {dtype, shape, shards: [[box, sha], ...]}}


class CorruptCheckpoint(InputError):
    """A committed checkpoint is damaged: a file is missing, cut short, or not what its digest says."""


class ManifestHandler(ocp.AsyncCheckpointHandler):
    """Writes this process's manifest. Arrays are hashed in the background, on several threads."""

    async def async_save(self, directory: epath.Path, args: ManifestSave) -> list[ocp.future.Future]:
        shards = [
            (path, digests.box_of(shard.index, x.shape), shard.data)
            for path, x in args.arrays.items()
            for shard in x.addressable_shards
            if shard.replica_id == 0
        ]
        for _, _, data in shards:
            data.copy_to_host_async()
        host = [np.asarray(data) for _, _, data in shards]  # not later: the caller may donate the buffers

        async def write() -> None:
            arrays: dict[str, Any] = {}
            for path, x in args.arrays.items():
                arrays[path] = {"dtype": str(x.dtype), "shape": x.shape, "shards": []}
            for (path, box, _), sha in zip(shards, digests.each(digests.sha256, host), strict=True):
                arrays[path]["shards"].append([box, sha])
            body = json.dumps({"processes": jax.process_count(), "meta": args.meta, "arrays": arrays})
            path = directory / f"process_{jax.process_index()}.json"
            path.write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="manifest")]

    def save(self, directory: epath.Path, args: ManifestSave) -> None:
        raise TypeError("an AsyncCheckpointer calls async_save")

    def restore(self, directory: epath.Path, args: ManifestSave | None = None) -> Manifest:
        return read(directory.parent)


@ocp.args.register_with_handler(ManifestHandler, for_save=True, for_restore=True)
@dataclass
class ManifestSave(ocp.args.CheckpointArgs):
    arrays: dict[str, jax.Array]
    meta: dict[str, Any]


def read(root: epath.Path) -> Manifest:
    """Joins the manifests of all processes that saved. Raises CorruptCheckpoint naming the file."""
    parts: list[Manifest] = []
    while not parts or len(parts) < parts[0]["processes"]:
        path = root / "manifest" / f"process_{len(parts)}.json"
        try:
            sha, _, body = path.read_text().partition("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptCheckpoint(f"checkpoint {root}: {path} is unreadable: {error}") from error
        if hashlib.sha256(body.encode()).hexdigest() != sha:
            raise CorruptCheckpoint(f"checkpoint {root}: {path} is damaged (SHA-256 differs)")
        parts.append(json.loads(body))
    for path, array in parts[0]["arrays"].items():
        for other in parts[1:]:
            array["shards"] += other["arrays"][path]["shards"]
    return parts[0]
