"""A workdir as its files tell it, read without changing them: any may be missing, damaged or cut short.

Nothing is computed here that a file does not say, and no config file is run.
"""

from __future__ import annotations

import base64
import calendar
import contextlib
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bigmodel import config as config_lib
from bigmodel import disk, log, units
from bigmodel.checkpoint.checkpoints import MARKER, STEP
from bigmodel.config import InputError
from bigmodel.plan import receipt as receipts
from bigmodel.study import price
from bigmodel.study.price import Price

PNG_BEGINS, PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
LARGEST_PICTURE = 3 << 20  # bytes
SAMPLES, SAMPLE_CHARACTERS = 4, 6000  # newest files, and how much of each
EVENTS = 200  # the newest


@dataclass(frozen=True)
class Record:
    """One run. `notes` says what is damaged or left out."""

    path: pathlib.Path
    name: str
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # by dotted key, as config.json has it
    own: frozenset[str] = frozenset()  # keys of it that are not as by default
    plan: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    events: list[dict[str, Any]] = field(default_factory=list)  # of events.jsonl
    planned: Price = field(default_factory=dict)
    spent: Price = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl, 0 without one."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def ends_at(self) -> int | None:
        """The step at which the newest session was to end."""
        sessions = [each for each in listed(self.plan, "sessions") if isinstance(each, dict)]
        last = sessions[-1] if sessions else {}
        first, count = number(last, "first_step"), number(last, "steps")
        if first is None or count is None:
            count = number(self.config, "steps")
            return None if count is None else int(count)
        return int(first + count)

    @property
    def ended(self) -> str:
        """The end of the newest session, as ledger.json says it; "" while it runs, and after a kill."""
        sessions = [each for each in listed(self.ledger, "sessions") if isinstance(each, dict)]
        last = sessions[-1] if sessions else {}
        began, total_s = number(last, "began_at"), number(last, "total_s")
        if began is None or total_s is None or _seconds(self.plan.get("made_at")) > began + total_s:
            return ""  # of an older version; or a newer session has made its plan
        return str(last.get("ended", ""))

    def last(self, metric: str) -> float | None:
        """The last value of a metric; None where it was not finite, or there is none."""
        for row in reversed(self.rows):
            if metric in row:
                return number(row, metric)
        return None


def read(
    path: pathlib.Path, name: str = "", *, most: int = 0, dollars_per_chip_hour: float | None = None
) -> Record:
    """Reads a run.

    Args:
        name: by which the page calls it; "": the directory's.
        most: lines of metrics.jsonl to read, about; 0: all.
        dollars_per_chip_hour: in place of the plan's.
    """
    notes: list[str] = []
    config = config_lib.flatten(_json(path / "config.json", notes, needed=True))
    plan, ledger = _json(path / "plan.json", notes), _json(path / "ledger.json", notes)
    planned = _planned(plan, dollars_per_chip_hour)
    spent = _spent(path, planned, ledger, dollars_per_chip_hour, notes) if ledger else {}
    rows = _rows(path / "metrics.jsonl", notes, most)
    if not rows:
        notes.append("metrics.jsonl has no line yet: no step was logged")
    return Record(
        path=path,
        name=name or path.resolve().name,
        notes=notes,
        config=config,
        own=_own(config),
        plan=plan,
        ledger=ledger,
        evaluation=_json(path / "evaluation.json", notes),
        rows=rows,
        events=_events(path / "events.jsonl", notes),
        planned=planned,
        spent=spent,
    )


def number(values: Mapping[str, Any], key: str) -> float | None:
    """A finite number, or None for anything else."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def _seconds(text: Any) -> float:
    """Seconds since 1970 of a plan's `made_at`; 0 for anything else."""
    with contextlib.suppress(ValueError, TypeError):
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    return 0.0


