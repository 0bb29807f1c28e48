"""Decisions of a job's leader: when an attempt starts, when it ends on all hosts, and if another follows."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bigmodel.fleet.board import Order, Report

# Exit codes after which no attempt follows: done, bad input, diverged, wrong program, SIGTERM, Ctrl-C. They
# are those of bigmodel/train.py, which a supervisor cannot import: it starts without JAX.
DONE, GAVE_UP, STOPPED = 0, 1, (75, 130)
FINAL = (2, 3, 4, *STOPPED)
SETTLE_S = 1.5  # after a first failure, for the other hosts' reports
GRACE_S = 3.0  # for trainers whose job has failed
SAVING_S = 120.0  # for trainers that save, as their job was stopped
WAIT_S = 600.0  # for hosts to come
FIRST_S = 300.0  # for hosts to come to the first attempt of an elastic job: they are still being launched
MOST_BACKOFF_S = 60.0


@dataclass(frozen=True)
class Policy:
    """The choices of whoever launched the job."""

    restarts: int = 5  # attempts that follow each other without a newer checkpoint
    elastic_s: float | None = None  # seconds to wait for missing hosts to come back; then without them
    address: str = ""  # of JAX's coordinator on the leader's host


class Leader:
    """Turns the hosts' reports into orders.

    Args:
        newest: the newest checkpoint's step at launch, if there is one.
    """

    def __init__(self, hosts: int, policy: Policy, now: float, newest: int | None = None) -> None:
        self._hosts, self._policy = range(hosts), policy
        self.order = Order("wait", 0)
        self.failures, self.backoff_s, self.newest = 0, 0.0, newest
        self._since, self._failed_at = now, float("inf")

    def decide(
        self, reports: Mapping[int, Report | None], newest: Callable[[], int | None], now: float
    ) -> Order:
        """Returns the order in force from now on.

        Args:
            reports: of every host, also the leader's own; None for a host that is lost or has not come.
            newest: gives the newest checkpoint's step.
        """
        self._newest_step = newest
        decide = {"wait": self._gather, "go": self._watch, "end": self._follow}[self.order.kind]
        decide(reports, now)
        return self.order

    def _gather(self, reports: Mapping[int, Report | None], now: float) -> None:
        attempt, waited_s = self.order.attempt, now - self._since
        here = {i: report for i, report in reports.items() if report and report.attempt == attempt}
        for i, report in here.items():
            if report.doing == "ended" and report.code is not None:  # by a signal
                self._end(i, report.code, report.line, True)
                return
        ready = tuple(sorted(i for i, report in here.items() if report.doing == "ready"))
        missing = [i for i in self._hosts if i not in ready]
        patience_s = float("inf") if self._policy.elastic_s is None else self._policy.elastic_s
        if not attempt:
            patience_s = max(patience_s, FIRST_S)
        if waited_s < self.backoff_s:
            return
        if not missing or (waited_s > self.backoff_s + patience_s and 0 in ready):
            self._failed_at = float("inf")
            address = self._policy.address if missing else ""
            self.order = Order("go", attempt, ready, address=address)
        elif waited_s > WAIT_S:
            names = ", ".join(map(str, missing))
            self._end(missing[0], STOPPED[0], f"host {names} did not come within {WAIT_S:.0f} s", True)

    def _watch(self, reports: Mapping[int, Report | None], now: float) -> None:
        attempt = self.order.attempt
        ended: dict[int, tuple[int | None, str]] = {}  # host -> code (None: lost), line
        for i in self.order.members:
            report = reports.get(i)
            if report is None or report.attempt != attempt:
                ended[i] = (None, f"host {i} is lost: nothing was heard of it, or it was launched anew")
            elif report.doing == "ended":
                ended[i] = (report.code, report.line)
        bad = {i: each for i, each in ended.items() if each[0] != DONE}
        everybody = len(ended) == len(self.order.members)
        if not bad:
            if everybody:
                self._end(0, DONE, "done", True)
            return
        self._failed_at = min(self._failed_at, now)
        if everybody or now - self._failed_at >= SETTLE_S:
            host = min(bad, key=lambda i: (_rank(bad[i][0]), i))
            self._judge(host, *bad[host])

    def _judge(self, host: int, code: int | None, line: str) -> None:
        """Ends the attempt that failed on `host`."""
        if code in FINAL:
            self._end(host, code, line, True, SAVING_S if code in STOPPED else GRACE_S)
            return
        before, self.newest = self.newest, self._newest_step()
        progressed = self.newest is not None and (before is None or self.newest > before)
        self.failures = 1 if progressed else self.failures + 1
        self.backoff_s = min(2.0 ** (self.failures - 1), MOST_BACKOFF_S)
        if self.failures > self._policy.restarts:
            where = "none" if self.newest is None else f"step {self.newest}"
            line = (
                f"gave up after {self._policy.restarts} restarts without a newer checkpoint "
                f"(newest: {where}); the last failure: {line}"
            )
            self._end(host, GAVE_UP, line, True, GRACE_S)
        else:
            self._end(host, code if code is not None else -signal.SIGKILL, line, False, GRACE_S)

    def _end(self, host: int, code: int, line: str, final: bool, grace_s: float = GRACE_S) -> None:
        self.order = Order(
            "end", self.order.attempt, self.order.members, code, line, host, final, grace_s=grace_s
        )
        self._failed_at = float("inf")

    def _follow(self, reports: Mapping[int, Report | None], now: float) -> None:
        """Gathers for the next attempt once every trainer of this one has ended."""
        if self.order.final:
            return
        self._failed_at = min(self._failed_at, now)
        late = now - self._failed_at > self.order.grace_s + WAIT_S / 10
        running = [i for i, report in reports.items() if report and report.doing == "running"]
        if not running or late:
            self.order, self._since = Order("wait", self.order.attempt + 1), now


def _rank(code: int | None) -> int:
    """Orders failures that came together by how likely each is to be the cause of the others.

    A killed host makes JAX abort the others (SIGABRT), or fail with an error of their own."""
    if code is not None and code < 0 and code != -signal.SIGABRT:
        return 0
    if code is None:
        return 1
    return 2 if code in FINAL else 3
