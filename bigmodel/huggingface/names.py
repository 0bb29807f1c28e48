"""Reads class names from a config.json, and derives the facts about data that a workdir stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bigmodel.config import Config, InputError
from bigmodel.data import labels
from bigmodel.data.source import Feature

NOWHERE = "none"  # data.name of an import without a data set


def classes(hf: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Returns the names of a head's classes by number; transformers' default is two classes.

    Raises:
        InputError: `id2label` skips a number, or disagrees with `num_labels`.
    """
    found, count = hf.get("id2label"), hf.get("num_labels")
    if found is None:
        count = 2 if count is None else count
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count < 2**20:
            raise InputError(
                f"{where} has num_labels={count!r} in place of a number of classes; fetch it again"
            )
        return tuple(f"LABEL_{k}" for k in range(count))
    try:
        names = {int(key): str(value) for key, value in dict(found).items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: id2label must be a map from numbers to names; fetch it again") from error
    if not names or sorted(names) != list(range(len(names))):
        raise InputError(f"{where}: id2label must name the classes 0 to {max(len(names) - 1, 0)}; correct it")
    if count is not None and count != len(names):
        raise InputError(f"{where}: num_labels={count}, but id2label names {len(names)}; correct one")
    return tuple(names[k] for k in range(len(names)))


def facts(config: Config, names: tuple[str, ...], channels: int) -> dict[str, Any]:
    """Returns the facts that an import's workdir stores, so that shapes and names need no data set.

    Raises:
        InputError: a data set that was given cannot be read.
    """
    d, kind = config.data, config.task.label_kind
    if not config.task.one_output:
        return {}
    out: dict[str, Any] = {"class names": list(names)}
    if d.name != NOWHERE:
        known = labels.features(config)
        if d.label in known and known[d.label].dtype == "text" and kind == "class":
            out[f"names of {d.label}"] = list(names)
        return out
    kinds = {"class": ((), "int64"), "classes": ((None,), "int64"), "numbers": ((), "float32")}
    shape: tuple[int | None, ...]
    shape, dtype = kinds[kind]
    if kind == "numbers" and len(names) > 1:
        shape = (len(names),)
    features = {d.label: Feature(shape, dtype, None if kind == "numbers" else len(names), names)}
    if config.model.vocab_size:
        features[d.text] = Feature((), "text")
    else:
        features["image"] = Feature((None, None, channels), "uint8")
    return out | {"features": {key: dataclasses.asdict(feature) for key, feature in features.items()}}
