"""Files and directories that appear complete or not at all, locks, and the disk's errors as one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import json
import logging
import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from bigmodel.config.parsing import InputError

log = logging.getLogger("bigmodel")

LEFT_BEHIND_S = 24 * 3600  # a half-written file that nobody has touched for so long has no writer
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without flock, NFS without a lock daemon


def cause(error: OSError) -> str:
    """The system's own words, such as `No space left on device`."""
    return error.strerror or str(error)


@contextlib.contextmanager
def writing(path: pathlib.Path, fix: str = "make room or mend the path, then run again") -> Iterator[None]:
    """Turns an OSError of the block into an InputError that names the path, the cause and the fix."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({cause(error)}); {fix}") from error


def write_atomically(
    path: pathlib.Path,
    write: Callable[[IO[bytes]], object],
    fix: str = "make room, set $BIGMODEL_CACHE or set data.cache=false",
) -> None:
    """Makes `path` appear complete or not at all.

    Raises:
        InputError: no room, or a directory that cannot be written; what was there stays.
    """
    temporary: str | None = None
    try:
        with writing(path, fix):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{glob.escape(path.name)}.*"):  # by a process that was killed
                if time.time() - left.stat().st_mtime > LEFT_BEHIND_S:
                    left.unlink(missing_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                temporary = file.name
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            temporary = None
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str], flag: str) -> Iterator[pathlib.Path]:
    """A directory next to `path` that becomes `path` when the block ends well, and else leaves no trace.

    Raises:
        InputError: `path` exists and is not an empty directory, or cannot be made; `flag` names it.
    """
    target = pathlib.Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{flag}={target} exists and is not an empty directory; give a new one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        made.chmod(0o755)
    except OSError as error:
        raise InputError(f"{flag}={target} cannot be made ({cause(error)}); choose another place") from error
    try:
        yield made
        if target.exists():
            target.rmdir()
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a reader finds the old file or the new one, never half of one."""
    text = json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()), "make room or mend the path")


def without_nan(value: Any) -> Any:
    """The same value with None for each float that is NaN or infinite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: no such file.
        InputError: it cannot be read, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({cause(error)})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__} where an object belongs")
    return value


def set_aside(path: pathlib.Path, kind: str = "damaged") -> pathlib.Path:
    """Renames `path` to `<name>.<kind>-<time>`, which it returns. Raises InputError."""
    aside = path.with_name(f"{path.name}.{kind}-{time.time_ns()}")
    with writing(aside):
        path.rename(aside)
    return aside


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Locks `path` (made where it is missing) against other processes of this machine.

    Raises:
        InputError: a directory that cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed below; only the opening is guarded)
    except OSError as error:
        fix = "choose another by data.data_dir (datasets) or $BIGMODEL_CACHE (token files)"
        raise InputError(f"{path.parent} cannot be written ({cause(error)}); {fix}") from error
    with file:
        lock(file, path, fcntl.LOCK_EX)  # freed when the file is closed, even by a kill
        yield


def lock(file: IO[Any], path: pathlib.Path, how: int) -> None:
    """`flock`; a file system that has no locks is warned about.

    Raises:
        BlockingIOError: `how` has LOCK_NB, and another process has the lock.
        InputError: locking fails in another way.
    """
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"{path} cannot be locked ({cause(error)}); mend the path") from error
        log.warning("%s cannot be locked (%s): see to it that no other run uses it", path, cause(error))


def to_nowhere(fd: int) -> None:
    """Points a descriptor that cannot be written any more at the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


@contextlib.contextmanager
def after(write: Callable[[], object]) -> Iterator[None]:
    """Calls `write` after the block, however it ends. It never hides an error of the block: its own is then a
    warning.

    Raises:
        InputError: what `write` raises after a block that ended well.
    """
    try:
        yield
    except BaseException:
        try:
            write()
        except InputError as error:
            log.warning("%s", error)
        raise
    write()


def cache_dir() -> pathlib.Path:
    """$BIGMODEL_CACHE, or ~/.cache/bigmodel; without a home, a directory that this process removes."""
    try:
        return pathlib.Path(os.environ.get("BIGMODEL_CACHE") or "~/.cache/bigmodel").expanduser()
    except RuntimeError:
        return pathlib.Path(_homeless().name)


@functools.cache
def _homeless() -> tempfile.TemporaryDirectory[str]:
    log.info("no home directory: nothing is kept from run to run; $BIGMODEL_CACHE names a place for it")
    return tempfile.TemporaryDirectory(prefix="bigmodel-")
