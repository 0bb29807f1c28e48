"""Checkpoints: save without stopping the run, restore onto any mesh, and never restore damaged values.

Orbax writes the arrays: the v0 `AsyncCheckpointer`, because its handlers take our own item (below) in
the same commit and cost less than `CheckpointManager`, whose cached step list outlives a failed save.
Measured on 10M float32 parameters in 100 arrays on two cores: without compression and without
replica-parallel writes the loop is blocked 15-50 ms instead of 40-400, and a restore takes 0.2-0.3 s
instead of 0.7-1.2, for 3 % more disk.

A step is `<directory>/<step>/` with three parts, complete only if `commit_success.txt` is there:

    state/     one flat dict {path: array}, so every message can name the array
    manifest/  process_<i>.json: meta, shapes, dtypes, and the SHA-256 of every shard process i wrote
    commit_success.txt

Orbax does not checksum array data (60 of 60 flipped bits came back silently wrong), hence the manifest.
It is written by an Orbax handler, so that no step is committed without its digests. On a local disk a
step is built under `<step>.orbax-checkpoint-tmp` and renamed once complete: stronger than
AtomicityMode.COMMIT_FILE, which builds it in place, where the remains of a killed save cannot be told
from a directory of the user's. We demand the marker too. (On gs:// Orbax uses COMMIT_FILE by itself.)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import operator
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import type_handlers

from bigmodel.config import InputError

log = logging.getLogger("bigmodel")

MARKER = "commit_success.txt"
TMP = ".orbax-checkpoint-tmp"  # suffix of a step that is being written, or deleted
Box = tuple[tuple[int, int], ...]  # (start, stop) of each dimension: where a shard lies in its array
Manifest = dict[str, Any]


class CorruptCheckpoint(InputError):
    """A committed checkpoint is damaged: a file is missing, cut short, or does not match its digest."""


class Checkpoints:
    """The checkpoints of one run. Every process of a job makes one, and calls the same methods in step.

    A context manager: leaving it waits for the save under way. One writer per directory.

    Args:
      directory: holds one directory per step; created unless read_only. Local, or gs://.
      keep: how many of the newest steps stay on disk. One more may be there while a save is under way.
      async_save: False makes `save` return only when the step is committed.
      read_only: writes, renames and removes nothing; for evaluation beside a running job.

    Raises: InputError if keep < 1 or the directory cannot be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        async_save: bool = True,
        read_only: bool = False,
    ) -> None:
        if keep < 1:
            raise InputError(f"checkpoint.keep={keep}: at least one checkpoint must be kept")
        name = os.fspath(directory)
        self.directory = epath.Path(name if "://" in name else os.path.abspath(name))
        self._keep, self._async, self._read_only = keep, async_save, read_only
        orbax_log = logging.getLogger("absl")
        if orbax_log.level == logging.NOTSET:  # else it tells every step of a save at INFO
            orbax_log.setLevel(logging.WARNING)
        # Replica-parallel writes would slice every replicated array on the device, compiling each slice.
        arrays = type_handlers.ArrayHandler(use_replica_parallel=False)
        self._arrays = ocp.PyTreeCheckpointHandler(
            use_compression=False,
            type_handler_registry=type_handlers.create_type_handler_registry((jax.Array, arrays)),
        )
        self._writing: int | None = None
        self._orbax: ocp.AsyncCheckpointer | None = None
        if not read_only:
            _on_first_process(self._prepare)
            self._orbax = ocp.AsyncCheckpointer(
                ocp.CompositeCheckpointHandler(state=self._arrays, manifest=_ManifestHandler())
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            log.error("%s", failure)  # the error that is already on its way out matters more

    def steps(self) -> list[int]:
        """The committed steps, oldest first. Anything else in the directory is ignored."""
        if not self.directory.is_dir():
            return []
        names = [p.name for p in self.directory.iterdir() if p.name.isascii() and p.name.isdigit()]
        found = [int(n) for n in names if n == str(int(n)) and (self.directory / n / MARKER).exists()]
        return sorted(found)

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Saves a state. Returns once its arrays are on the host; they may then be donated.

        A save under way is waited for first, so its error, if any, is raised here.

        Args:
          step: newer than every committed step.
          state: a pytree of jax.Array, of any sharding.
          meta: JSON; the pipeline's fingerprint, the config's digest. Process 0's is stored.

        Raises: InputError if the step is not newer, or its directory is taken; if a leaf is no jax.Array
          or two leaves share a path; if meta is not JSON; if this or the last step could not be written.
        """
        step = operator.index(step)
        arrays, _ = _flatten(state)
        for path, x in arrays.items():
            if not isinstance(x, jax.Array):
                raise InputError(f"{path}: cannot save a {type(x).__name__}; make it a jax.Array")
        try:
            json.dumps(meta)
        except (TypeError, ValueError) as error:
            raise InputError(f"checkpoint meta must be JSON: {error}") from error
        self.wait()
        orbax = self._require_free(step)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave({path: x for path, x in arrays.items() if x.size}),
            manifest=_ManifestSave(step, arrays, meta),
        )
        self._writing = step
        with self._reporting():
            orbax.save(self.directory / str(step), args=args)
        if not self._async:
            self.wait()

    def restore(
        self, state_spec: Any, step: int | None = None, *, part: str = ""
    ) -> tuple[Any, dict[str, Any], int]:
        """Restores a state into the shardings of its spec, whatever mesh it was saved from.

        Every saved shard is compared with its SHA-256. A process checks what it holds; a region that no
        single process holds (a mesh with other process boundaries) is gathered, one array at a time.
        Without a step, a damaged one is logged, renamed to `<step>.corrupt-<time>` so that the run can
        save that step again (not if read_only), and the one before it is tried.

        Args:
          state_spec: pytree of jax.ShapeDtypeStruct with shardings.
          step: None for the newest good one.
          part: restore only this subtree ("params"), of which state_spec is then the spec.

        Returns: (state, meta, step).

        Raises: InputError if there is no such step, or a path, shape or dtype differs from the spec, which
          is found before any array is read; CorruptCheckpoint if the given step, or every step, is damaged.
        """
        self.wait()
        steps = self.steps()
        if step is not None and step not in steps:
            raise InputError(f"{self.directory}: no checkpoint of step {step}; there are {steps}")
        if not steps:
            raise InputError(f"{self.directory}: no checkpoint to restore; check --workdir")
        problem = ""
        for candidate in [step] if step is not None else reversed(steps):
            try:
                return (*self._restore(state_spec, candidate, part), candidate)
            except CorruptCheckpoint as error:
                problem = str(error)
                if step is not None:
                    raise
                log.warning("%s; trying the step before it", problem)
                if not self._read_only:
                    _on_first_process(lambda c=candidate: self._set_aside(c))
        raise CorruptCheckpoint(f"{self.directory}: no good checkpoint is left; the last error: {problem}")

    def meta(self, step: int) -> dict[str, Any]:
        """What was given to `save` with this step. Raises InputError, CorruptCheckpoint."""
        if step not in (steps := self.steps()):
            raise InputError(f"{self.directory}: no checkpoint of step {step}; there are {steps}")
        return dict(_read_manifest(self.directory / str(step))["meta"])

    def wait(self) -> None:
        """Waits for the save under way, and removes old steps. Raises InputError if it failed."""
        if self._orbax is None or self._writing is None:
            return
        with self._reporting():
            self._orbax.wait_until_finished()
        self._writing = None
        _on_first_process(self._remove_old)

    def close(self) -> None:
        """As `wait`; then ends Orbax's threads. May be called twice."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax, self._read_only = None, True

    def _restore(self, spec: Any, step: int, part: str) -> tuple[Any, dict[str, Any]]:
        root = self.directory / str(step)
        wanted, treedef = _flatten(spec, part)
        manifest = problem = None
        try:
            manifest = _read_manifest(root)
        except CorruptCheckpoint as error:
            problem = str(error)
        _raise_together(problem, root)
        assert manifest is not None
        _compare(wanted, manifest["arrays"], part, root)
        stored = {path: x for path, x in wanted.items() if math.prod(x.shape)}  # Orbax saves no empty ones
        args = {
            path: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
            for path, x in stored.items()
        }
        arrays: dict[str, jax.Array] = {}
        try:
            request = ocp.args.PyTreeRestore(item=stored, restore_args=args, partial_restore=True)
            # The handler, not the checkpointer: that has barriers, where one process's error hangs the rest.
            arrays = self._arrays.restore(root / "state", args=request) if stored else {}
        except Exception as error:
            if isinstance(error, MemoryError) or any(w in str(error) for w in _NOT_DAMAGE):
                raise
            problem = f"checkpoint {root}: unreadable ({_first_line(error)})"
        _raise_together(problem, root)
        bad = _mismatches(arrays, wanted, manifest["arrays"])
        problem = f"checkpoint {root}: damaged: {_some(bad)} (SHA-256 differs)" if bad else None
        _raise_together(problem, root)
        empty = {path: x for path, x in wanted.items() if path not in stored}
        arrays |= {
            path: jax.jit(lambda x=x: jax.numpy.zeros(x.shape, x.dtype), out_shardings=x.sharding)()
            for path, x in empty.items()
        }
        return jax.tree.unflatten(treedef, [arrays[path] for path in wanted]), dict(manifest["meta"])

    def _require_free(self, step: int) -> ocp.AsyncCheckpointer:
        """Raises InputError unless this step can be saved."""
        if self._orbax is None:
            raise InputError(f"{self.directory}: opened read-only, or closed; cannot save step {step}")
        path, latest = self.directory / str(step), self.latest()
        if step < 0 or (latest is not None and step <= latest):
            raise InputError(
                f"{path}: cannot save step {step}, step {latest} is there already; resume from it, or use"
                " a new --workdir"
            )
        if path.exists():
            raise InputError(f"{path}: in the way of a checkpoint, and not a complete one; move it away")
        return self._orbax

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns whatever Orbax raises into one line that names the path, and frees the space."""
        try:
            yield
        except Exception as error:
            path, self._writing = self.directory / str(self._writing), None
            if jax.process_index() == 0:
                with suppress(OSError):  # TensorStore may still be writing; then the next start removes it
                    _remove(path.parent / (path.name + TMP))
            raise InputError(
                f"{path}: checkpoint not written: {_cause(error)}; free space or mend the path, then"
                f" resume. Earlier checkpoints are valid: {self.steps()}"
            ) from error

    def _prepare(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.directory}: cannot hold checkpoints: {error}") from error
        for path in self.directory.iterdir():
            if path.name.endswith(TMP) and path.is_dir():  # what a killed run left
                _remove(path)

    def _remove_old(self) -> None:
        for step in self.steps()[: -self._keep]:
            path = self.directory / str(step)
            (path / MARKER).unlink()  # first: a step that is half removed must not count
            _remove(path.rename(self.directory / f"{step}{TMP}"))

    def _set_aside(self, step: int) -> None:
        path = self.directory / str(step)
        path.rename(self.directory / f"{step}.corrupt-{time.time_ns()}")


def digest(state: Any) -> str:
    """SHA-256 (hex) of a whole state: its paths, shapes, dtypes and values. The same on any mesh.

    In a multi-process job every process must call it; arrays are gathered to each, one at a time.
    """
    whole = hashlib.sha256()
    for path, x in sorted(_flatten(state)[0].items()):
        whole.update(f"{path}\n{_sha256(_gathered(x))}\n".encode())
    return whole.hexdigest()


# --- The manifest -----------------------------------------------------------------------------------


class _ManifestHandler(ocp.AsyncCheckpointHandler):
    """Writes this process's manifest. The arrays are hashed in the background, on several threads."""

    async def async_save(self, directory: epath.Path, args: _ManifestSave) -> list[ocp.future.Future]:
        boxes = {
            path: [(_box(s.index, x.shape), s.data) for s in x.addressable_shards if s.replica_id == 0]
            for path, x in args.arrays.items()
        }
        shards = [(path, box, data) for path, found in boxes.items() for box, data in found]
        for _, _, data in shards:
            data.copy_to_host_async()
        # Now, not in the background: the next train step may donate these buffers.
        host = [np.asarray(data) for _, _, data in shards]
        arrays = {
            path: {"dtype": str(x.dtype), "shape": list(x.shape), "shards": []}
            for path, x in args.arrays.items()
        }
        manifest = {"step": args.step, "processes": jax.process_count(), "meta": args.meta, "arrays": arrays}

        async def write() -> None:
            for (path, box, _), sha in zip(shards, _each(_sha256, host), strict=True):
                arrays[path]["shards"].append([box, sha])
            body = json.dumps(manifest)
            text = f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}"
            (directory / f"process_{jax.process_index()}.json").write_text(text)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="manifest")]

    def save(self, directory: epath.Path, args: _ManifestSave) -> None:
        raise NotImplementedError("saved through AsyncCheckpointer only")

    def restore(self, directory: epath.Path, args: Any = None) -> Manifest:
        return _read_manifest(directory.parent)


