"""A study as a command orders it: a config, the settings to try, the metric that ranks them.

Everything is checked here, before the first trial starts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bigmodel import config as config_lib
from bigmodel.config import Config, InputError
from bigmodel.study import trials
from bigmodel.study.trials import Range, Settings, Space

LOWER = re.compile(r"(loss|nll|perplexity|bits_per_byte|mse|rmse|mae|frechet\w*|gap\w*)$")  # is better
SAMPLERS = ("tpe", "random")
PRUNERS = ("none", "median", "halving")


@dataclass(frozen=True)
class Definition:
    """The parts of a study that stay as they are from one command to the next."""

    config: str  # FILE[:ARGS]
    overrides: tuple[str, ...]  # of every trial
    metric: str  # of an evaluation, such as eval/test/loss
    maximize: bool
    sampler: str = ""  # "": a grid
    space: tuple[str, ...] = ()  # of a search, as --over gives it; a grid may grow
    prune: str = "none"
    seed: int = 0  # of the sampler

    def __post_init__(self) -> None:
        for flag, value, known in (("search", self.sampler, ("", *SAMPLERS)), ("prune", self.prune, PRUNERS)):
            if value not in known:
                raise InputError(f"--{flag}={value} is unknown; choose of {', '.join(filter(None, known))}")


@dataclass(frozen=True)
class Order:
    """The config, the settings and the number of trials."""

    definition: Definition
    space: Space
    grid: tuple[Settings, ...]  # () for a search
    count: int  # trials in all

    def config(self, settings: Settings) -> Config:
        """The config of one trial. Raises InputError, which names the trial."""
        items = [*self.definition.overrides, *(f"{key}={value}" for key, value in settings.items())]
        try:
            return config_lib.load(self.definition.config, items)
        except InputError as error:
            raise InputError(f"trial {described(settings)}: {error}") from error

    def command(self, train: Sequence[str], settings: Settings) -> list[str]:
        """The command that trains one trial; it lacks --workdir.

        Args:
            train: runs scripts/train.py.
        """
        items = [*self.definition.overrides, *(f"{key}={value}" for key, value in settings.items())]
        return [*train, f"--config={self.definition.config}", *(f"--config.{item}" for item in items)]

    def corners(self) -> list[Settings]:
        """Settings by which a search is priced: each value in turn, ranges at both ends."""
        if not self.definition.sampler:
            return []
        first = {key: values[0] for key, values in self.space.values.items()}
        ends = [
            first | {key: _end(each, high) for key, each in self.space.ranges.items()}
            for high in (False, True)
        ]
        others = [
            {**ends[0], key: value} for key, values in self.space.values.items() for value in values[1:]
        ]
        return [*ends, *others]


def read(
    file: str, overrides: Sequence[str], *, over: Sequence[str], search: str, metric: str, prune: str
) -> Order:
    """Reads the flags of scripts/sweep.py.

    Args:
        file: FILE[:ARGS] of a config.
        overrides: KEY=VALUE, of every trial.
        over: KEY=VALUES; none: the trials of the config's own `sweep()`.
        search: `tpe:N` or `random:N`, N trials; "": a grid.
        metric: of an evaluation; a leading `-`: the lowest is best; "": the loss.
        prune: one of PRUNERS.

    Raises:
        InputError: a flag is wrong, or the config of a trial.
    """
    base = config_lib.load(file, overrides)
    sampler, count = _search(search)
    space = trials.parse(over)
    own = trials.of_config(config_lib.sweep(file)) if not over else []
    if space.ranges and not sampler:
        key = next(iter(space.ranges))
        raise InputError(f"--over={key}=LOW..HIGH is for --search=tpe:40; without it, give {key}=a,b,c")
    if sampler and not over:
        raise InputError("--search needs --over=KEY=LOW..HIGH or KEY=a,b,c, once or more")
    if not sampler and not over and not own:
        raise InputError(f"{file} has no sweep(); give --over=KEY=a,b,c")
    grid = () if sampler else tuple(own or space.grid())
    name, maximize = _metric(base, metric)
    definition = Definition(
        file, tuple(overrides), name, maximize, sampler, tuple(over) if sampler else (), prune, base.seed
    )
    order = Order(definition, space, grid, count or len(grid))
    for settings in [*grid, *order.corners()]:
        order.config(settings)
    return order


def _metric(base: Config, text: str) -> tuple[str, bool]:
    """The name of a metric, and if its highest value is the best."""
    sets = [f"eval/{each}/" for each in config_lib.eval_sets(base)]
    name = text or f"{sets[0]}loss"
    plain = name.lstrip("-")
    if not plain.startswith(tuple(sets)):
        raise InputError(f"--metric={text}: name one of an evaluation, such as {sets[0]}loss")
    return plain, not name.startswith("-") and not LOWER.search(plain)


def _search(text: str) -> tuple[str, int]:
    if not text:
        return "", 0
    found = re.fullmatch(r"(tpe|random):(\d+)", text)
    if not found or int(found[2]) < 1:
        raise InputError(f"--search={text}: give tpe:N or random:N, with N trials, 1 or more")
    return found[1], int(found[2])


def _end(each: Range, high: bool) -> str:
    value = each.high if high else each.low
    return str(int(value)) if each.integer else f"{value:.6g}"


def described(settings: Settings) -> str:
    """`optim.lr=0.01, seed=2`."""
    return ", ".join(f"{key}={value}" for key, value in settings.items())
