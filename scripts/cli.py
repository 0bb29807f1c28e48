"""Shared by the scripts: flags that name a config or a workdir, and errors as exit codes."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import io
import math
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import yaml

from bigmodel.machines import accelerators

if not accelerators.found():
    accelerators.keep_to_cpu()  # before anything imports JAX

from bigmodel import config as config_lib
from bigmodel import disk, units, workdir
from bigmodel.config import InputError
from bigmodel.training import ending

# Errors of a disk that is full, read-only or broken: not the program's fault.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE)


def parser(description: str) -> argparse.ArgumentParser:
    """A parser whose errors are one line on stderr and exit code 2."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            raise InputError(f"{message}; see --help")

    return Parser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def directory(text: str) -> str:
    """The type of a flag that names a directory; refuses an empty one (a shell variable that is not set)."""
    try:
        return str(workdir.local(text, "the path"))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def limits(known: Collection[str]) -> Callable[[str], dict[str, float]]:
    """The type of a flag of KEY=NUMBER pairs with commas between them."""

    def parsed(text: str) -> dict[str, float]:
        pairs = [item.partition("=") for item in text.split(",")]
        for key, _, value in pairs:
            if key not in known:
                raise argparse.ArgumentTypeError(f"{key!r} is unknown; choose of {', '.join(known)}")
            if not value.replace(".", "", 1).isdigit() or not float(value):
                raise argparse.ArgumentTypeError(f"{key}={value}: give a number above 0")
        return {key: float(value) for key, _, value in pairs}

    return parsed


def numbers(text: str) -> tuple[float, ...]:
    """The type of a flag of numbers with commas between them."""
    return tuple(map(float, text.split(",")))


def add_config(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--config", required=True, metavar="FILE[:ARGS]", help="e.g. configs/gpt.py:size=124m")
    flags.epilog = (
        "Any key of the config can be set: --config.optim.lr=3e-4 --config.mesh.fsdp=8\n"
        "--config=FILE --help lists them all."
    )


def workdir_parser(description: str, step: bool = True) -> argparse.ArgumentParser:
    """A parser with --workdir and --step, for scripts that take their config from a run."""
    flags = parser(description)
    flags.add_argument("--workdir", required=True, type=directory, help="a run that scripts/train.py made")
    if step:
        flags.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    return flags


def parse_workdir(
    flags: argparse.ArgumentParser, may_set: Collection[str] = ()
) -> tuple[argparse.Namespace, list[str]]:
    """Parses as `parse` does. Raises InputError for keys of the config, except those of `may_set`."""
    args, overrides = parse(flags)
    for item in overrides:
        if item.partition("=")[0] not in may_set:
            raise InputError(f"--config.{item}: the config comes from the workdir; leave it out")
    return args, overrides


def parse(
    flags: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and overrides such as "optim.lr=3e-4" from --config.KEY=VALUE or KEY VALUE."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv) and (spec := _config_of(argv)):
        keys = config_lib.describe(
            spec, _overrides([item for item in argv if item.startswith("--config.") and "=" in item])
        )
        flags.epilog = f"The config's keys; {spec} or a flag sets those with a star:\n" + "\n".join(keys)
    args, rest = flags.parse_known_args(argv)
    return args, _overrides(rest)


def _config_of(argv: list[str]) -> str:
    """The value of --config, or "" without one."""
    for item, following in zip(argv, [*argv[1:], ""], strict=True):
        if item == "--config" or item.startswith("--config="):
            return item.partition("=")[2] or following
    return ""


def _overrides(rest: list[str]) -> list[str]:
    overrides = []
    while rest:
        item = rest.pop(0)
        if not item.startswith("--config."):
            raise InputError(f"unknown argument {item!r}; see --help")
        if "=" not in item and rest and not rest[0].startswith("--"):
            item += "=" + rest.pop(0)
        overrides.append(item.removeprefix("--config."))
    return overrides


@contextlib.contextmanager
def patience(what: str, every_s: float = 20) -> Iterator[None]:
    """Prints on stderr, every `every_s` seconds of the block, for how long `what` has been running."""
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(every_s):
            print(f"{what} ... {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def say(line: str) -> None:
    """Prints a line on a job's first host, before JAX knows the hosts; a closed pipe is fine."""
    if os.environ.get("JAX_PROCESS_ID", os.environ.get("SLURM_PROCID", "0")) == "0":
        with contextlib.suppress(OSError):
            os.write(1, f"{line}\n".encode(errors="backslashreplace"))


def assumptions(texts: Iterable[str]) -> dict[str, float]:
    """The values of --assume flags: KEY=VALUE, or YAML files of KEY: VALUE lines."""
    return dict(_assumption(*pair) for text in texts for pair in _pairs(text))


def _pairs(text: str) -> list[tuple[str, Any]]:
    """`KEY=VALUE`, or a YAML file of KEY: VALUE lines."""
    if not text.endswith((".yaml", ".yml")):
        key, _, value = text.partition("=")
        return [(key, value)]
    try:
        tree = yaml.safe_load(pathlib.Path(text).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--assume={text}: cannot be read ({error}); give KEY: VALUE lines") from error
    if not isinstance(tree, dict):
        raise InputError(f"--assume={text}: holds no KEY: VALUE lines, such as watts: 250")
    return list(tree.items())


def cap(text: str, flag: str) -> units.Cap | None:
    """The most to spend that a flag gives, such as 2h or $50; "": None."""
    try:
        return units.cap(text)
    except ValueError as error:
        raise InputError(f"{flag}={text}: {error}") from error


def _assumption(key: str, value: Any) -> tuple[str, float]:
    keys = [field.name for field in dataclasses.fields(config_lib.Assume)]
    try:
        number = float(value)
        if key not in keys or not 0 <= number < math.inf:
            raise ValueError
        return key, number
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--assume={key}={value}: give KEY=NUMBER, 0 or more, with a KEY of {', '.join(keys)}"
        ) from error


def keep_memory() -> None:
    """Makes malloc keep freed memory, on a CPU with glibc. Call it before JAX is imported.

    Otherwise XLA's temporaries go back to the kernel after each step and are faulted in again at the next,
    which makes small models 1.2 to 1.5 times slower. The price: the process never shrinks from its peak.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version") and not accelerators.found():
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 26), (-8, 1)):
            libc.mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX


def fail(error: Exception, code: int = 2) -> int:
    """Prints an error as one line, ends all hosts of a job, and returns the exit code."""
    line = " ".join(str(error).split())
    _complain(f"error: {line}")
    if (end := ending.taken()) is not None:
        end.end_job(code, line)
    return code


def _complain(text: str) -> None:
    """Prints to stderr, if it can be written."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def run(main: Callable[[], int]) -> None:
    """Exits with what `main` returns; bad input is one line and exit code 2."""
    keep_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # characters that the locale lacks are no error
    try:
        code = main()
        sys.stdout.flush()
    except InputError as error:
        code = fail(error)
    except BrokenPipeError:  # stdout is closed, as behind `| head`
        disk.to_nowhere(1)
        code = 0
    except OSError as error:
        if error.errno not in DISK:
            raise
        code = fail(
            InputError(f"{error.filename or 'a file'}: {disk.cause(error)}; make room or mend the path")
        )
    except Exception as error:
        if (end := ending.taken()) is None:
            raise
        end.await_news()
        _complain(traceback.format_exc())
        end.end_job(1, f"{type(error).__name__}: {error}")
        code = 1
    sys.exit(code)
