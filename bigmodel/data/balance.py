"""Class balance: how often each class is drawn and how much it weighs, for images, text and tables."""

from __future__ import annotations

import functools

import numpy as np

from bigmodel.data import transforms

DRAWS, EPOCHS = 3, 8  # streams of `transforms.generator`
POWERS = {"balanced": 0.0, "sqrt": 0.5}


def order(balance: str, labels: np.ndarray, seed: int) -> Balanced | Resampled:
    """The order that `data.balance` asks for; `labels` is the class of every example, int (n,)."""
    if balance in POWERS:
        return Balanced(labels, POWERS[balance], seed)
    return Resampled(labels, balance == "over", seed)


def class_weights(counts: np.ndarray) -> np.ndarray:
    """(K,) counts -> n / (classes present * count), so that all classes weigh alike; 0 for an absent one."""
    present = counts > 0
    weights = counts.sum() / (max(present.sum(), 1) * np.maximum(counts, 1))
    return np.where(present, weights, 0).astype(np.float32)


class Balanced:
    """An endless order: its class drawn with probability ~ count ** power.

    power 0 is balanced, 0.5 square-root sampling (Mahajan et al. 2018). Drawn with replacement: rare classes
    come over and over, frequent ones lose some examples. A pure function of seed and position.
    """

    def __init__(self, labels: np.ndarray, power: float, seed: int) -> None:
        self._by_class = np.argsort(labels, kind="stable")
        self._counts = np.bincount(labels)
        self._starts = np.cumsum(self._counts) - self._counts
        chance = np.where(self._counts > 0, np.maximum(self._counts, 1).astype(float) ** power, 0)
        self._upto = np.cumsum(chance / chance.sum())
        self._draw = functools.partial(transforms.generator, seed, stream=DRAWS)

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Returns the examples at int64 positions of the order."""
        return np.array([self._at(position) for position in positions.tolist()], np.int64)

    def _at(self, position: int) -> int:
        a, b = self._draw(position).random(2)
        kind = min(int(np.searchsorted(self._upto, a * self._upto[-1], "right")), len(self._counts) - 1)
        return int(self._by_class[self._starts[kind] + int(b * self._counts[kind])])


class Resampled:
    """An endless order in epochs, with as many examples of each class as the largest or the smallest has.

    Over-sampling repeats the examples of rare classes, each as often as any other, and loses none;
    under-sampling draws from frequent classes, without replacement and anew in each epoch. A pure function of
    seed and position.
    """

    def __init__(self, labels: np.ndarray, over: bool, seed: int) -> None:
        groups = [np.flatnonzero(labels == kind) for kind in np.unique(labels)]
        each = max(map(len, groups)) if over else min(map(len, groups))
        self._length = each * len(groups)

        @functools.lru_cache(maxsize=2)
        def epoch(number: int) -> np.ndarray:
            random = transforms.generator(seed, number, EPOCHS)
            drawn = [np.resize(random.permutation(group), each) for group in groups]
            return random.permutation(np.concatenate(drawn))

        self._epoch = epoch

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Returns the examples at int64 positions of the order."""
        numbers, at = np.divmod(positions, self._length)
        return np.array([self._epoch(n)[i] for n, i in zip(numbers, at, strict=True)], np.int64)
