"""Reports: which runs a page is about, what differs between them, and where it is written."""

from __future__ import annotations

import logging
import pathlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigmodel import disk
from bigmodel.config import InputError
from bigmodel.study import page as pages
from bigmodel.study import record, trials
from bigmodel.study.order import LOWER
from bigmodel.study.page import Page
from bigmodel.study.record import Record, number
from bigmodel.study.trials import Settings

log = logging.getLogger("bigmodel")

AT_END = 20_000  # lines of metrics.jsonl that are read when a run ends


@dataclass(frozen=True)
class Trials:
    """A study as its storage has it."""

    metric: str
    maximize: bool
    settings: dict[str, Settings]  # by the trial's name
    states: dict[str, str]


@dataclass(frozen=True)
class Options:
    """Choices for a page."""

    metric: str = ""  # that ranks several runs; a leading -: the lowest is best; "": the study's, or a loss
    most: int = 0  # lines of each metrics.jsonl to read, about; 0: all
    dollars_per_chip_hour: float | None = None


def save(page: Page, out: pathlib.Path) -> None:
    """Writes a page. Raises InputError where plotly is not installed, or `out` cannot be written."""
    content = pages.render(page).encode()
    disk.write_atomically(out, lambda file: file.write(content), "make room, or give another --out")


def write_at_end(directory: pathlib.Path, study: Any = None) -> None:
    """Writes report.html into the directory of a run or a study that ends; any fault is a warning.

    Args:
        study: the optuna.Study of a study.
    """
    try:
        found = None if study is None else trials_of(study)
        save(collect([directory], Options(most=AT_END), found), directory / "report.html")
        log.info("report    %s", directory / "report.html")
    except Exception as error:  # a page must not change how a run ends
        said = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning("%s is not written (%.300s)", directory / "report.html", said)


# ---------------------------------------------------------------------------------------------- the runs


def collect(
    sources: Sequence[pathlib.Path], options: Options | None = None, study: Trials | None = None
) -> Page:
    """Reads the runs of a page.

    Args:
        sources: workdirs, and directories of them, such as a study's.
        study: the trials of a study whose storage is not in its directory.

    Raises:
        InputError: a source has no run, or no run has the metric.
    """
    options = options or Options()
    notes: list[str] = []
    paths: list[pathlib.Path] = []
    for source in sources:
        found = _workdirs(source)
        study = study or _study(source, notes)
        if not found and study is None:
            raise InputError(
                f"{source} has neither a run nor runs inside; give workdirs that train.py made, or a study"
            )
        paths += [path for path in found if path not in paths]
    names = _names(paths)
    records = [
        record.read(path, name, most=options.most, dollars_per_chip_hour=options.dollars_per_chip_hour)
        for path, name in zip(paths, names, strict=True)
    ]
    metric, maximize = _metric(records, options.metric, study)
    title = records[0].name if len(records) == 1 else " and ".join(s.resolve().name for s in sources[:3])
    title += f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    page = Page(title, records, metric, maximize, _settings(records, study), [], notes)
    page.states.extend((study.states.get(r.path.name) if study else None) or state(r) for r in records)
    if study:
        never = [name for name in study.states if name not in {r.path.name for r in records}]
        if never:
            notes.append(
                f"{len(never)} trials have not begun: {', '.join(never[:5])}{' ...' * (len(never) > 5)}"
            )
    return page


def _workdirs(source: pathlib.Path) -> list[pathlib.Path]:
    """The run in a directory, or those in the directories inside it."""
    marks = ("config.json", "metrics.jsonl")
    if any((source / mark).exists() for mark in marks):
        return [source]
    return sorted({path.parent for mark in marks for path in source.glob(f"*/{mark}")})


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """Shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names if parts else []


def _study(directory: pathlib.Path, notes: list[str]) -> Trials | None:
    """The trials in a study's own storage; None where it has none, or it cannot be read, which is noted."""
    database, journal = directory / "study.db", directory / "study.journal"
    if not database.exists() and not journal.exists():
        return None
    try:
        import optuna
        from optuna.storages import journal as journals

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if journal.exists():
            storage: Any = optuna.storages.JournalStorage(journals.JournalFileBackend(str(journal)))
        else:
            storage = f"sqlite:///{database.resolve()}"
        return trials_of(optuna.load_study(study_name=None, storage=storage))
    except Exception as error:  # not installed; SQLAlchemy's own; a study of something else
        said = " ".join(f"{type(error).__name__}: {error}".split())
        notes.append(f"the study's storage cannot be read ({said:.160}): states are those of the workdirs")
        return None


def trials_of(study: Any) -> Trials:
    """Reads an optuna.Study that `sweep.Study` made."""
    definition = study.user_attrs["definition"]
    rows = [each for each in study.get_trials(deepcopy=False) if "name" in each.user_attrs]
    states = {each.user_attrs["name"]: each.user_attrs.get("state", each.state.name.lower()) for each in rows}
    settings = {each.user_attrs["name"]: each.user_attrs["settings"] for each in rows}
    return Trials(definition["metric"], definition["maximize"], settings, states)


def state(run: Record) -> str:
    """`complete`, `diverged`, or how far the run came."""
    losses = [row["train/loss"] for row in run.rows[-3:] if "train/loss" in row]
    if losses and number({"loss": losses[-1]}, "loss") is None:
        return "diverged"
    if run.ended == "done":  # by eval.patience, a callback or its budget, too
        return "complete"
    if run.ends_at is None or not run.rows:
        return f"step {run.step:,}" if run.rows else "no step"
    return "complete" if run.step >= run.ends_at else f"step {run.step:,} of {run.ends_at:,}"


def _metric(records: Sequence[Record], given: str, study: Trials | None) -> tuple[str, bool]:
    if given:
        metric = given.lstrip("-")
        if not any(metric in row for run in records for row in run.rows):
            names = dict.fromkeys(name for run in records for row in run.rows for name in row if "/" in name)
            raise InputError(f"--metric={given} is in no run; choose one of {', '.join(names) or 'none'}")
        return metric, not given.startswith("-") and not LOWER.search(metric)
    if study:
        return study.metric, study.maximize
    counts = Counter(name for run in records for name in {name for row in run.rows for name in row})
    for pattern in ("eval/*/loss", "eval/*", "train/loss"):
        found = [name for name in counts if pathlib.PurePath(name).match(pattern)]
        if found:
            metric = max(found, key=lambda name: counts[name])
            return metric, not LOWER.search(metric)
    return "", False


def _settings(records: Sequence[Record], study: Trials | None) -> list[Settings]:
    """Keys of the configs that differ, by run; of a study, those that it varies."""
    keys = dict.fromkeys(key for run in records for key in run.config)
    texts = {key: [trials.as_text(run.config.get(key, "")) for run in records] for key in keys}
    if study:
        varied = dict.fromkeys(key for each in study.settings.values() for key in each)
        chosen = [study.settings.get(run.path.name) for run in records]
        return [
            {
                key: texts[key][n] if each is None and key in texts else (each or {}).get(key, "")
                for key in varied
            }
            for n, each in enumerate(chosen)
        ]
    differing = [key for key, values in texts.items() if len(set(values)) > 1]
    return [{key: texts[key][n] for key in differing} for n in range(len(records))]
