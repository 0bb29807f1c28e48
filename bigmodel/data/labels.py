"""Labels of examples that have one output each, whatever the example is: checked, skipped, counted, weighed.

A batch gets `label`: int32 [B] of one class, float32 [B, K] for several (multilabel) or for numbers
(regress); as the config asks, `weight` (task.class_weights) and `group` (data.group).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from bigmodel.config import Config, InputError
from bigmodel.data import cells, sources
from bigmodel.data.delimited import TableFiles
from bigmodel.data.image_folders import ImageFiles
from bigmodel.data.source import Feature, Reading, Source
from bigmodel.data.transforms import Batch

Shapes = dict[str, tuple[tuple[int, ...], Any]]  # name -> (shape after the batch's dimension, dtype)
Where = Callable[[int], str]  # an example's index -> where it stands, for messages

log = logging.getLogger("bigmodel")

CHUNK = 4096  # labels read at once


class Records:
    """A source's records, each checked; at most `max_skipped` that are bad are replaced and masked.

    A bad record's row holds the next good one, with `mask` 0: it counts for nothing, and neither the loss nor
    a metric sees it twice. Which are bad depends on the data alone, so batches stay pure.
    """

    def __init__(self, source: Source, config: Config, where: Where) -> None:
        self.source, self._where, self._label = source, where, name_of(config)
        self._classes = classes_of(config) if config.task.label_kind != "numbers" else sys.maxsize
        self._max_skipped, self.skipped = config.data.max_skipped, dict[int, str]()

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Raises InputError for a bad record too many; the message names it."""
        known = {index: self._good_after(index) for index in self.skipped.keys() & set(indices.tolist())}
        at = np.array([known.get(index, index) for index in indices.tolist()], np.int64)
        try:
            batch = self.source.read(at)
            self._check(batch, at)
        except InputError:
            if not self._max_skipped or not self._find_bad(at):
                raise
            return self.read(indices)
        mask = np.array([index not in known for index in indices.tolist()], np.float32)
        return {**batch, "mask": mask}

    def _check(self, batch: Mapping[str, np.ndarray], indices: np.ndarray) -> None:
        if not self._label:
            return
        column = batch[self._label]
        if column.dtype.kind in "iu" and ((column >= 0) & (column < self._classes)).all():
            return
        for index, label in zip(indices, column, strict=True):
            if (label.dtype.kind in "iu") and ((label < 0) | (label >= self._classes)).any():
                raise InputError(
                    f"{self._where(index)} has label {label}, not one of 0..{self._classes - 1}; set "
                    "model.num_classes, choose a split with labels, or skip it by data.max_skipped"
                )
            if label.dtype.kind == "f" and not (np.abs(label) <= cells.LARGEST).all():
                raise InputError(
                    f"{self._where(index)} has {self._label} {label}, no finite number that float32 holds; "
                    "prepare it again, or skip it by data.max_skipped"
                )

    def _find_bad(self, indices: np.ndarray) -> bool:
        """Reads one by one, and notes what is bad. -> whether anything new was found."""
        before = len(self.skipped)
        for index in np.unique(indices).tolist():
            self._is_good(index)
        return len(self.skipped) > before

    def _is_good(self, index: int) -> bool:
        if index in self.skipped:
            return False
        try:
            one = np.array([index])
            self._check(self.source.read(one), one)
        except InputError as error:
            if len(self.skipped) >= self._max_skipped:
                raise InputError(
                    f"{error}; data.max_skipped={self._max_skipped} are skipped already"
                ) from None
            self.skipped[index] = str(error)
            log.warning("skipped %d of at most %d: %s", len(self.skipped), self._max_skipped, error)
            return False
        return True

    def _good_after(self, index: int) -> int:
        count = len(self)
        following = ((index + step) % count for step in range(1, count))
        good = next((other for other in following if self._is_good(other)), None)
        if good is None:
            raise InputError(f"{self._where(index)} is bad, as all others are; prepare the data again")
        return good


def shapes(config: Config) -> Shapes:
    """Returns the arrays that `finish` makes."""
    one = config.task.label_kind == "class"
    label: Shapes = {"label": ((), np.int32) if one else ((classes_of(config),), np.float32)}
    out = label if name_of(config) else {}
    if config.task.weighs_classes:
        out["weight"] = ((), np.float32)
    if config.data.group:
        out["group"] = ((), np.int32)
    return out


def finish(config: Config, batch: Mapping[str, np.ndarray], weights: np.ndarray | None) -> Batch:
    """Raw records -> `label`, `mask`, and `weight` (by class) and `group` as the config asks."""
    out = {"mask": batch["mask"]}
    if name := name_of(config):
        label = batch[name]
        out["label"] = _label(label, config.task.label_kind, classes_of(config))
    if config.task.weighs_classes:
        out["weight"] = np.ones(len(label), np.float32) if weights is None else weights[label]
    if config.data.group:
        out["group"] = batch[config.data.group].astype(np.int32)
    return out


def _label(label: np.ndarray, kind: str, classes: int) -> np.ndarray:
    if kind == "class":
        return label.astype(np.int32)
    if label.dtype != object:  # numbers, or 0 and 1 for each class
        return label.reshape(len(label), -1).astype(np.float32)
    out = np.zeros((len(label), classes), np.float32)
    for row, ids in enumerate(label):
        out[row, ids] = 1
    return out


def require(config: Config, features: Mapping[str, Feature], *needed: str) -> None:
    """Raises InputError where a feature that is needed, or the label or group of the config, is missing."""
    d, name, task = config.data, config.data.name, config.task.name
    missing = set(filter(None, (*needed, name_of(config), d.group))) - set(features)
    if missing:
        raise InputError(
            f"data.name={name!r} has no feature {min(missing)!r}, which task.name={task} needs; "
            f"set data.label or data.group to one of {', '.join(features)}, or choose another dataset"
        )


