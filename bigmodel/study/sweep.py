"""A study: many runs of one config, as ordinary workdirs in one directory, their state in Optuna's storage.

The same command goes on where a study was stopped or killed: what is done is not run again, a run that was
cut off resumes from its checkpoint, and several hosts may work on one study that they share.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigmodel import log, workdir
from bigmodel.config import InputError
from bigmodel.machines import processes
from bigmodel.study import price, trials
from bigmodel.study.price import Price
from bigmodel.study.trials import Settings, Space
from bigmodel.units import Cap

STOPPED = (75, 130)  # exit codes of a run that will resume
DIVERGED = 3
POLL_S = 0.2
BEAT_S, DEAD_S = 10.0, 60.0  # how often a host says that its trial is alive; when others may take it over
SAMPLERS = ("tpe", "random")
PRUNERS = ("none", "median", "halving")


@dataclass(frozen=True)
class Definition:
    """The parts of a study that stay as they are from one command to the next."""

    config: str  # FILE[:ARGS]
    overrides: tuple[str, ...]  # of every trial
    metric: str  # of an evaluation, such as eval/test/loss
    maximize: bool
    sampler: str = ""  # "": a grid
    space: tuple[str, ...] = ()  # of a search, as --over gives it; a grid may grow
    prune: str = "none"

    def __post_init__(self) -> None:
        for flag, value, known in (("search", self.sampler, ("", *SAMPLERS)), ("prune", self.prune, PRUNERS)):
            if value not in known:
                raise InputError(f"--{flag}={value} is unknown; choose of {', '.join(filter(None, known))}")


@dataclass(frozen=True)
class Row:
    """One trial as it stands."""

    name: str
    settings: Settings
    state: str  # complete, pruned, diverged, failed, running, waiting
    value: float | None
    directory: pathlib.Path


@dataclass
class _Job:
    trial: Any  # an optuna.Trial
    name: str
    directory: pathlib.Path
    process: subprocess.Popen[bytes]
    reported: int = -1  # the step of the last evaluation that the pruner knows
    beat: float = 0.0
    pruned: bool = False


class Study:
    """Trials in a directory."""

    def __init__(
        self, directory: pathlib.Path, definition: Definition, space: Space, storage: str = ""
    ) -> None:
        """Opens a study, or makes it.

        Args:
            storage: a URL that Optuna knows; "": `study.db` in the directory.

        Raises:
            InputError: the directory holds another study, or the storage cannot be opened.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.directory, self.definition, self.space = directory, definition, space
        directory.mkdir(parents=True, exist_ok=True)
        url = storage or f"sqlite:///{directory.resolve()}/study.db"
        try:
            self.study = optuna.create_study(
                study_name=directory.resolve().name, storage=url, load_if_exists=True, pruner=self._pruner(),
                direction="maximize" if definition.maximize else "minimize",
            )  # fmt: skip
        except Exception as error:  # SQLAlchemy's and each database's own
            said = " ".join(str(error).split())[:200]
            raise InputError(f"--storage={url}: cannot be opened ({said})") from error
        self._agree()

    def _agree(self) -> None:
        """Refuses to go on as another study."""
        now = json.loads(json.dumps(vars(self.definition)))
        then = self.study.user_attrs.get("definition")
        if then is None:
            then = now
            self.study.set_user_attr("definition", now)
        for key in [key for key in now if now[key] != then.get(key)]:
            raise InputError(
                f"{self.directory} is a study with {key} {then.get(key)!r}, not {now[key]!r}; "
                "give the same command, or another --study"
            )

    def _pruner(self) -> Any:
        import optuna

        kinds: dict[str, Callable[[], Any]] = {
            "none": optuna.pruners.NopPruner,
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4),
            "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_early_stopping_rate=0),
        }
        return kinds[self.definition.prune]()

    def enqueue(self, grid: Sequence[Settings]) -> None:
        """Adds the trials of a grid that the study does not have yet, in order."""
        known = {each.user_attrs.get("name") for each in self.study.get_trials(deepcopy=False)}
        for settings in grid:
            name = trials.name(settings)
            if name not in known:
                self.study.enqueue_trial({}, user_attrs={"name": name, "settings": settings})

    def rows(self) -> list[Row]:
        """Every trial that has begun or waits, in the order in which they were made."""
        found = {}
        for each in self.study.get_trials(deepcopy=False):
            attrs = each.user_attrs
            if "name" in attrs and attrs["name"] not in found:
                state = attrs.get("state", each.state.name.lower())
                found[attrs["name"]] = Row(
                    attrs["name"], attrs["settings"], state, each.value, self.directory / attrs["name"]
                )
        return list(found.values())

    def results(self) -> list[tuple[Settings, float]]:
        """Settings and values of the trials that ended by themselves; one that diverged has the worst."""
        rows = [row for row in self.rows() if row.state in ("complete", "diverged")]
        return [(row.settings, row.value) for row in rows if row.value is not None]

    # ------------------------------------------------------------------------------------------- the next one

    def next_trial(self, count: int) -> Any | None:
        """A trial to run now: one whose host died, else a new one; None when all have begun.

        Args:
            count: trials of a search, in all.
        """
        import optuna

        state = optuna.trial.TrialState
        for frozen in self.study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            if not _is_alive(frozen.user_attrs):
                trial = optuna.trial.Trial(self.study, frozen._trial_id)
                if "name" in frozen.user_attrs:
                    return trial
                self.study.tell(frozen.number, state=state.FAIL)  # killed before it had a name
        waiting = self.study.get_trials(deepcopy=False, states=(state.WAITING,))
        begun = [row for row in self.rows() if row.state != "waiting"]
        if not waiting and (not self.definition.sampler or len(begun) >= count):
            return None
        # A sampler with a seed for each trial proposes the same whether or not the study was stopped before.
        number = len(self.study.get_trials(deepcopy=False))
        kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        self.study.sampler = kinds.get(self.definition.sampler, optuna.samplers.RandomSampler)(seed=number)
        trial = self.study.ask()
        if "name" not in trial.user_attrs:  # not one of a grid
            settings = self._suggest(trial)
            trial.set_user_attr("settings", settings)
            trial.set_user_attr("name", f"{trial.number:04d},{trials.name(settings)}")
        return trial

    def _suggest(self, trial: Any) -> Settings:
        settings = {key: str(trial.suggest_categorical(key, list(v))) for key, v in self.space.values.items()}
        for key, each in self.space.ranges.items():
            if each.integer:
                settings[key] = str(trial.suggest_int(key, int(each.low), int(each.high), log=each.log))
            else:
                settings[key] = f"{trial.suggest_float(key, each.low, each.high, log=each.log):.6g}"
        return settings


