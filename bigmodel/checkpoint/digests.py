"""SHA-256 of states: of a whole one, and shard by shard, comparable across meshes.

A shard is known by its box, (start, stop) along each dimension of its array; a process that holds the values
of a saved box, in whatever shards, can check them.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bigmodel.config import InputError
from bigmodel.trees import path_str

Box = tuple[tuple[int, int], ...]


def digest(state: Any) -> str:
    """SHA-256 (hex) of an entire state: its paths, shapes, dtypes and values; the same on any mesh.

    In a multi-process job every process must call it; arrays are gathered to each host, one at a time.
    """
    total = hashlib.sha256()
    for path, x in sorted(flatten(state)[0].items()):
        total.update(f"{path}\n{sha256(_gathered(x))}\n".encode())
    return total.hexdigest()


def kind(dtype: Any, shape: Sequence[int], shards: Any = None) -> str:
    return f"{dtype}{list(shape)}"


def mismatches(arrays: dict[str, jax.Array], saved: dict[str, Any]) -> list[str]:
    """Paths of arrays that differ from what was saved, as far as this process has them."""
    checks: list[tuple[str, dict[Box, Any], Box, str]] = []
    bad = []
    for path, x in arrays.items():
        shards = [(tuple((a, b) for a, b in box), sha) for box, sha in saved[path]["shards"]]
        if sum(_size(box) for box, _ in shards) != x.size or kind(x.dtype, x.shape) != kind(**saved[path]):
            bad.append(path)
        elif _some_box_is_cut(x, [box for box, _ in shards]):
            everything = {tuple((0, n) for n in x.shape): _gathered(x)}
            checks += [(path, everything, box, sha) for box, sha in shards]
        else:
            local = {box_of(shard.index, x.shape): shard.data for shard in x.addressable_shards}
            checks += [(path, local, box, sha) for box, sha in shards]

    def differs(check: tuple[str, dict[Box, Any], Box, str]) -> bool:
        region = _region(check[1], check[2])
        return region is not None and sha256(region) != check[3]

    bad += [check[0] for check, wrong in zip(checks, each(differs, checks), strict=True) if wrong]
    return list(dict.fromkeys(bad))


def _region(local: dict[Box, Any], box: Box) -> np.ndarray | None:
    """The values in a box, put together from disjoint local shards; None if they are not all here."""
    if box in local:
        return np.asarray(local[box])
    both = {other: _overlap(box, other) for other in local}
    if sum(map(_size, both.values())) != _size(box):
        return None
    out = np.empty([stop - start for start, stop in box], next(iter(local.values())).dtype)
    for other, shared in both.items():
        if _size(shared):
            source = np.asarray(local[other])[_slices(shared, other)]
            out[_slices(shared, box)] = source
    return out


def _some_box_is_cut(x: jax.Array, boxes: list[Box]) -> bool:
    """True if some box lies in no single process. Knows all processes' shards, so all agree."""
    if x.is_fully_addressable:
        return False
    by_process: dict[int, set[Box]] = {}
    device: Any
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        by_process.setdefault(device.process_index, set()).add(box_of(index, x.shape))

    def holds(parts: set[Box], box: Box) -> bool:
        return box in parts or sum(_size(_overlap(box, part)) for part in parts) == _size(box)

    return not all(any(holds(parts, box) for parts in by_process.values()) for box in boxes)


def _gathered(x: jax.Array) -> np.ndarray:
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def sha256(x: np.ndarray) -> str:
    sha = hashlib.sha256(f"{kind(x.dtype, x.shape)}\n".encode())
    sha.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _overlap(a: Box, b: Box) -> Box:
    return tuple((max(p, r), max(min(q, s), p, r)) for (p, q), (r, s) in zip(a, b, strict=True))


def _slices(box: Box, within: Box) -> tuple[slice, ...]:
    return tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(box, within, strict=True))


def _size(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def each(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the interpreter lock
        return list(pool.map(function, items))


def flatten(tree: Any, part: str = "") -> tuple[dict[str, Any], Any]:
    """{path: leaf} and the treedef. A path is the keys joined by "/", whatever the containers are."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    flat: dict[str, Any] = {}
    for keys, leaf in leaves:
        path = "/".join(filter(None, (part, path_str(keys)))) or "state"
        if path in flat:
            raise InputError(f"{path}: two arrays of the state have this path; rename one")
        flat[path] = leaf
    return flat, treedef