def check(config: Config, label: Feature) -> None:
    """Raises InputError for a label that does not suit the task or the model."""
    check_kind(config, label)
    name, kind, classes = config.data.name, config.task.label_kind, classes_of(config)
    if kind != "numbers" and (label.num_classes or 0) > classes:
        raise InputError(
            f"model.num_classes is too small for data.name={name!r}: set it to {label.num_classes}"
        )
    width = 1 if not label.shape else label.shape[0]
    if kind != "class" and width is not None and width != classes:
        raise InputError(
            f"model.num_classes is {classes}, but data.label has {width} numbers: set it to that"
        )


def check_kind(config: Config, label: Feature) -> None:
    """Raises InputError for a label that does not suit the task."""
    name, kind = config.data.name, config.task.label_kind
    if kind == "class" and (label.shape or not label.dtype.startswith(("int", "uint"))):
        raise InputError(
            f"data.label={config.data.label!r} of data.name={name!r} is not one class an example; set "
            "task.name to multilabel or regress, or data.label to a feature of names or of whole numbers"
        )
    if kind != "class" and label.dtype == "text":
        raise InputError(
            f"data.label={config.data.label!r} of data.name={name!r} is text; set task.name to "
            "classify, or correct what is no number in it"
        )


def name_of(config: Config) -> str:
    """The feature that is learned; nothing for a model that is told of no classes."""
    task = config.task
    return config.data.label if task.one_output or (task.label_kind and classes_of(config)) else ""


def classes_of(config: Config) -> int:
    return config.model.num_classes


def column(source: Source, key: str) -> np.ndarray:
    """One feature of every record."""
    ends = range(0, len(source), CHUNK)
    return np.concatenate([source.read(np.arange(i, min(i + CHUNK, len(source))))[key] for i in ends])


# ------------------------------------------------------------------------------------------ text and tables


def features(config: Config) -> Mapping[str, Feature]:
    """The features of the dataset that a text or a table comes from."""
    return sources.features_of(config.data.name, config.data.data_dir, **reading(config))


def open_split(
    config: Config,
    split: str,
    keys: Collection[str] | None = None,
    *,
    text: Collection[str] = (),
    numbers: Collection[str] = (),
) -> Source:
    """A split of the dataset. `text`, `numbers`: columns of a table, whatever their cells look like."""
    d, how = config.data, reading(config)
    how["text"], how["numbers"] = {*how["text"], *text}, numbers
    return sources.open_source(d.name, split, d.data_dir, keys=keys, cache=d.cache, **how)


def reading(config: Config) -> Reading:
    """Settings of reading files; problems in columns that the model does not read are ignored."""
    d, name = config.data, name_of(config)
    return {
        "text": {d.text, *d.categorical} | (set(d.ignore) - {name, d.group}),
        "only": None if "table" in config.model.inputs else {name, d.group},
        "required": {name} - {""},
        "decimal": d.decimal,
        "max_skipped": d.max_skipped,
        "columns": d.columns,
        "split_by": d.split_by,
        "test_fraction": d.test_fraction,
    }


def where(config: Config, source: Source, split: str) -> Where:
    """A file, or a line of one, if the source has them, or the number of a record."""
    if isinstance(source, TableFiles | ImageFiles):
        return source.where
    return lambda index: f"data.name={config.data.name!r} split {split!r} record {index}"


def names(config: Config, key: str) -> list[str]:
    """The different values of a text feature in the training split, sorted."""
    return sorted({as_text(value) for value in column(open_split(config, config.data.split, (key,)), key)})


def as_text(value: Any) -> str:
    """A category by name: text as it is, a number as it would be written, with all its digits."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def id_of(value: Any, known: Mapping[str, int], unknown: int) -> int:
    """The id of a category, user or item; spaces around one that is not known as it stands do not count."""
    text = as_text(value)
    return known[text] if text in known else known.get(text.strip(), unknown)


class Numbered:
    """A source whose group, and label if it is text, are numbers instead: the place of their name."""

    def __init__(
        self, config: Config, source: Source, where: Where, names: Callable[[str], list[str]]
    ) -> None:
        """Args: names: of a column's values, see facts.py; a group not among them gets the next id."""
        self._source, self._where, self._label = source, where, config.data.label
        self.features, self.fingerprint = source.features, source.fingerprint
        self.num_bytes, self.split_rule = source.num_bytes, source.split_rule
        label, group = config.data.label, config.data.group
        keys = {label, group} - {""}
        if label and source.features[label].dtype != "text":
            keys.remove(label)  # its numbers are the classes
        self._at = {key: {name: at for at, name in enumerate(names(key))} for key in keys}

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Raises InputError for a label that the training split does not have."""
        out = self._source.read(indices)
        for key, known in self._at.items():
            ids = np.array([known.get(as_text(value), len(known)) for value in out[key]], np.int64)
            if key == self._label and (ids == len(known)).any():
                row = int(np.flatnonzero(ids == len(known))[0])
                raise InputError(
                    f"{self._where(int(indices[row]))} has {key} {as_text(out[key][row])!r}, which no "
                    "example of the training split has; correct it, or skip it by data.max_skipped"
                )
            out[key] = ids
        return out


def numbered(config: Config, features: Mapping[str, Feature], names: Callable[[str], list[str]]) -> Feature:
    """The label's feature, as `Numbered` gives it."""
    label = features[config.data.label]
    if label.dtype == "text" and config.task.label_kind == "class":
        return Feature((), "int64", len(names(config.data.label)))
    return label