def group(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A dict, {} for anything else."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def listed(values: Mapping[str, Any], key: str) -> list[Any]:
    """A list, [] for anything else."""
    value = values.get(key)
    return value if isinstance(value, list) else []


def _json(path: pathlib.Path, notes: list[str], needed: bool = False) -> dict[str, Any]:
    try:
        return disk.read_json(path)
    except FileNotFoundError:
        if needed:
            notes.append(f"{path.name} is missing")
    except InputError as error:
        notes.append(str(error).replace(str(path), path.name))
    return {}


def _own(config: Mapping[str, Any]) -> frozenset[str]:
    """Keys that are not as this model and task have them by default; none for classes of the user's files."""
    names = {group: {"name": config.get(f"{group}.name", "")} for group in ("model", "task")}
    if any(":" in str(each["name"]) for each in names.values()):
        return frozenset()
    try:
        default = config_lib.flatten(config_lib.to_dict(config_lib.from_dict(names)))
    except InputError:  # of another version
        return frozenset()
    known = {key: default.get(key) for key in config if key in default or not key.startswith("task.")}
    return frozenset(key for key, value in known.items() if config[key] != value)


def _rows(path: pathlib.Path, notes: list[str], most: int) -> list[dict[str, Any]]:
    """The lines that count: of steps that were trained again only the last ones do."""
    try:
        found = log.read_lines(path, most)
    except InputError as error:
        notes.append(str(error))
        return []
    if found.bad:
        notes.append(f"metrics.jsonl is damaged in {log.numbered(found.bad)}; left out")
    if found.every > 1:
        notes.append(
            f"metrics.jsonl is long: evaluations and one line in {found.every} of the others were read; "
            "scripts/report.py reads all"
        )
    rows, first, names = [], math.inf, set[str]()  # names: of metrics at the step `first`
    for row in reversed(found.rows):
        metrics = row.keys() - {"step", "time"}
        if row["step"] < first or (row["step"] == first and not metrics & names):
            rows.append(row)
            names = metrics | (names if row["step"] == first else set())
            first = row["step"]
    if len(rows) < len(found.rows):
        count = len(found.rows) - len(rows)
        notes.append(f"{count:,} lines of metrics.jsonl are of steps that were trained again; left out")
    return rows[::-1]


def _planned(plan: Mapping[str, Any], dollars_per_chip_hour: float | None) -> Price:
    keys = ("total_s", "total_flops", "kwh", "dollars", "chip_hours")
    planned = {key: value for key in keys if (value := number(plan, key)) is not None}
    if dollars_per_chip_hour is not None and "chip_hours" in planned:
        planned["dollars"] = planned["chip_hours"] * dollars_per_chip_hour
    return planned


def _spent(
    path: pathlib.Path,
    planned: Price,
    ledger: Mapping[str, Any],
    dollars_per_chip_hour: float | None,
    notes: list[str],
) -> Price:
    """The price so far: as ledger.json says, and by the plan's prices where an older one does not say."""
    try:
        out = price.spent(path, planned)
    except (InputError, LookupError, TypeError, ArithmeticError) as error:
        notes.append(f"ledger.json and plan.json do not say what was spent ({type(error).__name__}: {error})")
        return {}
    keys = ("dollars", "kwh", "chip_hours")
    out |= {key: value for key in keys if (value := number(ledger, key)) is not None}
    if dollars_per_chip_hour is not None and "chip_hours" in out:
        out["dollars"] = out["chip_hours"] * dollars_per_chip_hour
    return out


def _events(path: pathlib.Path, notes: list[str]) -> list[dict[str, Any]]:
    """The newest lines of events.jsonl."""
    found, bad = [], 0
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({disk.cause(error)})")
        return []
    for line in lines[-EVENTS:]:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict):
            found.append(event)
        else:
            bad += 1
    if bad:
        notes.append(f"{path.name} has {bad} damaged lines, which are left out")
    if len(lines) > EVENTS:
        notes.append(f"{path.name}: the last {EVENTS} of {len(lines):,} events are here")
    return found


# ------------------------------------------------------------------------------------- made from a record


def curve_factors(record: Record) -> dict[str, dict[str, Any]]:
    """Axes that count steps in another unit: by name, the label and the units a step has."""
    axes = {}
    unit = "tokens" if record.plan.get("unit") == "tokens" else "examples"
    for name, key, label in (
        ("tokens", "tokens_per_step", unit),
        ("flops", "model_flops_per_step", "FLOPs"),
    ):
        if (each := number(record.plan, key)) is not None and each > 0:
            axes[name] = {"label": label, "per_step": each}
    return axes


def clock(record: Record) -> tuple[list[float | None], str]:
    """Seconds of running for each row, pauses between sessions left out, and how they were had.

    A session's `began_at` in ledger.json maps the time of a row to the seconds since its start; without it,
    seconds count from the first row, pauses included.
    """
    times = [number(row, "time") for row in record.rows]
    sessions = [each for each in listed(record.ledger, "sessions") if isinstance(each, dict)]
    begins = [number(each, "began_at") for each in sessions]
    if sessions and None not in begins:
        before, starts = 0.0, []
        for each, began in zip(sessions, begins, strict=True):
            starts.append((began or 0.0, before))
            before += number(each, "total_s") or 0.0
        return [
            _active(t, starts) for t in times
        ], "since the start of the run, pauses between sessions left out"
    known = [t for t in times if t is not None]
    return [
        None if t is None else t - known[0] for t in times
    ], "since the first line of the log, pauses included"


def _active(time_s: float | None, starts: list[tuple[float, float]]) -> float | None:
    if time_s is None:
        return None
    began, before = next(((b, s) for b, s in reversed(starts) if b <= time_s), starts[0])
    return before + time_s - began


