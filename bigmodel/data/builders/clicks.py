"""`clicks`: 120,000 rows of advertising by a known model, 13 numbers and 26 categories each; no download.

The shape is that of the Criteo data that DLRM was measured on; 3 % of the rows are clicks. The chance of a
click is the logistic function of a sum: of the first numbers, of effects of the first categories, and of
how two of them go together. So the best possible scores are known: on the test split a ROC-AUC of 0.903 and
a log loss of 0.0915.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

NUMBERS, CATEGORIES = 13, 26
SIZES = [4 * 2 ** (at % 8) for at in range(CATEGORIES)]  # 4 to 512 categories a column
ROWS = {"train": 100_000, "test": 20_000}


def rows(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """-> numbers float32 [n, 13], categories int64 [n, 26], the log odds of a click [n], bool [n] clicks."""
    effect = np.random.default_rng(0)
    slopes, tables = effect.normal(size=4), [effect.normal(size=size) for size in SIZES[:6]]
    p, q = effect.normal(size=(SIZES[1], 2)), effect.normal(size=(SIZES[2], 2))
    number = list(ROWS).index(split)
    rng = np.random.default_rng(1 + number)
    numbers = rng.normal(size=(ROWS[split], NUMBERS)).astype(np.float32)
    categories = np.stack([rng.integers(0, size, ROWS[split]) for size in SIZES], 1)
    odds = numbers[:, :4] @ slopes * 0.7 - 5.2
    for at, table in enumerate(tables):
        odds = odds + 0.6 * table[categories[:, at]]
    odds = odds + (p[categories[:, 1]] * q[categories[:, 2]]).sum(1)
    clicked = np.random.default_rng(3 + number).random(len(odds)) < 1 / (1 + np.exp(-odds))
    return numbers, categories, odds, clicked


class Clicks(tfds.core.GeneratorBasedBuilder):
    """`n0` ... `n12` float32, `c0` ... `c25` classes, `label` 0 or 1."""

    VERSION = tfds.core.Version("1.1.0")
    url_infos = None  # nothing is downloaded; see python_source.py

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel
        features: dict[str, Any] = {f"n{at}": np.float32 for at in range(NUMBERS)}
        features |= {f"c{at}": label(num_classes=size) for at, size in enumerate(SIZES)}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Clicks drawn from a known model of 13 numbers and 26 categories.",
            features=tfds.features.FeaturesDict({**features, "label": label(num_classes=2)}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in ROWS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        numbers, categories, _, clicked = rows(split)
        for at in range(len(clicked)):
            row: dict[str, Any] = {f"n{k}": numbers[at, k] for k in range(NUMBERS)}
            row |= {f"c{k}": int(categories[at, k]) for k in range(CATEGORIES)}
            yield at, {**row, "label": int(clicked[at])}
