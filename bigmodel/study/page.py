"""The page of a run, of several, or of a study: one HTML file that needs no network.

Numbers are those of the runs' files (`record.py`); page.js draws them with Plotly, which the file carries,
compressed. Everything that comes from a run is escaped, and the page's policy runs no other script.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bigmodel import disk, units
from bigmodel.config import InputError
from bigmodel.study import compare, record, thinned, trials
from bigmodel.study.record import Record, number
from bigmodel.study.trials import Settings

HERE = pathlib.Path(__file__).parent
POINTS, ALL_POINTS, FEWEST = (
    1000,
    150_000,
    40,
)  # of a curve; of all curves of a page; of a curve on a full page
ROOM = 8 << 20  # bytes of pictures
COLUMNS = 10  # of settings in the table of runs
DETAILED = 30  # runs of which a page shows all, not the table and the curves alone


@dataclass
class Page:
    """Runs of a page, and what is said of them all."""

    title: str
    records: list[Record]
    metric: str
    maximize: bool
    settings: list[Settings]  # of each run: what differs
    states: list[str]
    notes: list[str] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as HTML. Raises InputError where plotly is not installed."""
    import jinja2

    library, script = _plotly(), (HERE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.ChainableUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    for name, filter_ in {"kind": text, "date": date}.items():
        environment.filters[name] = functools.partial(_defined, filter_)
    data = contents(page)
    return environment.get_template("page.html").render(
        page=page,
        data=data,
        runs=_details(page),
        table=data["table"],
        groups=compare.table(seeds, page.metric) if (seeds := _groups(page)) else [],
        embedded=_embedded(data),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        library=library[0],
        hashes=f"'{_hash(script.encode())}' '{library[1]}'",
        made_at=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _defined(filter_: Callable[..., str], value: Any, *args: str) -> str:
    """A filter's text of a value that a file may lack."""
    import jinja2

    return filter_(None if isinstance(value, jinja2.Undefined) else value, *args)


def _embedded(data: Any) -> str:
    """JSON that may stand inside a script element."""
    plain = json.dumps(disk.without_nan(data), allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def _plotly() -> tuple[str, str]:
    """Plotly's script, compressed, in base64, and its hash for the page's policy."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError("a page needs plotly: pip install plotly") from error
    source = get_plotlyjs().encode()
    return base64.b64encode(gzip.compress(source, 6, mtime=0)).decode(), _hash(source)


def _hash(content: bytes) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}"


def contents(page: Page) -> dict[str, Any]:
    """The numbers that the page's script draws."""
    count = sum(len({name for row in run.rows for name in row}) for run in page.records)
    most = max(FEWEST, min(POINTS, ALL_POINTS // max(count, 1)))
    return {
        "metric": page.metric,
        "maximize": page.maximize,
        "runs": [_drawn(run, most) for run in page.records],
        "table": _table(page),
        "groups": [
            {
                "name": ", ".join(f"{k}={v}" for k, v in each.settings.items()) or "as the config is",
                **{key: getattr(each, key) for key in ("mean", "values", "deviation", "interval", "p")},
            }
            for each in _groups(page)
        ],
    }


def _drawn(run: Record, most: int) -> dict[str, Any]:
    """Curves, seconds and memory of a run."""
    found = thinned.curves(run.rows, most)
    used = thinned.rows_used(found)
    seconds, since = record.clock(run)
    price = run.spent if "dollars" in run.spent else run.planned
    rate = price["dollars"] / price["total_s"] if price.get("total_s") and "dollars" in price else None
    sessions = [each for each in record.listed(run.ledger, "sessions") if isinstance(each, dict)]
    return {
        "name": run.name,
        "steps": [run.rows[index]["step"] for index in used],
        "seconds": [seconds[index] for index in used],
        "since": since,
        "axes": record.curve_factors(run),
        "dollars_per_s": rate,
        "curves": found,
        "spent_s": record.group(run.ledger, "seconds"),
        "sessions": [record.group(each, "seconds") for each in sessions],
        "memory": {
            key: number(run.plan, f"{key}_bytes")
            for key in ("params", "optimizer", "batch", "temporary", "capacity", "peak")
        },
        "peak_bytes": next(
            (row["measured"] for row in record.beside_plan(run) if row["label"] == "memory at the peak"), None
        ),
    }


COSTS = {
    "total_s": ("time", "seconds"),
    "total_flops": ("FLOPs", "flops"),
    "kwh": ("energy", "kwh"),
    "dollars": ("cost", "dollars"),
}


def _table(page: Page) -> dict[str, Any]:
    """A row a run; columns that no run has are left out."""
    settings = list((page.settings or [{}])[0])
    columns = [{"key": key, "label": key, "kind": "text"} for key in settings[:COLUMNS]]
    columns += [{"key": "metric", "label": page.metric or "metric", "kind": "number"}]
    columns += [{"key": "step", "label": "step", "kind": "count"}]
    columns += [{"key": key, "label": label, "kind": kind} for key, (label, kind) in COSTS.items()]
    columns += [{"key": "goodput", "label": "goodput", "kind": "share"}]
    rows: list[dict[str, Any]] = []
    for n, run in enumerate(page.records):
        values: dict[str, Any] = {**page.settings[n], "metric": run.last(page.metric), "step": run.step}
        values |= {key: run.spent.get(key) for key in COSTS}
        values["goodput"] = number(run.ledger, "goodput")
        rows.append({"name": run.name, "state": page.states[n], "values": values})
    used = [c for c in columns if any(row["values"].get(c["key"]) is not None for row in rows)]
    return {"columns": used, "rows": rows, "settings": settings}


def _groups(page: Page) -> list[compare.Group]:
    """Settings over seeds, of runs that are complete; none where no two runs differ in their seed alone."""
    results = [
        (settings, value)
        for run, settings, how in zip(page.records, page.settings, page.states, strict=True)
        if how == "complete" and (value := run.last(page.metric)) is not None
    ]
    found = compare.groups(results, page.maximize)
    return found if any(len(each.values) > 1 for each in found) else []


def _details(page: Page) -> list[dict[str, Any]]:
    """The parts of each run that the template fills in."""
    out, room = [], ROOM
    for run, how in zip(page.records[:DETAILED], page.states, strict=False):
        images, taken = record.pictures(run, room)
        room -= taken
        plans = [each for each in record.listed(run.plan, "sessions") if isinstance(each, dict)]
        ledgers = [each for each in record.listed(run.ledger, "sessions") if isinstance(each, dict)]
        out.append({
            "run": run, "state": how, "pictures": images, "samples": record.samples(run),
            "checkpoints": record.checkpoints(run), "beside": record.beside_plan(run),
            "assumes": record.assumptions(run), "tiles": _tiles(run, page.metric), "plans": plans,
            "ledgers": ledgers, "seconds": record.group(run.ledger, "seconds"),
            "parts": record.group(run.ledger, "parts"),
            "scalars": {k: v for k, v in run.evaluation.items() if isinstance(v, int | float | str)},
            "versions": record.group(run.plan, "versions"), "config": _config(run),
        })  # fmt: skip
    return out


def _config(run: Record) -> list[tuple[str, str, bool]]:
    return [(key, trials.as_text(value), key in run.own) for key, value in run.config.items()]


def _tiles(run: Record, metric: str) -> list[tuple[str, str]]:
    """The few numbers at the top: label, text."""
    found = [
        (metric, run.last(metric), "number"),
        ("last logged step", float(run.step), "count"),
        ("parameters", number(run.plan, "parameters"), "quantity"),
        ("time", number(run.ledger, "total_s"), "seconds"),
        ("goodput", number(run.ledger, "goodput"), "share"),
        ("a step", number(run.ledger, "step_s"), "seconds"),
        ("MFU", run.last("perf/mfu"), "share"),
        ("FLOPs", number(run.ledger, "model_flops"), "flops"),
        ("energy", number(run.ledger, "joules"), "joules"),
        ("cost", run.spent.get("dollars"), "dollars"),
    ]
    return [(label, text(value, kind)) for label, value, kind in found if label and value is not None]


def text(value: Any, kind: str = "number") -> str:
    """A number as people read it; a hyphen for none."""
    if isinstance(value, str | bool):
        return str(value)
    try:
        value = float(value)
        match kind:
            case "seconds":
                return units.duration(value) if value >= 120 else units.seconds(value)
            case "bytes":
                return units.size(value)
            case "flops" | "joules" | "quantity":
                unit = {"flops": "FLOP", "joules": "J", "quantity": ""}[kind]
                return f"{units.quantity(value)}{unit}".strip()
            case "kwh":
                return f"{value:.4g} kWh" if value >= 0.1 else f"{value * 1e3:.4g} Wh"
            case "dollars":
                return f"${value:,.2f}" if value >= 1 else f"${value:.3g}"
            case "share":
                return f"{value:.1%}"
            case "error":
                return f"{value:+.1%}"
            case "count":
                return f"{value:,.0f}"
        return f"{value:.6g}"
    except (TypeError, ValueError, OverflowError):
        return "-"


def date(value: Any) -> str:
    """Seconds since 1970 as a UTC time; text as it is."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(float(value)))
    except (TypeError, ValueError, OverflowError):
        return value if isinstance(value, str) else ""
