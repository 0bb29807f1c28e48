"""Reports a trainer's progress to its supervisor, by lines of JSON in a pipe.

phase, steps (calls since training began), planned_s, longest_s (of a step); error, code: how it will end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

EVERY_S = 0.2  # at most so often within a phase
DUMP = signal.SIGQUIT  # asks for the stacks of all threads
# Seconds without progress in a phase after which a run is taken to hang. Progress is a phase that begins or
# ends, a step, and a batch of an evaluation. A step may take `times` the longer of what was planned and the
# longest one so far, and never less than `least`.
LIMITS = {
    "start": 900.0, "compile": 3600.0, "check": 1800.0, "restore": 1800.0, "first": 1800.0,
    "eval": 900.0, "checkpoint": 1800.0, "times": 10.0, "least": 60.0,
}  # fmt: skip
FIRST = 3  # steps that include one-time work


@dataclass(frozen=True)
class Beat:
    """The last that is known of a trainer."""

    phase: str = "start"
    steps: int = 0
    planned_s: float = 0.0
    longest_s: float = 0.0
    error: str = ""
    code: int | None = None

    def limit_s(self, limits: Mapping[str, float] = LIMITS) -> float:
        """Seconds that may pass until the next one."""
        if self.phase != "step":
            return limits.get(self.phase, limits["start"])
        if self.steps < FIRST:
            return limits["first"]
        return max(limits["least"], limits["times"] * max(self.planned_s, self.longest_s))


class Heartbeat:
    """The trainer's end of the pipe; without a supervisor it does nothing.

    Args:
        pipe, stacks: descriptors that the supervisor opened: lines go into the first, stacks into the other.
        waited_s: how long the supervisor had no trainer before this one.
    """

    def __init__(self, pipe: int = -1, stacks: int = -1, waited_s: float = 0.0) -> None:
        self._pipe, self.waited_s, self.began = pipe, waited_s, time.perf_counter()
        self._phase, self._steps, self._longest_s, self._sent = "start", 0, 0.0, 0.0
        self.planned_s = 0.0
        if pipe >= 0:
            os.set_blocking(pipe, False)
            faulthandler.register(DUMP, file=stacks, all_threads=True)
            self._send()

    @property
    def is_on(self) -> bool:
        """True under a supervisor."""
        return self._pipe >= 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Says that the block is this phase, then that the one before goes on."""
        before, self._phase = self._phase, name
        self._send()
        try:
            yield
        finally:
            self._phase = before
            self._send()

    def step(self, steps: int, longest_s: float) -> None:
        """Says that a step, or a batch of an evaluation, is done."""
        self._steps, self._longest_s = steps, longest_s
        if time.monotonic() - self._sent > EVERY_S or steps <= FIRST:
            self._send()

    def error(self, line: str, code: int) -> None:
        """Says that this process is ending, and why."""
        self._send(error=line, code=code)

    def _send(self, **fields: Any) -> None:
        if not self.is_on:
            return
        self._sent = time.monotonic()
        beat = Beat(self._phase, self._steps, self.planned_s, self._longest_s, **fields)
        with contextlib.suppress(OSError):  # full, as the supervisor is stopped, or it is gone
            os.write(self._pipe, (json.dumps(vars(beat)) + "\n").encode()[:4000])
