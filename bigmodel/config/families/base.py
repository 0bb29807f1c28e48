"""What several families ask of their keys, and the tasks that come in groups."""

from __future__ import annotations

from collections.abc import Iterable

LABEL_TASKS = ("classify", "multilabel", "regress")  # of one output an example: an image, a text, a row
TOKEN_TASKS = ("lm", "mlm", "seq2seq")  # on sequences of seq_len tokens


def positive(model: object, *keys: str) -> Iterable[tuple[str, str]]:
    """Problems of keys that hold a positive number, or one or more of them."""
    for key in keys:
        value = getattr(model, key)
        if isinstance(value, tuple):
            if not value or min(value) < 1:
                yield key, f"is {value}: give one or more positive numbers, e.g. 64,128"
        elif value < 1:
            yield key, f"is {value}: set it to 1 or more"


def rate(model: object, key: str = "dropout") -> Iterable[tuple[str, str]]:
    if not 0 <= getattr(model, key) < 1:
        yield key, f"is {getattr(model, key)}: choose 0 <= {key} < 1"


def at_least_0(model: object, *keys: str) -> Iterable[tuple[str, str]]:
    for key in keys:
        if getattr(model, key) < 0:
            yield key, f"is {getattr(model, key)}: set it to 0 or more"


def above_0(model: object, *keys: str) -> Iterable[tuple[str, str]]:
    for key in keys:
        if getattr(model, key) <= 0:
            yield key, f"is {getattr(model, key)}: set it above 0"