class Runner:
    """Runs the trials of a study as processes of this host, and stops where the cap is reached."""

    def __init__(
        self, study: Study, command: Sequence[str], pricer: Callable[[Settings], Price], *, count: int = 0,
        jobs: int = 1, cap: Cap | None = None, pue: float = price.PUE,
    ) -> None:  # fmt: skip
        """Args:
        command: trains one trial; `--config.KEY=VALUE` and `--workdir=DIR` are added.
        pricer: the planned price of a trial's settings.
        count: trials of a search, in all.
        jobs: trials at a time.
        pue: power usage effectiveness, which `pricer` counts too.
        """
        self.study, self.command, self.pricer = study, command, pricer
        self.count, self.jobs, self.cap, self.pue = count, jobs, cap, pue
        self.running: list[_Job] = []
        self.unpaid: str = ""  # the first trial that the cap does not pay for
        self.stopping = threading.Event()

    def run(self) -> None:
        """Runs until all is done or the cap is reached, or `stopping` is set and the trials have stopped."""
        try:
            while True:
                while len(self.running) < self.jobs and not self.stopping.is_set() and self._start():
                    pass
                if not self.running:
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

    def _start(self) -> bool:
        if self.unpaid:
            return False
        trial = self.study.next_trial(self.count)
        if trial is None:
            return False
        name, settings = trial.user_attrs["name"], trial.user_attrs["settings"]
        if self.cap and self.committed(name).get(self.cap.key, 0.0) > self.cap.amount:
            self.unpaid = name
            _release(trial)
            return False
        trial.set_user_attr("owner", _owner())
        directory = self.study.directory / name
        overrides = [f"--config.{key}={value}" for key, value in settings.items()]
        directory.mkdir(parents=True, exist_ok=True)
        _await_free(directory)
        with (directory / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                processes.die_with_parent([*self.command, *overrides, f"--workdir={directory}"]),
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
            if time.monotonic() - job.beat > BEAT_S:
                job.trial.set_user_attr("owner", _owner())
                job.beat = time.monotonic()
            return
        self.running.remove(job)
        value = _values(job.directory, self.study.definition.metric)
        last = value[-1][1] if value else None
        if job.pruned:
            self._tell(job, "pruned", last)
        elif code == 0:
            if last is None:
                _release(job.trial)
                raise InputError(self._no_metric(job))
            self._tell(job, "complete", last)
        elif code == DIVERGED:
            self._tell(job, "diverged", -math.inf if self.study.definition.maximize else math.inf)
        elif code in STOPPED or code < 0:
            log.say(f"trial     {job.name} was stopped; the same command resumes it")
            _release(job.trial)
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
        import optuna

        kinds = {"pruned": optuna.trial.TrialState.PRUNED, "failed": optuna.trial.TrialState.FAIL}
        job.trial.set_user_attr("state", state)
        kind = kinds.get(state, optuna.trial.TrialState.COMPLETE)
        self.study.study.tell(job.trial.number, None if state in kinds else value, state=kind)
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
    until = time.monotonic() + DEAD_S
    while time.monotonic() < until:
        with contextlib.suppress(InputError), workdir.claim(directory):
            return
        time.sleep(POLL_S)


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}


def _release(trial: Any) -> None:
    """Gives a trial up: another command may go on with it at once."""
    trial.set_user_attr("owner", {})


def _is_alive(attrs: Mapping[str, Any]) -> bool:
    """True if the host that runs a trial has said so lately, or, on this host, has a process."""
    owner = attrs.get("owner")
    if not owner:
        return False
    if owner["host"] == socket.gethostname() and not pathlib.Path(f"/proc/{owner['pid']}").exists():
        return False
    return bool(time.time() - owner["time"] < DEAD_S)
