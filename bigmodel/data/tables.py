"""Rows of a table ready for the model: numbers standardised, categories numbered, as fitted on training rows.

A batch holds `numeric` float32 [B, N] and `categorical` int32 [B, C] (each if there are such columns), what
labels.py adds, and for task.name=regress `label_scale` float32 [B, 2]: the mean and the standard deviation by
which its `label` was standardised. The categories of all columns are rows of one embedding table: a column
has an id for what is unknown, then its known ones, and starts where the one before it ends.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel.config import Config, InputError
from bigmodel.data import cells, labels
from bigmodel.data import fitted as fitted_lib
from bigmodel.data.facts import Facts
from bigmodel.data.sizes import Size, short
from bigmodel.data.source import Feature, Source
from bigmodel.data.transforms import Batch

OLD_FILE = "columns.json"  # in the workdirs of older versions, in place of fitted.json


@dataclass(frozen=True)
class Columns:
    """Statistics of each column over the training rows."""

    numeric: dict[
        str, list[float]
    ]  # the median, which stands for a missing one; mean and deviation after that
    categories: dict[str, list[str]]  # the known ones, whose ids start at 1 (and the column's offset)
    label_scale: list[float]  # mean and deviation of a number that is learned

    @property
    def rows(self) -> int:
        """Categories over all columns, the unknown ones among them."""
        return sum(len(known) + 1 for known in self.categories.values())

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:16]

    @functools.cached_property
    def _ids(self) -> list[tuple[str, int, dict[str, int]]]:
        """(column, its id for what is unknown, {category: id}) of each column of categories."""
        out, offset = [], 0
        for key, known in self.categories.items():
            out.append((key, offset, {name: offset + at for at, name in enumerate(known, 1)}))
            offset += len(known) + 1
        return out

    def encode(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raw columns [B] -> `numeric` [B, N] and `categorical` [B, C]; a number that is NaN is missing.

        Raises:
            InputError: a number that is infinite, or too far from those of training for float32.
        """
        out = {}
        numbers = [self._standardised(key, rows[key]) for key in self.numeric]
        ids = [
            [labels.id_of(value, known, unknown) for value in rows[key]] for key, unknown, known in self._ids
        ]
        if numbers:
            out["numeric"] = np.stack(numbers, 1).astype(np.float32)
        if ids:
            out["categorical"] = np.stack([np.array(column, np.int32) for column in ids], 1)
        return out

    def decode(self, row: Mapping[str, np.ndarray]) -> dict[str, str]:
        """One row of `encode` -> {column: its number or category}."""
        out = {}
        for (key, (_, mean, deviation)), x in zip(self.numeric.items(), row.get("numeric", ()), strict=True):
            out[key] = f"{x * deviation + mean:.6g}"
        for (key, unknown, known), number in zip(self._ids, row.get("categorical", ()), strict=True):
            names = {id: name for name, id in known.items()} | {unknown: "unknown"}
            out[key] = names[int(number)]
        return out

    def _standardised(self, key: str, values: np.ndarray) -> np.ndarray:
        fill, mean, deviation = self.numeric[key]
        out = (np.where(np.isnan(values), fill, values) - mean) / deviation
        if len(far := np.flatnonzero(~(np.abs(out) <= cells.LARGEST))):
            raise InputError(
                f"column {key!r} has {values[far[0]]}, which is not finite or too many standard deviations "
                f"({deviation:.3g}) from the training rows' mean ({mean:.3g}) for float32; correct it"
            )
        return out


def kinds(config: Config, features: Mapping[str, Feature]) -> tuple[list[str], list[str]]:
    """-> (columns of numbers, columns of categories): all but the label and those that `data.ignore` names.

    Raises:
        InputError: a column that the config names and the table lacks, or one that is neither.
    """
    d = config.data
    unknown = {*d.ignore, *d.categorical} - set(features)
    if unknown:
        raise InputError(
            f"data.ignore or data.categorical names {min(unknown)!r}, which data.name={d.name!r} lacks; "
            f"it has {', '.join(features)}"
        )
    used = {key: feature for key, feature in features.items() if key not in (d.label, *d.ignore)}
    for key, feature in used.items():
        if feature.shape or feature.dtype == "bool":
            raise InputError(
                f"data.name={d.name!r} has {key!r} of shape {feature.shape} and type {feature.dtype}, "
                "neither a number nor a category; name it in data.ignore"
            )
    if not used:
        raise InputError(f"data.name={d.name!r} has no column beside the label; data.ignore fewer")

    def is_category(key: str) -> bool:
        return used[key].dtype == "text" or used[key].num_classes is not None or key in d.categorical

    return [key for key in used if not is_category(key)], [key for key in used if is_category(key)]


