"""What every script shares: the flags that name a config, and how errors become exit codes."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable

from bigmodel.config import InputError


def parser(description: str) -> argparse.ArgumentParser:
    """A parser whose errors are one line on stderr and exit code 2."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            raise InputError(f"{message}; see --help")

    return Parser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--config", required=True, metavar="FILE[:ARGS]", help="e.g. configs/gpt.py:size=124m")
    flags.epilog = "Any key of the config can be set: --config.optim.lr=3e-4 --config.mesh.fsdp=8"


def parse(
    flags: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """-> (flags, overrides such as "optim.lr=3e-4", taken from --config.KEY=VALUE or --config.KEY VALUE)."""
    args, rest = flags.parse_known_args(argv)
    overrides = []
    while rest:
        item = rest.pop(0)
        if not item.startswith("--config."):
            raise InputError(f"unknown argument {item!r}; see --help")
        if "=" not in item and rest and not rest[0].startswith("--"):
            item += "=" + rest.pop(0)
        overrides.append(item.removeprefix("--config."))
    return args, overrides


ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def no_accelerator_needed(always: bool = False) -> None:
    """Keeps JAX to the CPU where there is no accelerator, or `always`: to be called before JAX is imported.

    Compilers for TPUs and GPUs (`pip install bigmodel[plan]`) would else look for their chips at every start,
    which takes seconds and prints their complaints.
    """
    if always or not any(map(os.path.exists, ACCELERATORS)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


def keep_memory() -> None:
    """On a CPU with glibc, makes malloc keep what is freed. To be called before JAX is imported.

    Otherwise XLA's temporaries go back to the kernel after each step and are faulted in again at the next,
    which makes small models 1.2 to 1.5 times slower. The price: the process holds on to its peak.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version") and not any(map(os.path.exists, ACCELERATORS)):
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 26), (-8, 1)):
            libc.mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX


def run(main: Callable[[], int]) -> None:
    """Exits with what `main` returns; bad input is one line and exit code 2."""
    keep_memory()
    no_accelerator_needed()
    try:
        code = main()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.exit(code)
