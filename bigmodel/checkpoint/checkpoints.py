"""Checkpoints: save without stopping the run, restore onto any mesh, and never restore damaged values.

Orbax writes the arrays: the v0 `AsyncCheckpointer`, because its handlers take our own item (below) into the
same commit, and without `CheckpointManager`, whose step list is cached and outlives a failed save. Without
compression and replica-parallel writes: on 10M float32 parameters in 100 arrays (8 CPU devices, two cores)
that cut Orbax's blocking time from 40-400 ms to 15-60 and its restore from 0.4-1.2 s to 0.2-0.6. With the
digests, `save` blocks 25-110 ms and `restore` takes 0.3-0.7 s, 0.1 s of it for verifying.

A step is the directory `<directory>/<step>/`, and counts only once commit_success.txt is in it:

    state/              one flat dict {path: array}, so that every message can name the array
    manifest/           process_<i>.json: meta, shapes, dtypes, the SHA-256 of each shard process i wrote
    commit_success.txt

Orbax does not checksum array data (60 of 60 flipped bits came back silently wrong), hence the manifest. An
Orbax handler writes it, so no step is committed without its digests. On a local disk a step is built as
`<step>.orbax-checkpoint-tmp` and renamed when complete. AtomicityMode.COMMIT_FILE would build it in place,
where the remains of a killed save look like a directory of the user's and could not safely be removed.
(On gs:// Orbax does that of itself; remains are then ignored, and stop a save of the same step.)
"""

from __future__ import annotations

import json
import logging
import math
import operator
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import type_handlers

from bigmodel.checkpoint import digests
from bigmodel.checkpoint.manifest import CorruptCheckpoint, Manifest, ManifestHandler, ManifestSave
from bigmodel.checkpoint.manifest import read as _read_manifest
from bigmodel.config import InputError

log = logging.getLogger("bigmodel")

MARKER = "commit_success.txt"
STEP = "0|[1-9][0-9]*"  # a step's name
TMP = ".orbax-checkpoint-tmp"  # ends the name of a step that is being written or deleted


