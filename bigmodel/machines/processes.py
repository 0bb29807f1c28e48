"""Processes that this one starts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def die_with_parent(command: Sequence[str]) -> list[str]:
    """Returns a command that Linux sends SIGTERM when this process is killed: a run then saves, and ends."""
    if sys.platform != "linux":
        return list(command)
    first = (
        f"import ctypes, os, sys as s; ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGTERM)}); "
        f"os.getppid() == {os.getpid()} or s.exit(75); os.execvp(s.argv[1], s.argv[1:])"
    )
    return [sys.executable, "-c", first, *command]
