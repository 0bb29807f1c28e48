"""What every script shares: the flags that name a config, and how errors become exit codes."""

from __future__ import annotations

import argparse
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


def run(main: Callable[[], int]) -> None:
    """Exits with what `main` returns; bad input is one line and exit code 2."""
    try:
        code = main()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.exit(code)
