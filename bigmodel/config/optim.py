"""The keys of `config.optim`, and the groups of parameters that differ in them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bigmodel.config import parsing, ranges
from bigmodel.config.parsing import InputError

COMMON = ("ema_decay", "freeze", "groups")  # keys that cannot differ from group to group


@dataclass(frozen=True)
class Optim:
    name: Literal["adamw", "adam", "sgd", "rmsprop", "adafactor", "lion", "muon"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "linear", "constant", "rsqrt", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd: length of the final decay; 0: a tenth of the run
    end_lr: float = 0.0  # the learning rate at the end, as a fraction of lr
    b1: float = 0.9  # momentum, for sgd, rmsprop, lion and muon too
    b2: float = 0.95
    eps: float = 1e-8  # of rmsprop outside the root, as PyTorch has it; TensorFlow's is inside
    nesterov: bool = False  # adam's is Dozat's (2016), without PyTorch's schedule of b1
    weight_decay: float = 0.0  # decoupled (AdamW) for every optimizer, times the learning rate
    weight_decay_on: str = r"/(kernel(/[ab])?|table)$"  # regex on parameter paths (adapters: /kernel/a, /b)
    l1: float = 0.0  # L1 penalty's coefficient, added as l1 * sign(p) to the gradient
    l2: float = 0.0  # L2 penalty's coefficient (not decoupled), added as l2 * p to the gradient
    penalty_on: str = r"/(kernel(/[ab])?|table)$"  # regex on parameter paths: which ones l1 and l2 touch
    clip_norm: float = 1.0  # by global norm; 0: off
    ema_decay: float = 0.0  # exponential moving average of the parameters, used by evaluation; 0: off
    freeze: str = ""  # regex on parameter paths: these stay as they are, without gradient; "": none
    every: int = 1  # steps from one update to the next; the gradients between are dropped
    # Parameters with an optimizer of their own: name -> {"on": regex on their paths, and the keys above that
    # differ there}, e.g. {"head": {"on": "^/head/", "lr": 1e-2}}; clip_norm is then of a group's gradients.
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @functools.cached_property
    def every_group(self) -> dict[str, Group]:
        """`groups` by name, filled in from the keys of this one.

        Raises:
            InputError: an unknown key, or a value of the wrong type.
        """
        fields = [field.name for field in dataclasses.fields(Optim)]
        base = {key: getattr(self, key) for key in fields if key not in COMMON}
        out = {}
        for name, changes in self.groups.items():
            prefix = f"optim.groups.{name}."
            if not isinstance(changes, Mapping):
                raise InputError(
                    f"{prefix[:-1]} is a group of keys, not a value; set one of them, e.g. {prefix}on"
                )
            if wrong := sorted(set(changes) & set(COMMON)):
                raise InputError(
                    f"{prefix}{wrong[0]} cannot differ from group to group; set optim.{wrong[0]}"
                )
            out[name] = parsing.build(Group, base | dict(changes), prefix)
        return out


@dataclass(frozen=True)
class Group(Optim):
    """One of `optim.groups` with all its keys."""

    on: str = ""  # regex on parameter paths such as /head/kernel


OTHERS = "others"  # the group of the parameters that no other group takes


def group_problems(name: str, group: Group) -> Iterable[tuple[str, str]]:
    if not re.fullmatch(r"\w+", name) or name == OTHERS:
        yield "on", f"is of a group called {name!r}; call it by letters and digits, and not {OTHERS!r}"
    if not group.on:
        yield "on", "is not set: give a regular expression on parameter paths, such as ^/head/"
    yield from ranges.optim_problems(group)
