"""Runs the trials of a study as processes of this host, and stops where the cap is reached."""

from __future__ import annotations

import contextlib
import math
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bigmodel import log, workdir
from bigmodel.config import InputError
from bigmodel.machines import processes
from bigmodel.study import price, sweep
from bigmodel.study.price import Price
from bigmodel.study.sweep import Row, Study
from bigmodel.study.trials import Settings
from bigmodel.units import Cap

STOPPED = (75, 130)  # exit codes of a run that will resume
DIVERGED = 3
POLL_S = 0.2


@dataclass
class _Job:
    trial: Any  # an optuna.Trial
    name: str
    directory: pathlib.Path
    process: subprocess.Popen[bytes]
    reported: int = -1  # the step of the last evaluation that the pruner knows
    beat: float = 0.0
    pruned: bool = False


class Runner:
    """Runs the trials of a study as processes of this host, and stops where the cap is reached."""

    def __init__(
        self,
        study: Study,
        command: Callable[[Settings], list[str]],
        pricer: Callable[[Settings], Price],
        *,
        count: int = 0,
        jobs: int = 1,
        cap: Cap | None = None,
        limit: int | None = None,
        pue: float = price.PUE,
    ) -> None:
        """Args:
        command: trains one trial; `--workdir=DIR` is added.
        pricer: the planned price of a trial's settings.
        count: trials of a search, in all.
        jobs: trials at a time.
        limit: trials that this runner begins, at most.
        pue: power usage effectiveness, which `pricer` counts too.
        """
        self.study, self.command, self.pricer = study, command, pricer
        self.count, self.jobs, self.cap, self.pue = count, jobs, cap, pue
        self.limit = math.inf if limit is None else limit
        self.begun = 0
        self.running: list[_Job] = []
        self.ended: dict[str, str] = {}  # the trials that ended here -> their state
        self.unpaid: str = ""  # the first trial that the cap does not pay for
        self.stopping = threading.Event()

    def run(self) -> None:
        """Runs until all is done or the cap is reached, or `stopping` is set and the trials have stopped."""
        try:
            while True:
                while len(self.running) < self.jobs and not self.stopping.is_set() and self._start():
                    pass
                if not self.running and (self.stopping.is_set() or self._done() or not self.study.silent()):
                    return
                for job in list(self.running):
                    self._look_after(job)
                self.stopping.wait(POLL_S) if not self.stopping.is_set() else time.sleep(POLL_S)
                if self.stopping.is_set():
                    self._stop_all()
        finally:
            self._stop_all()

    def spent(self) -> Price:
        """The price of all that ran, by the ledgers."""
        return price.total([found for row in self.study.rows() if (found := self._spent(row))])

    def _spent(self, row: Row) -> Price:
        return price.spent(row.directory, self.pricer(row.settings), self.pue)

    def committed(self, name: str) -> Price:
        """The price of all that ran, runs here or on other hosts, and of the trial `name`.

        A trial that has not ended costs the plan and `beyond_plan`, or what it spent if that is more.
        """
        beyond, prices = self.beyond_plan(), []
        for row in self.study.rows():
            so_far = self._spent(row)
            if row.state == "running" or row.name == name:
                planned = self.pricer(row.settings)
                so_far = {
                    key: max(value + beyond.get(key, 0.0), so_far.get(key, 0.0))
                    for key, value in planned.items()
                }
            if so_far:
                prices.append(so_far)
        return price.total(prices)

    def beyond_plan(self) -> Price:
        """The mean price of a finished trial beyond its steps: starting, compiling, evaluating, saving."""
        extra = []
        for row in self.study.rows():
            if row.state == "complete":
                planned, spent = self.pricer(row.settings), self._spent(row)
                extra.append({key: spent.get(key, value) - value for key, value in planned.items()})
        return {key: value / len(extra) for key, value in price.total(extra).items()}

    def _done(self) -> bool:
        return bool(self.unpaid) or self.begun >= self.limit

    def _start(self) -> bool:
        if self._done():
            return False
        trial = self.study.next_trial(self.count)
        if trial is None:
            return False
        name, settings = trial.user_attrs["name"], trial.user_attrs["settings"]
        if self.cap and self.committed(name).get(self.cap.key, 0.0) > self.cap.amount:
            self.unpaid = name
            sweep.release(trial)
            return False
        self.begun += 1
        directory = self.study.directory / name
        directory.mkdir(parents=True, exist_ok=True)
        _await_free(directory)
        with (directory / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                processes.die_with_parent([*self.command(settings), f"--workdir={directory}"]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        log.say(f"trial     {name} has begun")
        self.running.append(_Job(trial, name, directory, process))
        return True

    def _look_after(self, job: _Job) -> None:
        """Reports a trial's evaluations, stops it where the pruner says so, and notes how it ended."""
        code = job.process.poll()
        self._report(job)
        if code is None:
            if time.monotonic() - job.beat > sweep.BEAT_S:
                sweep.beat(job.trial)
                job.beat = time.monotonic()
            return
        self.running.remove(job)
        value = _values(job.directory, self.study.definition.metric)
        last = value[-1][1] if value else None
        if job.pruned:
            self._tell(job, "pruned", last)
        elif code == 0:
            if last is None:
                sweep.release(job.trial)
                raise InputError(self._no_metric(job))
            self._tell(job, "complete", last)
        elif code == DIVERGED:
            self._tell(job, "diverged", -math.inf if self.study.definition.maximize else math.inf)
        elif code in STOPPED or code < 0:
            log.say(f"trial     {job.name} was stopped; the same command resumes it")
            sweep.release(job.trial)
            self.stopping.set()
        else:
            self._tell(job, "failed", None)

    def _no_metric(self, job: _Job) -> str:
        known = ", ".join(log.last_evaluation(job.directory)) or "no evaluation"
        metric = self.study.definition.metric
        return f"trial {job.name} has no {metric}, but {known}; choose one by --metric, with another --study"

    def _report(self, job: _Job) -> None:
        for step, value in _values(job.directory, self.study.definition.metric):
            if step > job.reported:
                job.reported = step
                with contextlib.suppress(ValueError):  # reported before the study was killed
                    job.trial.report(value, step)
                if not job.pruned and job.trial.should_prune():
                    job.pruned = True
                    job.process.send_signal(signal.SIGTERM)

    def _tell(self, job: _Job, state: str, value: float | None) -> None:
        self.study.end(job.trial, state, value)
        self.ended[job.name] = state
        said = "" if value is None else f", {self.study.definition.metric} {value:.6g}"
        hint = f"; its output: {job.directory / 'output.txt'}" if state in ("failed", "diverged") else ""
        log.say(f"trial     {job.name} is {state}{said}{hint}")

    def _stop_all(self) -> None:
        for job in self.running:
            job.process.send_signal(signal.SIGTERM)
        for job in list(self.running):
            job.process.wait()
            self._look_after(job)


def _values(directory: pathlib.Path, metric: str) -> list[tuple[int, float]]:
    """The steps and values of a metric that a run has logged."""
    if not (directory / "metrics.jsonl").exists():
        return []
    rows = log.read_metrics(directory)
    return [(int(row["step"]), float(row[metric])) for row in rows if row.get(metric) is not None]


def _await_free(directory: pathlib.Path) -> None:
    """Waits for a run that was told to stop when its study was killed, and is saving still."""
    until = time.monotonic() + sweep.DEAD_S
    while time.monotonic() < until:
        with contextlib.suppress(InputError), workdir.claim(directory):
            return
        time.sleep(POLL_S)