class Checkpoints:
    """The checkpoints of one run. Every process of a job makes one and calls the same methods in order.

    A context manager: leaving it waits for the save under way. One writing job per directory.

    Args:
      directory: holds one directory per step; made if missing. Local, or gs://.
      keep: how many of the newest steps stay, and `best`. One more is there from a commit until the next
        call.
      async_save: False makes `save` return only when the step is committed.
      read_only: writes, renames and removes nothing; for evaluation beside a running job.

    Raises: InputError if keep < 1 or the directory cannot be made.
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
            raise InputError(f"checkpoint.keep={keep}: keep at least one checkpoint")
        name = os.fspath(directory)
        self.directory = epath.Path(name if "://" in name else os.path.abspath(name))
        self._keep, self._async, self._read_only = keep, async_save, read_only
        orbax_log = logging.getLogger("absl")
        if orbax_log.level == logging.NOTSET:  # else it follows the root logger, 30 lines a save at INFO
            orbax_log.setLevel(logging.WARNING)
        # Replica-parallel writes slice every replicated array on the device and compile each slice.
        handler = type_handlers.ArrayHandler(use_replica_parallel=False)
        registry = type_handlers.create_type_handler_registry((jax.Array, handler))
        self._arrays = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._writing: int | None = None
        self.best: int | None = None  # a step that stays however old it becomes
        if not read_only:
            _on_first_process(self._prepare)
            items = ocp.CompositeCheckpointHandler(state=self._arrays, manifest=ManifestHandler())
            self._orbax = ocp.AsyncCheckpointer(items)

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
            log.error("%s", failure)  # the error already on its way out says more

    def steps(self) -> list[int]:
        """The committed steps, oldest first. Whatever else lies in the directory is ignored."""
        if not self.directory.is_dir():
            return []
        names = [path.name for path in self.directory.iterdir() if re.fullmatch(STEP, path.name)]
        return sorted(int(name) for name in names if (self.directory / name / MARKER).exists())

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Saves a state. Returns once the arrays are on the host: then they may be donated.

        First waits for the save under way, so an error of that one is raised here.

        Args:
          step: newer than every committed step.
          state: pytree of jax.Array, of any shardings.
          meta: JSON, such as the pipeline's fingerprint. Process 0's is stored.

        Raises: InputError if the step is not newer or its directory is taken, a leaf is no jax.Array, two
          leaves have one path, meta is not JSON, or this step or the one before could not be written.
        """
        step = operator.index(step)
        arrays, _ = digests.flatten(state)
        for path, x in arrays.items():
            if not isinstance(x, jax.Array):
                raise InputError(f"{path}: cannot save a {type(x).__name__}; make it a jax.Array")
        try:
            meta = json.loads(json.dumps(meta))  # a copy: it is written while the run goes on
        except (TypeError, ValueError) as error:
            raise InputError(f"checkpoint meta must be JSON: {error}") from error
        self.wait()
        orbax = self._require_free(step)
        stored = {path: x for path, x in arrays.items() if x.size}  # Orbax refuses empty arrays
        manifest = ManifestSave(arrays, meta)
        with self._reporting(step):
            orbax.save(
                self.directory / str(step),
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(stored), manifest=manifest),
            )
            self._writing = step
        if not self._async:
            self.wait()

    def restore(
        self, state_spec: Any, step: int | None = None, *, part: str = ""
    ) -> tuple[Any, dict[str, Any], int]:
        """Restores a state into the shardings of its spec, whatever mesh it was saved from.

        Every saved shard is compared with its SHA-256 after it was read. Each process checks the shards
        that its devices hold; an array with a shard that no process holds whole (the mesh now cuts it
        between processes) is gathered to every host for the check, one array at a time.

        Without a step, a damaged one is logged, renamed `<step>.corrupt-<time>` so that the run can save
        that step anew (not if read_only), and the one before it is tried.

        Args:
          state_spec: pytree of jax.ShapeDtypeStruct with shardings.
          step: None means the newest undamaged one.
          part: the path of a subtree, such as "params", of which state_spec is then the spec.

        Returns: (state, meta, step).

        Raises: InputError if there is no such step, or if a path, shape or dtype differs from the spec
          (found before any array is read). CorruptCheckpoint if the given step, or every step, is damaged.
        """
        self.wait()
        steps = self.steps() if step is None else [self._require_step(step)]
        problem = f"{self.directory}: no checkpoint to restore; check --workdir"
        if not steps:
            raise InputError(problem)
        for candidate in reversed(steps):
            try:
                return (*self._restore(self.directory / str(candidate), state_spec, part), candidate)
            except CorruptCheckpoint as error:
                if step is not None:
                    raise
                problem = str(error)
                log.warning("%s; trying the step before it", problem)
                if not self._read_only:
                    aside = self.directory / f"{candidate}.corrupt-{time.time_ns()}"
                    _on_first_process((self.directory / str(candidate)).rename, aside)
        raise CorruptCheckpoint(f"{self.directory}: no good checkpoint is left; the last one: {problem}")

    def check(self, state_spec: Any) -> dict[str, Any]:
        """The meta of the newest step whose manifest is sound; {} if there is none. Reads no array.

        Raises: InputError if that step's paths, shapes or dtypes are not the spec's.
        """
        step, manifest = self._newest()
        if step is None:
            return {}
        _compare(digests.flatten(state_spec)[0], manifest["arrays"], "", self.directory / str(step))
        return dict(manifest["meta"])

    def newest_meta(self) -> dict[str, Any]:
        """The meta of the newest step whose manifest is sound; {} if there is none."""
        return dict(self._newest()[1].get("meta", {}))

    def _newest(self) -> tuple[int | None, Manifest]:
        """The newest step whose manifest is sound; `restore` warns of others, and falls back alike."""
        for step in reversed(self.steps()):
            with suppress(CorruptCheckpoint):
                return step, _read_manifest(self.directory / str(step))
        return None, {}

    def spec(self, part: str, sharding: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
        """Specs of a subtree such as "params" in the newest step: a flat {path inside it: spec}.

        Raises: InputError if there is no step, CorruptCheckpoint.
        """
        if (step := self.latest()) is None:
            raise InputError(f"{self.directory}: no checkpoint to restore; check --workdir")
        arrays = _read_manifest(self.directory / str(step))["arrays"]
        return {
            path.removeprefix(f"{part}/"): jax.ShapeDtypeStruct(x["shape"], x["dtype"], sharding=sharding)
            for path, x in arrays.items()
            if path.startswith(f"{part}/")
        }

    def meta(self, step: int) -> dict[str, Any]:
        """The meta saved with a step. Raises InputError if there is no such step, CorruptCheckpoint."""
        return dict(_read_manifest(self.directory / str(self._require_step(step)))["meta"])

    def wait(self) -> None:
        """Waits for the save under way, then removes steps beyond `keep`. Raises InputError if it failed."""
        if self._orbax is None or self._writing is None:
            return
        step, self._writing = self._writing, None
        with self._reporting(step):
            self._orbax.wait_until_finished()
        _on_first_process(self._remove_old)

    def close(self) -> None:
        """Waits like `wait`, then ends Orbax's threads; `save` raises from here on. May be called twice."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def _restore(self, root: epath.Path, spec: Any, part: str) -> tuple[Any, dict[str, Any]]:
        wanted, treedef = digests.flatten(spec, part)
        with _together(root):
            manifest = _read_manifest(root)
            _compare(wanted, manifest["arrays"], part, root)
            arrays = self._read(root, {path: x for path, x in wanted.items() if math.prod(x.shape)})
        with _together(root):
            if bad := digests.mismatches(arrays, manifest["arrays"]):
                raise CorruptCheckpoint(f"checkpoint {root}: damaged: {_some(bad)} (SHA-256 differs)")
        for path, x in wanted.items():
            if path not in arrays:  # empty, so not stored
                zeros = jax.jit(lambda x=x: jax.numpy.zeros(x.shape, x.dtype), out_shardings=x.sharding)
                arrays[path] = zeros()
        return jax.tree.unflatten(treedef, [arrays[path] for path in wanted]), dict(manifest["meta"])

    def _read(self, root: epath.Path, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        args = {
            path: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
            for path, x in wanted.items()
        }
        request = ocp.args.PyTreeRestore(item=wanted, restore_args=args, partial_restore=True)
        try:
            # Through the handler: a checkpointer has barriers, where the error of one process hangs the rest.
            return dict(self._arrays.restore(root / "state", args=request)) if wanted else {}
        except Exception as error:
            # Out of memory, or not allowed to read: falling back to an older step would hide it.
            if re.search("RESOURCE_EXHAUSTED|PERMISSION_DENIED|MemoryError", repr(error)):
                raise
            raise CorruptCheckpoint(f"checkpoint {root}: unreadable: {_one_line(error)}") from error

    def _require_step(self, step: int) -> int:
        if step not in (steps := self.steps()):
            raise InputError(f"{self.directory}: no checkpoint of step {step}; there are {steps}")
        return step

    def _require_free(self, step: int) -> ocp.AsyncCheckpointer:
        path, latest = self.directory / str(step), self.latest()
        if self._orbax is None:
            raise InputError(f"{path}: cannot save, the checkpoints are read-only or closed")
        if step < 0 or (latest is not None and step <= latest):
            there = "" if latest is None else f", step {latest} is there already"
            raise InputError(f"{path}: cannot save step {step}{there}; resume, or use a new --workdir")
        _on_first_process(self._clear, path)
        return self._orbax

    def _clear(self, path: epath.Path) -> None:
        """Renames what has a step's name and is no checkpoint: it would be in the way of one."""
        if not path.exists() and not os.path.islink(path):
            return
        aside = path.with_name(f"{path.name}.incomplete-{time.time_ns()}")
        try:
            path.rename(aside)
        except OSError as error:
            raise InputError(
                f"{path}: in the way of a checkpoint, and cannot be renamed ({error.strerror}); move it away"
            ) from error
        log.warning("%s is no complete checkpoint; it is kept as %s", path, aside.name)

    @contextmanager
    def _reporting(self, step: int) -> Iterator[None]:
        """Turns what Orbax raises into one line that names the path, and frees the space."""
        try:
            yield
        except Exception as error:
            path = self.directory / str(step)
            if jax.process_index() == 0:
                with suppress(OSError):  # TensorStore may still be writing; if so the next start removes it
                    (self.directory / f"{step}{TMP}").rmtree(missing_ok=True)
            full = re.search("No space left|RESOURCE_EXHAUSTED", str(error))
            raise InputError(
                f"{path}: checkpoint not written: {'the disk is full: ' if full else ''}{_one_line(error)};"
                f" make room or mend the path, then resume. Steps {self.steps()} are still valid"
            ) from error

    def _prepare(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.directory}: cannot hold checkpoints: {error}") from error
        for path in list(self.directory.iterdir()):
            if path.name.endswith(TMP) and path.is_dir():  # left by a killed run
                path.rmtree(missing_ok=True)
            elif re.fullmatch(STEP, path.name.removesuffix(TMP)) and not (path / MARKER).exists():
                self._clear(path)

    def remove_after(self, step: int) -> None:
        """Removes the steps after `step`, so that they can be saved anew."""
        self.wait()
        _on_first_process(lambda: self._remove([each for each in self.steps() if each > step]))

    def _remove_old(self) -> None:
        self._remove([step for step in self.steps()[: -self._keep] if step != self.best])

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            path = self.directory / str(step)
            (path / MARKER).unlink()  # first, so that a half-removed step cannot count
            path.rename(self.directory / f"{step}{TMP}").rmtree()


def _compare(wanted: dict[str, Any], saved: dict[str, Any], part: str, root: epath.Path) -> None:
    """Raises InputError listing the first differences in path, shape and dtype."""
    inside = {path for path in saved if not part or path == part or path.startswith(part + "/")}
    problems = []
    for path, x in wanted.items():
        if path not in inside:
            problems.append(f"{path} is not in the checkpoint")
        elif (has := digests.kind(**saved[path])) != (wants := digests.kind(x.dtype, x.shape)):
            problems.append(f"{path} is {has} in the checkpoint, {wants} in this run")
        elif x.sharding is None:
            raise InputError(f"{path}: its spec has no sharding; give it the one it is to arrive in")
    problems += [f"{path} is only in the checkpoint" for path in sorted(inside - set(wanted))]
    if problems:
        raise InputError(
            f"checkpoint {root} does not match this run: {_some(problems)}. Most likely the config changed:"
            " restore with the model and optimizer it was saved with, or start in a new --workdir"
        )


def _on_first_process(action: Callable[..., Any], *args: Any) -> None:
    """Runs action on process 0 while the others wait."""
    if jax.process_index() == 0:
        action(*args)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("bigmodel.checkpoint.checkpoints")


@contextmanager
def _together(root: epath.Path) -> Iterator[None]:
    """CorruptCheckpoint on one process becomes CorruptCheckpoint on all, so that all fall back alike."""
    problem: CorruptCheckpoint | None = None
    try:
        yield
    except CorruptCheckpoint as error:
        problem = error
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(problem is not None)).any():
        problem = problem or CorruptCheckpoint(f"checkpoint {root}: damaged, as another process found")
    if problem is not None:
        raise problem


def _some(texts: list[str]) -> str:
    return "; ".join(texts[:5]) + (f"; and {len(texts) - 5} more" if len(texts) > 5 else "")


def _one_line(error: BaseException) -> str:
    """The innermost cause, without TensorStore's specs and driver stacks."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.split(r"\n| \[(?:tensorstore_spec|source)", str(error))[0]
    text = re.sub(r'Error opening "\w+" driver: ', "", text)
    return f"{type(error).__name__}: {text}"
