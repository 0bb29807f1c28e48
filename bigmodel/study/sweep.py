"""A study: many runs of one config, as ordinary workdirs in one directory, their state in Optuna's storage.

The same command goes on where a study was stopped or killed: what is done is not run again, a run that was
cut off resumes from its checkpoint, and several hosts may work on one study that they share.
"""

from __future__ import annotations

import json
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from bigmodel import disk
from bigmodel.config import InputError
from bigmodel.study import trials
from bigmodel.study.order import Definition
from bigmodel.study.trials import Settings, Space

SEEDS = 1_000_003  # a prime: trials of studies with other seeds draw other numbers
BEAT_S, DEAD_S = 10.0, 60.0  # how often a host says that its trial is alive; when others may take it over
HANDSHAKE_S = 1.0  # between hosts that share a database and not the directory, where a lock is


@dataclass(frozen=True)
class Row:
    """One trial as it stands."""

    name: str
    settings: Settings
    state: str  # complete, pruned, diverged, failed, running, waiting
    value: float | None
    directory: pathlib.Path


class Study:
    """Trials in a directory."""

    def __init__(
        self, directory: pathlib.Path, definition: Definition, space: Space, storage: str = ""
    ) -> None:
        """Opens a study, or makes it.

        Args:
            storage: a URL that Optuna knows; "": SQLite's `study.db` in the directory; "journal": the file
                `study.journal` there, which hosts may share over a network's file system.

        Raises:
            InputError: the directory holds another study, or the storage cannot be opened.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.directory, self.definition, self.space = directory, definition, space
        self.over_network = storage not in ("", "journal")
        directory.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self.study = self._open(storage)
            self._agree()

    def _open(self, storage: str, tries: int = 3) -> Any:
        import optuna

        try:
            return optuna.create_study(
                study_name=self.directory.resolve().name,
                storage=_storage(self.directory, storage),
                load_if_exists=True,
                pruner=self._pruner(),
                direction="maximize" if self.definition.maximize else "minimize",
            )
        except InputError:
            raise
        except Exception as error:  # SQLAlchemy's and each database's own
            said = " ".join(str(error).split())
            if tries > 1 and "exists" in said:  # another host makes the tables at this moment
                time.sleep(HANDSHAKE_S)
                return self._open(storage, tries - 1)
            raise InputError(f"--storage={storage or 'study.db'}: cannot be opened ({said[:200]})") from error

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

    def _locked(self) -> AbstractContextManager[None]:
        """Keeps other processes off the study's list of trials; hosts too, where the directory is shared."""
        return disk.locked(self.directory / "study.lock")

    def enqueue(self, grid: Sequence[Settings]) -> None:
        """Adds the trials of a grid that the study does not have yet, in order."""
        with self._locked():
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
        """Claims a trial to run now: one whose host died, else a new one; None when all have begun.

        Args:
            count: trials of a search, in all.
        """
        with self._locked():
            trial = self._taken_over() or self._new(count)
            if trial is not None:
                beat(trial)
            return trial

    def _taken_over(self) -> Any | None:
        import optuna

        for frozen in self._running():
            if self._is_alive(frozen):
                continue
            trial = optuna.trial.Trial(self.study, frozen._trial_id)
            if "name" not in frozen.user_attrs:  # killed before it had one
                self.study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
            elif not self.over_network or self._shakes_hands(trial):
                return trial
        return None

    def _new(self, count: int) -> Any | None:
        import optuna

        waiting = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
        begun = [row for row in self.rows() if row.state != "waiting"]
        if not waiting and (not self.definition.sampler or len(begun) >= count):
            return None
        # A sampler with a seed for each trial proposes the same whether or not the study was stopped before.
        number = len(self.study.get_trials(deepcopy=False))
        kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        kind = kinds.get(self.definition.sampler, optuna.samplers.RandomSampler)
        self.study.sampler = kind(seed=self.definition.seed * SEEDS + number)
        trial = self.study.ask()
        while trial.user_attrs.get("name") in {row.name for row in begun}:  # enqueued by two hosts at once
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            if not self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
                return None
            trial = self.study.ask()
        if "name" not in trial.user_attrs:  # not one of a grid
            settings = self._suggest(trial)
            trial.set_user_attr("settings", settings)
            trial.set_user_attr("name", f"{trial.number:04d},{trials.name(settings)}")
        return trial

    def _running(self) -> list[Any]:
        import optuna

        return self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))

    def _shakes_hands(self, trial: Any) -> bool:
        """True if no other host took the trial over at the same time."""
        token = secrets.token_hex(8)
        trial.set_user_attr("owner", _owner() | {"token": token})
        time.sleep(HANDSHAKE_S)
        (now,) = [each for each in self.study.get_trials(deepcopy=False) if each.number == trial.number]
        return bool(now.user_attrs["owner"].get("token") == token)

    def _is_alive(self, frozen: Any) -> bool:
        """True if the host that runs a trial has said so lately, or, on this host, has a process."""
        owner = frozen.user_attrs.get("owner")
        if owner is None:  # its host has claimed it this moment, or was killed in it
            began = frozen.datetime_start
            return self.over_network and began is not None and time.time() - began.timestamp() < DEAD_S
        if not owner:  # it was released
            return False
        if owner["host"] == socket.gethostname() and not pathlib.Path(f"/proc/{owner['pid']}").exists():
            return False
        return bool(time.time() - owner["time"] < DEAD_S)

    def left(self, count: int) -> int:
        """The number of trials that have not ended, or not begun. `count`: of a search, in all."""
        rows = self.rows()
        return max(count - len(rows), 0) + sum(row.state in ("waiting", "running") for row in rows)

    def silent(self) -> list[str]:
        """Names of running trials whose host has been silent: in DEAD_S they can be taken over."""
        found = []
        for frozen in self._running():
            owner = frozen.user_attrs.get("owner")
            if "name" in frozen.user_attrs and (not owner or time.time() - owner["time"] > 2 * BEAT_S):
                found.append(frozen.user_attrs["name"])
        return found

    def end(self, trial: Any, state: str, value: float | None) -> None:
        """Notes how a trial ended: complete, pruned, diverged or failed."""
        import optuna

        kinds = {"pruned": optuna.trial.TrialState.PRUNED, "failed": optuna.trial.TrialState.FAIL}
        trial.set_user_attr("state", state)
        kind = kinds.get(state, optuna.trial.TrialState.COMPLETE)
        self.study.tell(trial.number, None if state in kinds else value, state=kind)

    def _suggest(self, trial: Any) -> Settings:
        settings = {key: str(trial.suggest_categorical(key, list(v))) for key, v in self.space.values.items()}
        for key, each in self.space.ranges.items():
            if each.integer:
                settings[key] = str(trial.suggest_int(key, int(each.low), int(each.high), log=each.log))
            else:
                settings[key] = f"{trial.suggest_float(key, each.low, each.high, log=each.log):.6g}"
        return settings


def _storage(directory: pathlib.Path, storage: str) -> Any:
    import optuna

    journal, database = directory / "study.journal", directory / "study.db"
    if storage not in ("", "journal"):
        return storage
    if storage == "journal" and database.exists():
        raise InputError(
            f"{database} is SQLite's, which hosts cannot share safely; give another --study, or --storage=URL"
        )
    if storage == "journal" or journal.exists():
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    return f"sqlite:///{database.resolve()}"


def reach(url: str) -> None:
    """Raises InputError if a database does not answer."""
    import optuna

    try:
        optuna.storages.get_storage(url)
    except Exception as error:  # SQLAlchemy's and each database's own
        raise InputError(
            f"--storage={url}: cannot be opened ({' '.join(str(error).split())[:200]})"
        ) from error


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}


def beat(trial: Any) -> None:
    """Says that a trial is alive, and that this process runs it."""
    trial.set_user_attr("owner", _owner())


def release(trial: Any) -> None:
    """Gives a trial up: another command may go on with it at once."""
    trial.set_user_attr("owner", {})