def beside_plan(record: Record) -> list[dict[str, Any]]:
    """Planned values beside measured ones; `error` is of the plan, and only where both count the same."""
    plan, ledger = record.plan, record.ledger
    measured = {
        key: value for key, value in group(ledger, "measured").items() if isinstance(value, list) and value
    }
    rows: list[dict[str, Any]] = []
    for key, label, kind in (
        ("step_s", "a step", "seconds"), ("peak_bytes", "memory at the peak", "bytes"),
        ("state_bytes", "state", "bytes"), ("model_flops_per_step", "FLOPs a step", "flops"),
        ("step_j", "energy a step", "joules"),
    ):  # fmt: skip
        value, how = number(ledger, key), ""
        if key in measured:
            value = number({"x": measured[key][0]}, "x") if value is None else value
            how = str(measured[key][-1])
        rows.append(
            {"label": label, "kind": kind, "planned": number(plan, key), "measured": value, "how": how}
        )
    steps = number(ledger, "steps")
    same = steps is not None and steps == number(plan, "steps")
    for planned, value, label, kind in (
        (number(plan, "steps"), steps, "steps", "count"),
        (number(plan, "total_s"), number(group(ledger, "seconds"), "step"), "time in steps", "seconds"),
        (number(plan, "total_flops"), number(ledger, "model_flops"), "FLOPs in all", "flops"),
        (record.planned.get("kwh"), record.spent.get("kwh"), "energy in all", "kwh"),
        (record.planned.get("dollars"), record.spent.get("dollars"), "cost in all", "dollars"),
    ):
        rows.append(
            {"label": label, "kind": kind, "planned": planned, "measured": value, "how": "", "all": True}
        )
    for row in rows:
        comparable = row["planned"] and row["measured"] and (same or "all" not in row)
        row["error"] = row["planned"] / row["measured"] - 1 if comparable else None
    return [row for row in rows if row["planned"] is not None or row["measured"] is not None]


def pictures(record: Record, room: int) -> tuple[list[dict[str, Any]], int]:
    """PNG files of evaluations, the newest of each name, as data URIs of at most `room` bytes in all -> them,
    and the bytes that they take."""
    newest: dict[str, tuple[int, pathlib.Path]] = {}
    earlier = 0
    for path in sorted(
        [*_files(record.path / "evaluation", ".png"), *_files(record.path / "pictures", ".png")]
    ):
        found = re.fullmatch(r"(.+)-(\d+)", path.stem)
        name, step = (found[1], int(found[2])) if found else (path.stem, -1)
        earlier += name in newest
        if name not in newest or step > newest[name][0]:
            newest[name] = (step, path)
    out, taken = [], 0
    for name, (step, path) in newest.items():
        title = name if step < 0 else f"{name}, step {step:,}"
        try:
            content = path.read_bytes() if path.stat().st_size <= LARGEST_PICTURE else b""
        except OSError:
            content = b""
        if taken + len(content) * 4 // 3 > room or not (
            content.startswith(PNG_BEGINS) and content.endswith(PNG_ENDS)
        ):
            record.notes.append(f"{path.parent.name}/{path.name} is damaged, or too large for this page")
            continue
        data = base64.b64encode(content).decode()
        taken += len(data)
        out.append({"title": title, "src": f"data:image/png;base64,{data}"})
    if earlier:
        record.notes.append(f"of {earlier} earlier pictures only the newest of each name is here")
    return out, taken


def samples(record: Record) -> list[dict[str, Any]]:
    """The newest files of samples/, newest first."""
    paths = [path for path in _files(record.path / "samples", ".txt") if path.stem.isdecimal()]
    out = []
    for path in sorted(paths, key=lambda path: -int(path.stem))[:SAMPLES]:
        with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="backslashreplace") as file:
            text = file.read(SAMPLE_CHARACTERS + 1)
            cut = len(text) > SAMPLE_CHARACTERS
            out.append({"step": int(path.stem), "text": text[:SAMPLE_CHARACTERS].strip(), "cut": cut})
    if len(paths) > SAMPLES:
        record.notes.append(f"of {len(paths)} files in samples/ the newest {SAMPLES} are here")
    return out


def checkpoints(record: Record) -> list[dict[str, Any]]:
    """Committed steps, oldest first, with the bytes they take."""
    directory, out = record.path / "checkpoints", []
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if re.fullmatch(STEP, path.name) and (path / MARKER).exists():
                sizes = [os.stat(at).st_size for at in _walk(path)]
                out.append({"step": int(path.name), "size": units.size(sum(sizes)), "files": len(sizes)})
    return sorted(out, key=lambda each: each["step"])


def _walk(path: pathlib.Path) -> Iterator[str]:
    for folder, _, names in os.walk(path):
        yield from (os.path.join(folder, name) for name in names)


def _files(directory: pathlib.Path, suffix: str) -> list[pathlib.Path]:
    try:
        return [path for path in directory.iterdir() if path.suffix == suffix and path.is_file()]
    except OSError:
        return []


def assumptions(record: Record) -> list[tuple[str, str]]:
    """The plan's assumptions: name and text."""
    known = [*receipts.ASSUMPTIONS, "watts", "dollars_per_chip_hour"]
    return [(key, str(value)) for key, value in group(record.plan, "assumptions").items() if key in known]
