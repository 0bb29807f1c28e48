"""Agreement of a job's supervisors on what to run, through small files in a workdir that all of them see.

    WORKDIR/fleet/leader.json   the order in force, by the supervisor of process 0
    WORKDIR/fleet/host-<i>.json the report of each other supervisor

There is no other channel: no server, no control plane. Each file has one writer, which rewrites it in place
about twice a second (so that NFS, which checks a file when it is opened, shows the new content), with a count
of the writes. A reader that sees no new count for DEAD_S by its own clock takes the writer to be lost, so
clocks need not agree. Files of an earlier launch are told apart by `launch`, a number drawn by the leader.

The leader alone decides: it orders attempt n to start once every host waits for it, ends it on all hosts when
one of them fails, and says if another attempt follows. On one host there are no files.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DEAD_S = 30.0

Doing = Literal["ready", "running", "ended"]


@dataclass(frozen=True)
class Report:
    """A host, as its supervisor says."""

    attempt: int = -1
    doing: Doing = "ready"
    code: int | None = None  # of its trainer; minus a signal's number
    line: str = ""


@dataclass(frozen=True)
class Order:
    """The next thing for every host to do."""

    kind: Literal["wait", "go", "end"]
    attempt: int
    members: tuple[int, ...] = ()  # hosts that train
    code: int = 0  # of an end
    line: str = ""
    host: int = -1  # where it began
    final: bool = False  # no attempt follows
    grace_s: float = 0.0  # for trainers to end by themselves
    address: str = ""  # of JAX's coordinator, where fewer hosts train than were launched


class _File:
    """A record in a file, rewritten in place."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self._count = path, 0
        self._last: dict[str, Any] = {}
        self._changed = -math.inf

    def write(self, value: Mapping[str, Any]) -> None:
        """Writes the record with the next count. Raises OSError."""
        self._count += 1
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**value, "count": self._count, "drawn": os.getpid()}) + "\n"
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, text.encode(), 0)
            os.ftruncate(file, len(text.encode()))
        finally:
            os.close(file)

    def read(self) -> dict[str, Any]:
        """Returns a copy of the record, or of the last one while it is being written; {} without one."""
        try:
            value = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return dict(self._last)
        if isinstance(value, dict) and value != self._last:
            if self._last:  # the first one may be of an earlier launch
                self._changed = time.monotonic()
            self._last = value
        return dict(self._last)

    def is_alive(self) -> bool:
        """True if a read has found something new of late."""
        return time.monotonic() - self._changed < DEAD_S


class Alone:
    """The board of a job of one host."""

    def post(self, report: Report) -> None:
        """Says what this host does."""

    def reports(self) -> dict[int, Report | None]:
        """Returns what the other hosts do; None for one that is lost, or has not come yet."""
        return {}

    def publish(self, order: Order) -> None:
        """Orders all hosts, on the leader."""


class Leader(Alone):
    """The board of process 0."""

    def __init__(self, workdir: pathlib.Path, hosts: int) -> None:
        self.launch = uuid.uuid4().hex
        self._own = _File(workdir / "fleet" / "leader.json")
        self._others = {i: _File(workdir / "fleet" / f"host-{i}.json") for i in range(1, hosts)}

    def reports(self) -> dict[int, Report | None]:
        return {i: self._report(file) for i, file in self._others.items()}

    def _report(self, file: _File) -> Report | None:
        value = file.read()
        if value.pop("launch", None) != self.launch:
            return None
        report = Report(**{key: value[key] for key in ("attempt", "doing", "code", "line")})
        return report if report.doing == "ended" or file.is_alive() else None

    def publish(self, order: Order) -> None:
        self._own.write({"launch": self.launch, **vars(order)})


class Follower:
    """The board of any other process."""

    def __init__(self, workdir: pathlib.Path, host: int) -> None:
        self._leader = _File(workdir / "fleet" / "leader.json")
        self._own = _File(workdir / "fleet" / f"host-{host}.json")
        self.launch = ""

    def post(self, report: Report) -> None:
        self._own.write({"launch": self.launch, **vars(report)})

    def order(self) -> Order | None:
        """The order in force; None without a leader that is alive.

        A leader that was launched anew orders attempt 0 again, under another `launch`."""
        value = self._leader.read()
        if not value:
            return None
        launch = str(value.pop("launch"))
        ended = launch == self.launch and value["final"]
        if not ended and not self._leader.is_alive():
            return None
        self.launch = launch
        order = Order(**{key: value[key] for key in Order.__dataclass_fields__})
        return Order(**{**vars(order), "members": tuple(order.members)})
