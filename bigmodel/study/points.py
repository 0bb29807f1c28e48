"""Runs as points of a scaling study: parameters, tokens, loss; from workdirs and from tables."""

from __future__ import annotations

import csv
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigmodel import config as config_lib
from bigmodel import disk, log, workdir
from bigmodel.config import InputError

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0  # forward 2, backward 4 (Kaplan et al. 2020)


@dataclass(frozen=True)
class Columns:
    """Names of what to read; of a workdir they are keys of its config and its metrics."""

    loss: str = ""  # "": the one that there is
    by: str = ""
    params: str = "params"


@dataclass(frozen=True)
class Run:
    """One run; `why` says why no law can be fitted to it."""

    name: str
    params: float
    tokens: float
    loss: float  # NaN: none
    flops: float
    group: str
    row: dict[str, Any]  # as the table has it
    why: str = ""


def read(sources: Sequence[str], columns: Columns, *, with_loss: bool = True) -> tuple[list[Run], str]:
    """Reads tables, workdirs, and directories of workdirs -> the runs, and the name of their loss.

    Raises:
        InputError: there is no such file, column or number; or, `with_loss`, no loss, or two sources whose
            losses have other names.
    """
    runs: list[Run] = []
    name, first = columns.loss, ""
    for text in sources:
        path = workdir.local(text, "the path")
        if path.is_dir():
            found, name = _from_workdirs(path, columns)
        else:
            found, name = _from_table(path, columns, with_loss)
        if first and name != first:
            raise InputError(f"{text} has the loss {name!r}, {sources[0]} {first!r}; choose one by --loss")
        first = name
        runs += found
    return runs, name


def usable(runs: Sequence[Run]) -> tuple[list[Run], list[dict[str, str]]]:
    """Splits runs -> those that a law can be fitted to, and the others, each with the reason."""
    chosen: dict[tuple[Any, ...], Run] = {}
    left_out = []
    for run in runs:
        key = (run.group, run.params, run.tokens, run.loss)
        if why := run.why or (f"a duplicate of {chosen[key].name}" if key in chosen else ""):
            left_out.append({"run": run.name, "group": run.group, "why": why})
        else:
            chosen[key] = run
    return list(chosen.values()), left_out


def _from_table(path: pathlib.Path, columns: Columns, with_loss: bool) -> tuple[list[Run], str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        cause = disk.cause(error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{path}: {cause}; give a CSV table or workdirs of runs") from error
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    separator = "\t" if numbered and "\t" in numbered[0][1] else ","
    cells = [
        [cell.strip() for cell in row] for row in csv.reader((x for _, x in numbered), delimiter=separator)
    ]
    header = cells[0] if cells else []
    losses = [name for name in header if name == "loss"] or [x for x in header if x.startswith("loss")]
    name = columns.loss or (losses[0] if len(losses) == 1 else "")
    name = name if with_loss or name in header else ""
    needed = [columns.params, "tokens", *([columns.by] if columns.by else [])]
    for column in needed + ([name] if name or with_loss else []):
        if column not in header:
            missing = (
                f"no column {column!r}" if column else f"{len(losses)} columns of losses; choose by --loss"
            )
            raise InputError(f"{path} has {missing}; its columns are {', '.join(header) or 'none'}")
    runs = []
    for (line, _), row in zip(numbered[1:], cells[1:], strict=True):
        if len(row) != len(header):
            raise InputError(
                f"{path} line {line} has {len(row)} cells, the header {len(header)}; mend the line"
            )
        by_name: dict[str, Any] = {column: _number(cell) for column, cell in zip(header, row, strict=True)}
        runs.append(_run(f"{path} line {line}", by_name, name, columns))
    return runs, name


def _number(cell: str) -> float | int | str | None:
    for kind in (int, float):
        try:
            value = kind(cell)
        except ValueError:
            continue
        return value if math.isfinite(value) else None
    return cell


def _run(where: str, row: dict[str, Any], loss: str, columns: Columns) -> Run:
    """Makes a run of a table's row. Raises InputError for what cannot be a size or a loss."""
    for column in (columns.params, "tokens"):
        if not isinstance(row[column], int | float) or not row[column] > 0:
            raise InputError(f"{where}: {column} is {row[column]!r}; give a number above 0")
    value = row.get(loss) if loss else None
    if value not in (None, "") and (not isinstance(value, int | float) or value <= 0):
        raise InputError(
            f"{where}: {loss} is {value!r}; a loss is a number above 0, or empty where it is NaN"
        )
    params, tokens = float(row[columns.params]), float(row["tokens"])
    flops = row.get("flops")
    return Run(
        name=str(row.get("model") or row.get("name") or where),
        params=params,
        tokens=tokens,
        loss=float(value) if value else math.nan,
        flops=float(flops or FLOPS_PER_PARAMETER_AND_TOKEN * params * tokens),
        group=str(row.get(columns.by, "")) if columns.by else "",
        row=row,
        why="" if value or not loss else "its loss is not finite",
    )


def _from_workdirs(path: pathlib.Path, columns: Columns) -> tuple[list[Run], str]:
    """The run in `path`, or those in the directories inside it."""
    found = (
        [path] if (path / "config.json").exists() else sorted(p.parent for p in path.glob("*/config.json"))
    )
    if not found:
        raise InputError(
            f"{path} has no config.json, nor a directory inside; give workdirs that train.py made"
        )
    rows = {each: log.read_metrics(each) for each in found}
    names = {key for lines in rows.values() for line in lines for key in line}
    losses = sorted(key for key in names if key.startswith("eval/") and key.endswith("/loss"))
    if not columns.loss and len(losses) != 1:
        raise InputError(
            f"{path}: choose by --loss among {', '.join(losses) or 'metrics: none is logged yet'}"
        )
    name = columns.loss or losses[0]
    return [_of_workdir(each, rows[each], name, columns) for each in found], name


def _of_workdir(path: pathlib.Path, lines: list[dict[str, Any]], loss: str, columns: Columns) -> Run:
    """A workdir's last value of the loss, with the tokens that it had seen by then."""
    config, plan = workdir.read_config(path), workdir.read_json(path / "plan.json")
    keys = config_lib.flatten(config_lib.to_dict(config))
    if columns.by and columns.by not in keys:
        raise InputError(f"--by={columns.by} is no key of {path / 'config.json'}; give one such as data.name")
    step, value = next(((x["step"], x[loss]) for x in reversed(lines) if loss in x), (0, None))
    params, per_step = float(plan.get("active_parameters", 0)), float(plan.get("tokens_per_step", 0))
    session = {"steps": config.steps, **(plan.get("sessions") or [{}])[-1]}
    last = session.get("first_step", 0) + session["steps"]  # config.budget decides it, too
    why = ""
    if not params or not per_step:
        why = "no plan.json, so that its size is not known"
    elif not step:
        why = f"no {loss} in its metrics.jsonl"
    elif value is None:
        why = "its loss is not finite"
    elif step < last:
        why = f"unfinished: step {step:,} of {last:,}"
    row = {"params": params, "tokens": step * per_step, "workdir": str(path), "step": step}
    return Run(
        name=str(path),
        params=params,
        tokens=step * per_step,
        loss=math.nan if value is None else float(value),
        flops=float(plan.get("model_flops_per_step", 0)) * step,
        group=str(keys[columns.by]) if columns.by else "",
        row=row | {loss: value},
        why=why,
    )
