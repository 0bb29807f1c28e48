"""Ranges of numbers in a config: (key, what is wrong and the fix) for each that is outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bigmodel.config import parsing

INT32, UINT32 = 2**31 - 1, 2**32 - 1
FLOAT32 = (1.2e-38, 3.4e38)  # the least and the largest that float32 holds in full


def size_problems(flat: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Numbers that the arrays of a run cannot hold: they would come out as others there.

    Args:
        flat: a config's values by dotted key.
    """
    for key, value in flat.items():
        if key.startswith("compiler_options"):
            continue
        most = UINT32 if key == "seed" else INT32
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, int) and abs(x) > most:
                yield key, f"is {x}: set it to {most} or less"
            if isinstance(x, float) and abs(x) > FLOAT32[1]:
                yield key, f"is {x}, more than float32 holds; set it below {FLOAT32[1]:g}"
            if isinstance(x, float) and 0 < abs(x) < FLOAT32[0]:
                yield key, f"is {x}, which is 0 as float32; set it to 0, or above {FLOAT32[0]:g}"


def data_problems(data: Any) -> Iterable[tuple[str, str]]:
    """Problems of the keys of `data`."""
    for key in ("min_count", "max_boxes"):
        if getattr(data, key) < 1:
            yield key, f"is {getattr(data, key)}: set it to 1 or more"
    for key in ("name", "split", "eval_split"):
        if not getattr(data, key).strip():
            yield key, "is empty; name one"
    for key in ("image_size", "mixup", "cutmix", "max_skipped"):
        if getattr(data, key) < 0:
            yield key, f"is {getattr(data, key)}: set it to 0 or more"
    if not 0 < data.eval_crop <= 1:
        yield "eval_crop", f"is {data.eval_crop}: choose a value above 0, up to 1"
    if not 0 < data.test_fraction < 1:
        yield "test_fraction", f"is {data.test_fraction}: choose a value between 0 and 1, such as 0.1"
    for pair in data.columns:
        if not all(pair.partition(":")):
            yield "columns", f"has {pair!r}; write NAME:COLUMN, such as user:userId"
    if data.std and min(data.std) <= 0:
        yield "std", f"is {data.std}: give numbers above 0, such as 0.229,0.224,0.225"


def optim_problems(optim: Any) -> Iterable[tuple[str, str]]:
    """Problems of the keys of `optim`, or of one of its groups."""
    for key in (
        "lr",
        "warmup_steps",
        "decay_steps",
        "end_lr",
        "eps",
        "weight_decay",
        "l1",
        "l2",
        "clip_norm",
    ):
        if getattr(optim, key) < 0:
            yield key, f"is {getattr(optim, key)}: set it to 0 or more"
    for key in ("b1", "b2", "ema_decay"):
        if not 0 <= getattr(optim, key) < 1:
            yield key, f"is {getattr(optim, key)}: choose a value from 0 to below 1"
    if optim.every < 1:
        yield "every", f"is {optim.every}: set it to 1 or more"
    yield from parsing.regex_problems(optim, "weight_decay_on", "penalty_on", "freeze", "on")