@ocp.args.register_with_handler(_ManifestHandler, for_save=True, for_restore=True)
@dataclass
class _ManifestSave(ocp.args.CheckpointArgs):
    step: int
    arrays: dict[str, jax.Array]
    meta: dict[str, Any]


def _read_manifest(root: epath.Path) -> Manifest:
    """Joins the manifests of all processes. Raises CorruptCheckpoint naming the file."""
    first: Manifest | None = None
    index, count = 0, 1
    while index < count:
        path = root / "manifest" / f"process_{index}.json"
        try:
            sha, _, body = path.read_text().partition("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptCheckpoint(f"checkpoint {root}: {path} is unreadable ({error})") from error
        if hashlib.sha256(body.encode()).hexdigest() != sha:
            raise CorruptCheckpoint(f"checkpoint {root}: {path} is damaged (SHA-256 differs)")
        manifest = json.loads(body)
        if first is None:
            first, count = manifest, manifest["processes"]
        else:
            for name, array in manifest["arrays"].items():
                first["arrays"][name]["shards"] += array["shards"]
        index += 1
    assert first is not None
    return first


def _compare(wanted: dict[str, Any], saved: dict[str, Any], part: str, root: epath.Path) -> None:
    """Raises InputError listing the first differences in path, shape and dtype."""
    inside = {path for path in saved if not part or path == part or path.startswith(part + "/")}
    problems = [f"{path} is not in the checkpoint" for path in wanted if path not in inside]
    for path, x in wanted.items():
        if path in inside:
            has = f"{saved[path]['dtype']}{saved[path]['shape']}"
            if has != (wants := f"{x.dtype}{list(x.shape)}"):
                problems.append(f"{path} is {has} in the checkpoint, {wants} in this run")
    problems += [f"{path} is only in the checkpoint" for path in sorted(inside - set(wanted))]
    if problems:
        raise InputError(
            f"checkpoint {root} does not match this run: {_some(problems)}. The config has changed: restore"
            " the model and optimizer it was saved with, or use a new --workdir"
        )


# --- Digests ----------------------------------------------------------------------------------------


def _sha256(x: np.ndarray) -> str:
    sha = hashlib.sha256(f"{x.dtype}{list(x.shape)}\n".encode())
    sha.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
    return sha.hexdigest()


def _mismatches(
    arrays: dict[str, jax.Array], wanted: dict[str, Any], saved: dict[str, Any]
) -> list[str]:
    """Paths of the arrays that are not what was saved, as far as this process can tell."""
    checks: list[tuple[str, jax.Array | np.ndarray, Box, str]] = []
    bad = []
    for path, x in arrays.items():
        shards = [(tuple((a, b) for a, b in box), sha) for box, sha in saved[path]["shards"]]
        complete = sum(_size(box) for box, _ in shards) == x.size and shards
        if (x.shape, x.dtype) != (wanted[path].shape, wanted[path].dtype) or not complete:
            bad.append(path)
            continue
        split = any(not _held_by_one(x, box) for box, _ in shards)  # the same answer on every process
        source = _gathered(x) if split else x
        checks += [(path, source, box, sha) for box, sha in shards]

    def differs(check: tuple[str, jax.Array | np.ndarray, Box, str]) -> bool:
        region = _region(check[1], check[2])
        return region is not None and _sha256(region) != check[3]

    bad += [check[0] for check, wrong in zip(checks, _each(differs, checks), strict=True) if wrong]
    return list(dict.fromkeys(bad))


def _region(x: jax.Array | np.ndarray, box: Box) -> np.ndarray | None:
    """The values of x in box, put together from local shards; None if they are not all here."""
    if isinstance(x, np.ndarray):
        return x[tuple(slice(a, b) for a, b in box)]
    shards = {_box(s.index, x.shape): s.data for s in x.addressable_shards}
    if box in shards:
        return np.asarray(shards[box])
    out, filled = np.empty([b - a for a, b in box], x.dtype), 0
    for other, data in shards.items():
        both = _overlap(box, other)
        if size := _size(both):
            to = tuple(slice(a - p, b - p) for (a, b), (p, _) in zip(both, box, strict=True))
            of = tuple(slice(a - p, b - p) for (a, b), (p, _) in zip(both, other, strict=True))
            out[to] = np.asarray(data)[of]
            filled += size
    return out if filled == out.size else None


def _held_by_one(x: jax.Array, box: Box) -> bool:
    """Whether one process holds all of box. Knows every process's shards, not only the local ones."""
    if x.is_fully_addressable:
        return True
    held: dict[int, set[Box]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        held.setdefault(device.process_index, set()).add(_box(index, x.shape))
    return any(sum(_size(_overlap(box, b)) for b in boxes) == _size(box) for boxes in held.values())


def _gathered(x: jax.Array) -> np.ndarray:
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _overlap(a: Box, b: Box) -> Box:
    return tuple((max(p, r), max(min(q, s), p, r)) for (p, q), (r, s) in zip(a, b, strict=True))


def _size(box: Box) -> int:
    return math.prod(b - a for a, b in box)


def _each(function: Any, items: list[Any]) -> list[Any]:
    """Maps on threads: hashlib lets go of the interpreter lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


# --- Paths, processes, messages ---------------------------------------------------------------------


def _flatten(tree: Any, part: str = "") -> tuple[dict[str, Any], Any]:
    """{path: leaf} and the treedef. The path is the keys joined by "/", the same for every container."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    flat: dict[str, Any] = {}
    for keys, leaf in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        path = "/".join(filter(None, (part, path))) or "state"
        if path in flat:
            raise InputError(f"{path}: two arrays of the state have this path; rename one")
        flat[path] = leaf
    return flat, treedef


def _on_first_process(action: Any) -> None:
    """Runs action on process 0 while the others wait."""
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("bigmodel.checkpoint")


def _raise_together(problem: str | None, root: epath.Path) -> None:
    """Raises CorruptCheckpoint on every process if any has a problem, so that all fall back alike."""
    if jax.process_count() > 1 and problem is None:
        problem = f"checkpoint {root}: damaged, as another process found"
        if not np.any(multihost_utils.process_allgather(np.array(False))):
            return
    elif jax.process_count() > 1:
        multihost_utils.process_allgather(np.array(True))
    if problem is not None:
        raise CorruptCheckpoint(problem)


def _remove(path: epath.Path) -> None:
    if path.exists():
        path.rmtree(missing_ok=True)


def _some(texts: list[str]) -> str:
    return "; ".join(texts[:5]) + (f"; and {len(texts) - 5} more" if len(texts) > 5 else "")


# Words by which TensorStore and XLA report what is no damage: falling back would hide it.
_NOT_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    text = text if len(text) < 200 else "... " + text[-190:]  # TensorStore puts the cause last
    return f"{type(error).__name__}: {text}"


def _cause(error: BaseException) -> str:
    full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
    return f"the disk is full ({_first_line(error)})" if full else _first_line(error)
