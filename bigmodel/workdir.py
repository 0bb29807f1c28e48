"""A run's directory: who may write in it, and the config it was started with.

config.json  plan.json  metrics.jsonl  tb/  loss.png  checkpoints/<step>/  tokenizer.json  ledger.json
fitted.json (class names, columns, ids: what training fitted)
init.json (what became of each array of init.from)  huggingface/ (of an imported model: what its export needs)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from bigmodel import config as config_lib
from bigmodel.config import Config, InputError


@contextlib.contextmanager
def claim(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Makes the directory and holds its lock until the end of the block, or of the process.

    Raises:
        InputError: another run holds it, or it cannot be made or written.
    """
    workdir = pathlib.Path(path)
    if "://" in str(path):
        raise InputError(
            f"--workdir={path} is a URL; mount it (a bucket: with gcsfuse) and give the path it has here"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a+")  # noqa: SIM115 -- held as long as the run
    except OSError as error:
        raise InputError(
            f"--workdir={workdir}: {error.strerror}; choose a directory you can write"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise InputError(
                f"--workdir={workdir} is in use by process {lock.read().strip() or '?'}; "
                "wait for it, stop it, or choose another --workdir"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield workdir


def read_config(workdir: pathlib.Path) -> Config:
    """The config that the run in `workdir` was last started with.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = workdir / "config.json"
    try:
        return config_lib.from_dict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist; give the --workdir of a run that scripts/train.py made"
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not JSON ({error}); restore it, or start over in a new --workdir"
        ) from error


def write_config(workdir: pathlib.Path, config: Config) -> None:
    write_json(workdir / "config.json", config_lib.to_dict(config))


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a reader finds the old file or the new one, never half of one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump(without_nan(value), file, indent=2, allow_nan=False)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def without_nan(value: Any) -> Any:
    """The same value with None for each float that is NaN or infinite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