def fit(config: Config, source: Source) -> Columns:
    """Reads the training rows once for each column.

    Raises:
        InputError: a column of numbers that holds none.
    """
    numbers, categories = kinds(config, source.features)
    numeric = {}
    for key in numbers:
        values = labels.column(source, key).astype(np.float64)
        known = values[np.isfinite(values)]
        if not len(known):
            raise InputError(f"column {key!r} has no number in the training split; name it in data.ignore")
        filled = np.where(np.isfinite(values), values, np.median(known))
        numeric[key] = [float(np.median(known)), *_scale(filled)]
    vocabulary = {}
    for key in categories:
        counts = collections.Counter(map(labels.as_text, labels.column(source, key)))
        vocabulary[key] = sorted(name for name, count in counts.items() if count >= config.data.min_count)
    scale = [0.0, 1.0]
    if config.task.label_kind == "numbers":
        values = labels.column(source, config.data.label).astype(np.float64)
        scale = _scale(values[np.isfinite(values)])
    return Columns(numeric, vocabulary, scale)


def _scale(values: np.ndarray) -> list[float]:
    deviation = float(values.std()) if len(values) else 0.0
    return [float(values.mean()) if len(values) else 0.0, deviation if deviation > 0 else 1.0]


def fitted(config: Config, workdir: pathlib.Path | None = None, facts: Facts | None = None) -> Columns:
    """Returns the columns as the workdir keeps them, or fits them on the training split.

    Raises:
        InputError: more categories than the model has rows for.
    """
    facts = facts or Facts(config, workdir)
    old = pathlib.Path(facts.workdir) / OLD_FILE if facts.workdir else None

    def made() -> Any:
        if old and old.is_file():
            return json.loads(old.read_text(encoding="utf-8"))
        return dataclasses.asdict(fit(config, facts.open(config.data.split)))

    columns = Columns(**facts.get("columns", made, compare=False))
    room = config.model.rows
    if 0 < room < columns.rows:
        raise InputError(
            f"model.rows is {room}, but the table's {len(columns.categories)} columns of categories need "
            f"{columns.rows}; set model.rows to {-(-columns.rows // 128) * 128} or more"
        )
    return columns


def rows(config: Config, facts: Facts) -> Size:
    """Counts the categories over all columns, the unknown ones among them; 0: there are no such columns."""
    _, categories = kinds(config, facts.features)
    count = fitted(config, facts=facts).rows if categories else 0
    return Size(
        count, f"{count:,} categories of {short(config.data.name)}, each column's unknown one among them"
    )


class Encoded:
    """A source's rows as `numeric` [B, N] and `categorical` [B, C], beside label and group."""

    def __init__(self, config: Config, source: Source, columns: Columns, where: labels.Where) -> None:
        self._source, self._columns, self._where, d = source, columns, where, config.data
        wanted = [*columns.numeric, *columns.categories]
        there = [key for part in kinds(config, source.features) for key in part]
        if difference := fitted_lib.difference(sorted(wanted), sorted(there), "columns"):
            raise InputError(
                f"data.name={d.name!r} has not the columns that training used: {difference}; correct it, or "
                "use another --workdir"
            )
        self._keep = tuple(key for key in (d.label, d.group) if key)
        self.features, self.fingerprint = source.features, source.fingerprint
        self.num_bytes, self.split_rule = source.num_bytes, source.split_rule

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Raises InputError for a number that cannot be encoded; the message names its row."""
        rows = self._source.read(indices)
        try:
            return {key: rows[key] for key in self._keep} | self._columns.encode(rows)
        except InputError:
            for at, index in enumerate(indices.tolist()):
                try:
                    self._columns.encode({key: column[at : at + 1] for key, column in rows.items()})
                except InputError as error:
                    raise InputError(f"{self._where(index)}: {error}") from None
            raise


def prepare(config: Config, columns: Columns, weights: np.ndarray | None) -> Any:
    """-> (encoded rows, positions) -> the batch."""

    def finish(batch: Mapping[str, np.ndarray], positions: np.ndarray) -> Batch:
        out = {key: batch[key] for key in ("numeric", "categorical") if key in batch}
        if config.task.label_kind == "numbers":
            mean, deviation = columns.label_scale
            scaled = (batch[config.data.label].astype(np.float64) - mean) / deviation
            batch = {**batch, config.data.label: scaled}
            scale = np.array([mean, deviation], np.float32)
            out["label_scale"] = np.tile(scale, (len(positions), 1))
        return {**out, **labels.finish(config, batch, weights)}

    return finish


def shapes(config: Config, facts: Facts) -> labels.Shapes:
    """Returns the arrays of a batch but `mask`."""
    features = facts.features
    labels.require(config, features)
    labels.check(config, labels.numbered(config, features, facts.names))
    numbers, categories = kinds(config, features)
    out = labels.shapes(config)
    if numbers:
        out["numeric"] = ((len(numbers),), np.float32)
    if categories:
        out["categorical"] = ((len(categories),), np.int32)
    if config.task.label_kind == "numbers":
        out["label_scale"] = ((2,), np.float32)
    return out
