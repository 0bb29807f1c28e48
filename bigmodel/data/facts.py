"""Facts about a config's data other than its records: as a workdir keeps them, else as the data say.

    features        {column: {shape, dtype, num_classes, names}} of the dataset
    names of KEY    the values of a text column (label, group): a value's id is its place
    columns         of a table: see tables.py
    users, items    names, whose ids are their places, from 1: see ratings.py
    class names     of an imported model, by number
    tokenizer       its fingerprint

Training fits them once and keeps them (`keep`, in fitted.json); from then on nothing is numbered anew. Where
a workdir has them, no training data are read for them. Training data that disagree are refused, by name.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from bigmodel.config import Config, InputError
from bigmodel.data import fitted, labels, tfds
from bigmodel.data.source import Feature, Source

IMAGES = ("image", "objects/bbox", "objects/label", tfds.CROWDS)


class Facts:
    """The facts of one config's data, each had when it is first asked for."""

    def __init__(
        self, config: Config, workdir: str | os.PathLike[str] | None = None, *, training: bool = False
    ) -> None:
        """Args: training: what the workdir keeps is compared with the data. Raises as `fitted.read`."""
        self.config, self._training = config, training
        self.workdir = pathlib.Path(workdir) if workdir else None
        self._stored, self._new = fitted.read(workdir), dict[str, Any]()

    def get(self, name: str, make: Callable[[], Any], *, compare: bool = True) -> Any:
        """A fact (JSON) as it is kept, or made now.

        Args:
            make: reads it from the data of the config's training split.
            compare: in training a kept one is compared with what `make` gives.

        Raises:
            InputError: they differ; the message names the first difference.
        """
        if name in self._stored:
            if self._training and compare and name not in self._new:
                self._new[name] = make()
                self._refuse(fitted.difference(self._stored[name], self._new[name], name))
            return self._stored[name]
        if name not in self._new:
            self._new[name] = make()
        return self._new[name]

    @property
    def is_late(self) -> bool:
        """True if a run was trained in the workdir before facts were kept."""
        steps = self.workdir / "checkpoints" if self.workdir else None
        return not self._stored and steps is not None and steps.is_dir() and any(steps.iterdir())

    def stored(self, name: str) -> Any:
        """A fact (JSON) as the workdir keeps it; None if it keeps none."""
        return self._stored.get(name)

    def keep(self) -> None:
        """Writes the facts that were made, for those who read this workdir later."""
        if self.workdir:
            fitted.write(self.workdir, {k: v for k, v in self._new.items() if k not in self._stored})

    def _refuse(self, difference: str) -> None:
        if difference:
            raise InputError(
                f"data.name={self.config.data.name!r} is not what {self.workdir} was trained on: "
                f"{difference}; use the same data, or a new --workdir"
            )

    # ------------------------------------------------------------------------------------------- features

    @functools.cached_property
    def features(self) -> Mapping[str, Feature]:
        """The features of the dataset."""
        tree = self.get("features", lambda: as_json(labels.features(self.config)), compare=False)
        found = {
            key: Feature(tuple(one["shape"]), one["dtype"], one["num_classes"], tuple(one["names"]))
            for key, one in tree.items()
        }
        if self._training and "features" in self._stored:
            self.check(labels.features(self.config), found)
        return found

    def names(self, key: str) -> list[str]:
        """The different values of a text column in the training split, sorted; a value's id is its place."""
        names: list[str] = self.get(f"names of {key}", lambda: labels.names(self.config, key))
        return names

    def open(self, split: str, keys: Collection[str] | None = None) -> Source:
        """A split of the data, its columns read as those of training were.

        Raises:
            InputError: it lacks one that training used, or has it in another kind, or other classes.
        """
        stored = self.features if "features" in self._stored else {}
        text = [key for key, feature in stored.items() if feature.dtype == "text"]
        numbers = [key for key, feature in stored.items() if feature.dtype != "text"]
        source = labels.open_split(self.config, split, keys, text=text, numbers=numbers)
        if stored:
            was, now = (
                {key: x for key, x in features.items() if keys is None or key in keys}
                for features in (stored, source.features)
            )
            self.check(now, was)
        return source

    def check(self, now: Mapping[str, Feature], was: Mapping[str, Feature]) -> None:
        """Raises InputError where features that the config uses are not those of training."""
        before, after = (self._used(features) for features in (was, now))
        for key in after:
            if before.get(key, {}).get("names") and not after[key]["names"]:
                after[key] |= {name: before[key][name] for name in ("names", "num_classes")}
        self._refuse(fitted.difference(before, after, "column"))

    def _used(self, features: Mapping[str, Feature]) -> dict[str, dict[str, Any]]:
        d = self.config.data
        if d.name.startswith("table:"):
            used = [key for key in features if key not in d.ignore]
        else:
            used = [key for key in features if key in (d.label, d.text, d.group, *IMAGES)]
        return {
            key: {
                "kind": "text" if features[key].dtype == "text" else "numbers",
                "shape": list(features[key].shape[-1 if d.image_size else 0 :]) if key == "image" else [],
                "num_classes": features[key].num_classes,
                "names": list(features[key].names),
            }
            for key in used
        }


def as_json(features: Mapping[str, Feature]) -> dict[str, dict[str, Any]]:
    """Features as fitted.json holds them."""
    return {key: dataclasses.asdict(feature) for key, feature in features.items()}
