"""Free memory of this host for a run, within the limits of its cgroup and `ulimit`."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import pathlib
import re
import resource
import time
from collections.abc import Iterator
from typing import NamedTuple

PROC = pathlib.Path("/proc")
CGROUP = pathlib.Path("/sys/fs/cgroup")


class Room(NamedTuple):
    """Free bytes, total bytes, and the limit that they count against."""

    free_bytes: float
    total_bytes: float
    of: str


def room() -> Room | None:
    """The narrowest limit on the memory that this process may still take; None where there is none."""
    return min([*_host(), *_cgroup(), *_ulimit()], default=None)


def is_granted(size: float) -> bool:
    """True if the system maps so many bytes now. They are returned untouched, so this takes no memory."""
    try:
        mmap.mmap(-1, max(int(size), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def give_back() -> None:
    """Returns the memory that glibc's malloc keeps for later use to the system; elsewhere does nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _host() -> Iterator[Room]:
    with contextlib.suppress(OSError):
        text = (PROC / "meminfo").read_text(encoding="utf-8")
        found = {key: 1024.0 * int(kb) for key, kb in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
        if "MemAvailable" in found:
            yield Room(found["MemAvailable"], found["MemTotal"], "the host's memory")


def _cgroup() -> Iterator[Room]:
    """Limits of every cgroup that this process is in, up to the root; files as in cgroup v2 or v1."""
    with contextlib.suppress(OSError):
        for line in (PROC / "self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root = CGROUP / controllers
            inner = root / name.lstrip("/")
            for folder in dict.fromkeys([inner, *(p for p in inner.parents if p.is_relative_to(root)), root]):
                yield from _group(folder)


def _group(folder: pathlib.Path) -> Iterator[Room]:
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            total = float((folder / limit).read_text(encoding="utf-8"))  # "max" is a ValueError: no limit
            stat = (folder / "memory.stat").read_text(encoding="utf-8")
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)
            taken = float((folder / used).read_text(encoding="utf-8")) - float(cached[1] if cached else 0)
            if total < 2**60:  # v1 says "no limit" by a huge one
                yield Room(total - taken, total, "the cgroup's memory.max")


def _ulimit() -> Iterator[Room]:
    """Limits of address space and data, which count mapped memory whether touched or not."""
    kinds = ((resource.RLIMIT_AS, "VmSize", "ulimit -v"), (resource.RLIMIT_DATA, "VmData", "ulimit -d"))
    for kind, field, name in kinds:
        total, _ = resource.getrlimit(kind)
        if total != resource.RLIM_INFINITY:
            yield Room(total - _status(field), total, name)


def _status(field: str) -> float:
    """A size in /proc/self/status, in bytes; 0 where there is no such file."""
    with contextlib.suppress(OSError):
        text = (PROC / "self/status").read_text(encoding="utf-8")
        if found := re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE):
            return 1024.0 * int(found[1])
    return 0.0


class ProcessMemory:
    """Peak growth of this process, for CPU devices, which share its memory and do not count it.

    Linux only: elsewhere it is always 0.
    """

    PROC = pathlib.Path("/proc/self")

    def __init__(self) -> None:
        self._base = self.peak_bytes = 0.0

    def begin(self, allocated_bytes: float) -> None:
        """Starts to count; `allocated_bytes` of what is to be counted are allocated already."""
        with contextlib.suppress(OSError):
            time.sleep(0.1)  # the last step's buffers are freed shortly after its results arrive
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)  # freed memory must not be reused without being counted
            (self.PROC / "clear_refs").write_text("5")  # resets the peak: man proc_pid_clear_refs
            self._base = self._field("VmRSS") - allocated_bytes

    def end(self) -> None:
        """Sets `peak_bytes` to the peak since `begin`."""
        with contextlib.suppress(OSError):
            self.peak_bytes = self._field("VmHWM") - self._base

    def _field(self, name: str) -> float:
        found = re.search(rf"^{name}:\s+(\d+) kB", (self.PROC / "status").read_text(), re.MULTILINE)
        return 1024.0 * int(found.group(1)) if found else 0.0
