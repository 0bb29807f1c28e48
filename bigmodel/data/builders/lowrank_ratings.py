"""`lowrank_ratings`: 80,000 ratings drawn from a known model of low rank; no download.

rating = 3.5 + user bias + item bias + p q + noise of standard deviation `NOISE`. So no predictor has a mean
squared error below NOISE ** 2 in expectation. A user rates more often what it likes (by the softmax of its
preferences), so that choices can be learned as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

USERS, ITEMS, RANK, EACH = 1000, 300, 3, 80
NOISE = 0.5
CHOICE = 1.5  # a preference's weight in what is chosen


def preferences() -> np.ndarray:
    """float64 [USERS, ITEMS]: the ratings without noise."""
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(USERS, RANK)), rng.normal(size=(ITEMS, RANK))
    biases = 0.3 * rng.normal(size=(USERS, 1)) + 0.3 * rng.normal(size=(1, ITEMS))
    return 3.5 + biases + p @ q.T * (0.8 / RANK**0.5)


class LowrankRatings(tfds.core.GeneratorBasedBuilder):
    """`user`, `item` int64, `rating` float32, `timestamp` int64; one split, which readers part themselves."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; see python_source.py

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Ratings drawn from a model of rank 3, whose smallest possible error is known.",
            features=tfds.features.FeaturesDict(
                {"user": np.int64, "item": np.int64, "rating": np.float32, "timestamp": np.int64}
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        rng = np.random.default_rng(1)
        mean = preferences()
        drawn = CHOICE * mean + rng.gumbel(size=mean.shape)  # the largest: a choice without replacement
        for user in range(USERS):
            chosen = rng.permutation(np.argsort(-drawn[user])[:EACH])  # any of them may be the last in time
            for time, item in enumerate(chosen.tolist()):
                rating = np.float32(mean[user, item] + NOISE * rng.normal())
                yield user * EACH + time, {"user": user, "item": item, "rating": rating, "timestamp": time}
