"""Finds the parts of a model that pruning can remove: for each unit, all arrays that have a slice of it.

A family names its kinds of units, with the keys that become smaller (`Family.units`), and a walk along its
layers (`Family.walk`, in walks.py), which records which layers write each channel and which read it. Walks
take the number of channels from the arrays' shapes, so the same walk over the smaller model says how many
stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel.config.families import Family

Arrays = Mapping[str, Any]  # a model's arrays, or their specs, by path: params/... and rest/...


@dataclass(frozen=True)
class Cut:
    """The place of units in an array.

    `axis` (from the end) has, once or for each pixel of a flattened image: `start` other entries, then
    [units, `inner`] of these, then others up to a total of `of` (0: there are no others).
    """

    path: str
    axis: int
    inner: int = 1
    start: int = 0
    of: int = 0

    def places(self, size: int, count: int) -> np.ndarray:
        """Returns the indices [units, entries of each] along an axis of this size."""
        each = np.arange(count)[:, None] * self.inner + np.arange(self.inner)
        pixels = np.arange(0, size, self.of or count * self.inner)
        return self.start + (pixels[:, None] + each[:, None]).reshape(count, -1)


@dataclass(frozen=True)
class Units:
    """Interchangeable units, and every array that has a slice of each.

    Each index of the `lead` leading dimensions (a stack's depth, experts) keeps its own units, equally many.
    """

    count: int
    cuts: tuple[Cut, ...]
    lead: int = 0


def find(c: Family, unit: str, arrays: Arrays) -> list[Units]:
    """Returns the units of a model of `config.model` c; `unit` is one of `c.units`, but not `layers`."""
    walk = Walk(arrays, unit)
    c.walk(walk)
    return walk.units()


def fewer(c: Family, unit: str, amount: float) -> dict[str, Any]:
    """Returns the keys of `config.model` that change when `amount` of the units is removed."""
    changes: dict[str, Any] = {}
    for key in c.units[unit]:
        value = getattr(c, key)
        if isinstance(value, tuple):
            changes[key] = tuple(_left(count, amount) for count in value)
        else:
            changes[key] = _left(value, amount) if isinstance(value, int) else value * (1 - amount)
        if key in FOLLOWS:
            changes[FOLLOWS[key]] = changes[key] * getattr(c, FOLLOWS[key]) // value
    return changes


FOLLOWS = {"kv_heads": "heads", "groups": "width"}  # so many heads for each of keys and values, and so on
EVEN = 8  # widths above eight times this stay multiples of it, which suits matrix units


def _left(count: int, amount: float) -> int:
    left = max(round(count * (1 - amount)), 1)
    return round(left / EVEN) * EVEN if left >= EVEN * EVEN else left


# --------------------------------------------------------------------------------------------------- walks


@dataclass
class Made:
    """Channels that some layers write, `count` x `inner` of them, and the cuts found so far."""

    count: int
    inner: int
    cuts: list[Cut]


Stream = list[Made]  # the channels of a value that flows through a model; several layers' are concatenated
KERNELS = ("kernel", "layer/kernel", "conv/kernel", "rows", "table")  # below a layer's path; the first there
OTHERS = (
    "params/{}/bias", "params/{}/scale", "params/{}/norm/scale", "params/{}/norm/bias", "rest/{}/u",
    "rest/{}/mean", "rest/{}/var", "rest/{}/norm/mean", "rest/{}/norm/var",
)  # fmt: skip


class Walk:
    """Records which channels each layer of a model writes and reads. Layers are named by their paths."""

    def __init__(self, arrays: Arrays, unit: str):
        """`unit`: the kind of units that are sought."""
        self.arrays, self.unit = arrays, unit
        self._made: list[Made] = []
        self._added: list[Units] = []

    def add(self, units: Iterable[Units]) -> None:
        """Adds units that are known without a walk."""
        self._added += units

    def make(self, *layers: str, count: int = 0, inner: int = 1, start: int = 0, of: int = 0) -> Stream:
        """Starts the stream that a layer writes, or several whose outputs are added or multiplied.

        Args:
            count: channels, if the layer also writes others, or an image of them.
            inner: channels that go together.
            start, of: offset of the stream in the layer's output, and the size of that output.
        """
        count = count or self.arrays[self.kernel(layers[0])].shape[-1]
        self._made.append(Made(count // inner, inner, []))
        stream = [self._made[-1]]
        for layer in layers:
            self.also(stream, layer, start=start, of=of)
        return stream

    def also(self, stream: Stream, *layers: str, start: int = 0, of: int = 0) -> None:
        """Adds layers that also write the stream: by adding their outputs, or by scaling its channels."""
        for layer in layers:
            paths = [self.kernel(layer), *(path.format(layer) for path in OTHERS)]
            for path in paths:
                self._note(stream, path, -1, start, of)

    def read(self, stream: Stream, *layers: str, axis: int = -2, start: int = 0, of: int = 0) -> None:
        """Adds layers that read the stream along `axis` of their kernels; `start` and `of` as in `make`."""
        for layer in layers:
            self._note(stream, self.kernel(layer), axis, start, of)

    def chain(self, *layers: str) -> None:
        """Adds layers that each read the one before, and only that one."""
        for before, layer in itertools.pairwise(layers):
            self.read(self.make(before), layer)

    def units(self) -> list[Units]:
        return [*self._added, *(Units(made.count, tuple(made.cuts)) for made in self._made)]

    def kernel(self, layer: str) -> str:
        """Returns the path of a layer's weight, or "" if there is no such layer."""
        paths = (f"params/{layer}/{name}" for name in KERNELS)
        return next((path for path in paths if path in self.arrays), "")

    def _note(self, stream: Stream, path: str, axis: int, start: int, of: int) -> None:
        if path in self.arrays:
            of = of or sum(made.count * made.inner for made in stream)
            for made in stream:
                made.cuts.append(Cut(path, axis, made.inner, start, of))
                start += made.count * made.inner
