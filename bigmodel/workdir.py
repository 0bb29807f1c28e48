"""A run's directory: its lock, its config, and its JSON files.

config.json  plan.json  metrics.jsonl  tb/  checkpoints/<step>/  tokenizer.json  ledger.json
events.jsonl (starts, ends, restarts)  fleet/ (what a job's hosts agree on)  stacks/ (of trainers that hung)
loss.png  metrics.png  pictures/  samples/ (drawn and written while it trains)  report.html
fitted.json (class names, columns, ids, as training fitted them)
init.json (what became of each array of init.from)  huggingface/ (files of an imported model, for its export)
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any

from bigmodel import config as config_lib
from bigmodel import disk
from bigmodel.config import Config, InputError
from bigmodel.config.task import TASKS, keys_of
from bigmodel.disk import without_nan, write_json

__all__ = ["claim", "local", "read_config", "read_json", "without_nan", "write_config", "write_json"]

log = logging.getLogger("bigmodel")

OF_ANY_TASK = set[str]().union(*(keys_of(cls.name) for cls in TASKS))
BEFORE_TRAINING = {
    ".lock",
    "events.jsonl",
    "fitted.json",
    "tokenizer.json",
}  # files that are written before config.json


def local(path: str | os.PathLike[str], flag: str = "--workdir") -> pathlib.Path:
    """Returns the path that a flag gives. Raises InputError for an empty one and for a URL."""
    given = f"{flag}={os.fspath(path)}" if flag.startswith("--") else f"{flag} {os.fspath(path)}"
    text = os.fspath(path)
    if not text.strip():
        raise InputError(f"{flag} is empty; give a directory (is a shell variable not set?)")
    if "://" in text:
        raise InputError(f"{given} is a URL; mount it (a bucket: with gcsfuse) and give the path it has here")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # the writer of arrays takes only UTF-8
        raise InputError(
            f"{given} is not UTF-8 text in this locale; set PYTHONUTF8=1 or LC_ALL=C.UTF-8, or rename it"
        ) from error
    return pathlib.Path(text)


@contextlib.contextmanager
def claim(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Makes the directory and locks it until the end of the block, or of the process.

    Removes a directory that it made if the block raises before config.json is written.

    Raises:
        InputError: another run has locked it, or it cannot be made or written.
    """
    workdir = local(path)
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        with _lock(workdir) as lock:
            with disk.writing(workdir / ".lock"):
                lock.truncate(0)
                lock.write(f"{os.getpid()}\n".encode())
            yield workdir
    except BaseException:
        _remove_empty(workdir, made)
        raise


@contextlib.contextmanager
def _lock(workdir: pathlib.Path) -> Iterator[IO[bytes]]:
    path = workdir / ".lock"
    while True:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = open(path, "a+b", buffering=0)  # noqa: SIM115 -- open as long as the run
        except OSError as error:
            raise InputError(
                f"--workdir={workdir}: {disk.cause(error)}; choose a directory you can write"
            ) from error
        with lock:
            try:
                disk.lock(lock, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                owner = lock.read().decode(errors="replace").strip() or "?"
                raise InputError(
                    f"--workdir={workdir} is in use by process {owner}; "
                    "wait for it, stop it, or choose another --workdir"
                ) from error
            if not _is_same(lock, path):  # a start that failed removed it meanwhile
                continue
            yield lock
            return


def _is_same(file: IO[bytes], path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_empty(workdir: pathlib.Path, made: list[pathlib.Path]) -> None:
    """Removes the folders of `made`, innermost first, up to one that is not empty."""
    if not made:
        return
    with contextlib.suppress(OSError):  # a folder that is not empty stays
        (workdir / "checkpoints").rmdir()
    with contextlib.suppress(OSError):
        if {entry.name for entry in workdir.iterdir()} <= BEFORE_TRAINING:
            for name in BEFORE_TRAINING:
                (workdir / name).unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()


def read_config(workdir: pathlib.Path) -> Config:
    """Reads the config that the run in `workdir` was last started with.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = workdir / "config.json"
    try:
        return config_lib.from_dict(_as_then(disk.read_json(path), workdir))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist; give the --workdir of a run that scripts/train.py made"
        ) from error
    except InputError as error:
        name = "" if str(path) in str(error) else f"{path}: "
        raise InputError(f"{name}{error}; restore it, or start over in a new --workdir") from error


def _as_then(tree: Any, workdir: pathlib.Path) -> Any:
    """Returns an older version's config.json in today's keys.

    Before `task.goes_on`, class 1 followed, but in an imported model; each file had the keys of all tasks.
    """
    task = tree.get("task") if isinstance(tree, dict) else None
    if not isinstance(task, dict):
        return tree
    imported = (workdir / "huggingface" / "config.json").exists()
    if task.get("next_sentence") is True and not imported:
        task = {"goes_on": 1, **task}
    known = keys_of(task.get("name", ""))
    if known and (dropped := sorted(task.keys() & OF_ANY_TASK - known)):
        log.info("%s: keys of other tasks are dropped: %s", workdir / "config.json", ", ".join(dropped))
        task = {key: value for key, value in task.items() if key not in dropped}
    return {**tree, "task": task}


def last_config(workdir: pathlib.Path) -> Config | None:
    """Returns `read_config`, or None where config.json is missing or damaged."""
    try:
        return read_config(workdir) if (workdir / "config.json").exists() else None
    except InputError:
        return None  # `write_config` warns of it


def write_config(workdir: pathlib.Path, config: Config) -> None:
    """Writes config.json; a damaged one is set aside, with a warning. Raises InputError."""
    path = workdir / "config.json"
    if path.exists() and last_config(workdir) is None:
        log.warning("%s is damaged; it is kept as %s", path, disk.set_aside(path).name)
    write_json(path, config_lib.to_dict(config))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object that a run wrote, {} if there is none; sets a damaged file aside and warns."""
    try:
        return disk.read_json(path)
    except FileNotFoundError:
        return {}
    except InputError as error:
        log.warning("%s; it is kept as %s", error, disk.set_aside(path).name)
        return {}
