"""A budget -> the run that it is best spent on: size, tokens, batch, mesh, remat and microbatches together.

For a size, the target's price of a token says how many tokens the budget buys, and a scaling law the loss of
so many parameters and tokens. A closed form prices every size; a few are compiled, each time the best by the
closed form as the compiled ones correct it, until the best is compiled, and the sizes next to it too.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigmodel import config as config_lib
from bigmodel import disk, tasks, units
from bigmodel import mesh as mesh_lib
from bigmodel.config import Config, InputError
from bigmodel.config.families import GPT
from bigmodel.plan import machine as machine_lib
from bigmodel.plan import planner, search, target
from bigmodel.plan import receipt as receipts
from bigmodel.plan.candidates import OVER, Candidate, candidates, name, overrides
from bigmodel.plan.receipt import Receipt
from bigmodel.study import laws, shapes
from bigmodel.study.laws import Law
from bigmodel.study.shapes import Shape

SHARE = (
    0.95  # of time, energy and dollars, for steps; the rest is for starting, compiling, evaluating and saving
)
REACH = (1 / 8, 3.0)  # sizes that are looked at, times the best one of a machine at `machine.flops_per_s`
MESHES = 1  # further meshes of the best size to compile
PUBLISHED_FLOPS = (6e18, 3e21)  # of the runs behind published coefficients (Hoffmann et al. 2022, figure 3)
LISTED = 4  # sizes that were not compiled, in the table
CHOSEN = (*(f"model.{key}" for key in shapes.KEYS), "microbatches", "remat", "steps", "budget")


@dataclass(frozen=True)
class Offer:
    """A size with the price of training it: by the compiler, or by the closed form as others correct it."""

    shape: Shape
    config: Config
    params: float  # active ones, which laws count
    step: Receipt  # the price of one step
    receipt: Receipt | None  # of its compiled step
    tokens_per_step: float
    steps: int = 0
    loss: float = math.inf
    low: float = math.nan
    high: float = math.nan

    @property
    def tokens(self) -> float:
        return self.steps * self.tokens_per_step

    def of_run(self, key: str) -> float:
        """The price of all steps."""
        return float(self.steps * self.step[key])


@dataclass(frozen=True)
class Choice:
    """Offers by predicted loss, and how they were found."""

    compiled: tuple[Offer, ...]  # the best first
    others: tuple[Offer, ...]  # priced by the closed form
    left_out: int  # sizes that do not fit the target
    compilations: int
    seconds: float
    at_the_edge: bool  # of the sizes that were looked at

    @property
    def best(self) -> Offer:
        return self.compiled[0]


@dataclass
class Buyer:
    """Chooses among sizes by what a budget buys of each.

    Args:
        estimate, compile: a size's offer, with the price of a step; None where it does not fit.
    """

    law: Law
    cap: units.Cap
    estimate: Callable[[Shape], Offer | None]
    compile: Callable[[Shape], Offer | None]
    most: int = 4  # compilations of sizes
    compiled: dict[Shape, Offer | None] = field(default_factory=dict)

    def run(self, sizes: Sequence[Shape]) -> tuple[list[Offer], list[Offer]]:
        """-> offers that were compiled, and those that were not; each with the lowest loss first."""
        rough = {shape: offer for shape in sizes if (offer := self.estimate(shape)) is not None}
        order = sorted(rough, key=lambda shape: rough[shape].params)
        while len(self.compiled) < self.most and (shape := self._next(rough, order)):
            self.compiled[shape] = self.compile(shape)
        made = [self.worth(offer) for offer in self.compiled.values() if offer is not None]
        others = [self._corrected(rough[shape]) for shape in order if shape not in self.compiled]
        return sorted(made, key=_loss), sorted(others, key=_loss)

    def _next(self, rough: dict[Shape, Offer], order: list[Shape]) -> Shape | None:
        """The size to compile now: the best if it was not yet, else the better one next to it."""
        offers = {
            shape: self._corrected(rough[shape]) if shape not in self.compiled else self.worth(made)
            for shape in order
            if (made := self.compiled.get(shape, rough[shape])) is not None
        }
        if not offers:
            return None
        best = min(offers, key=lambda shape: offers[shape].loss)
        if best not in self.compiled:
            return best
        fitting = list(offers)
        at = fitting.index(best)
        near = [shape for shape in fitting[max(at - 1, 0) : at + 2] if shape not in self.compiled]
        return min(near, key=lambda shape: offers[shape].loss, default=None)

    def _corrected(self, rough: Offer) -> Offer:
        """An estimate, off by as much as that of the compiled size nearest to it."""
        made = [offer for offer in self.compiled.values() if offer is not None]
        if made:
            nearest = min(made, key=lambda offer: abs(math.log(offer.params / rough.params)))
            known = self.estimate(nearest.shape)
            assert known is not None
            both = [key for key in known.step if known.step[key] and key in nearest.step]
            factor = {key: nearest.step[key] / known.step[key] for key in both}
            step = {key: x * factor.get(key, 1.0) for key, x in rough.step.items()}
            rough = dataclasses.replace(rough, step=step)
        return self.worth(rough)

    def worth(self, offer: Offer) -> Offer:
        """An offer with the steps that the budget buys, and their predicted loss; infinite without a step."""
        share = 1.0 if self.cap.key == "total_flops" else SHARE
        steps = int(self.cap.amount * share // offer.step[self.cap.key])
        offer = dataclasses.replace(offer, steps=steps)
        if not steps:
            return offer
        loss, low, high = (
            float(x[0]) for x in laws.predict(self.law, np.array([offer.params]), np.array([offer.tokens]))
        )
        return dataclasses.replace(offer, loss=loss, low=low, high=high)


def _loss(offer: Offer) -> float:
    return offer.loss


def batch_size(flops: float, seq_len: int, devices: int) -> int:
    """Examples a step for a run of so many FLOPs: 0.2920 C^0.3271 tokens (DeepSeek-AI 2024, arXiv 2401.02954,
    equation 1), as a power of two times what divides over the devices."""
    odd = devices // (devices & -devices)
    wanted = 0.2920 * flops**0.3271 / seq_len / odd
    return odd * 2 ** max(round(math.log2(max(wanted, 1.0))), 0)


def read_law(name: str, group: str = "") -> Law:
    """Reads the one law that predicts a run by all its parameters.

    Args:
        name: as `laws.read` takes it.
        group: of several laws the one to take.

    Raises:
        InputError: there are several, or it counts parameters otherwise; and as `laws.read`.
    """
    found, columns = laws.read(name)
    if group not in found:
        groups = ", ".join(map(repr, found))
        raise InputError(f"{name} has the laws of {groups}: choose one by --group")
    if columns["params"] != "params":
        raise InputError(f"{name} counts parameters by {columns['params']!r}; fit a law to the column params")
    return found[group]


class Market:
    """Prices of a config's sizes on a target, by the closed form and by the target's compiler."""

    def __init__(
        self, load: Callable[[dict[str, str]], Config], spec: str, assume: dict[str, float],
        say: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        """Args:
        load: settings -> the config with them.
        spec, assume: as `planner.plan` takes them.
        say: called with a line before each compilation.
        """
        self.load, self.assume, self.say = load, assume, say
        self.base = tasks.sized(load({}))
        self.aim = target.of(self.base, spec)
        self.machine = machine_lib.of(self.aim)
        self.capacity = self.machine.capacity_bytes or math.inf
        self.keys: dict[str, str] = {}  # settings of every size, such as the batch's
        self.second = receipts.of_a_second(self.machine, self.base.assume.given | assume)
        self.compilations = 0
        self._rough: dict[Shape, Offer | None] = {}
        self._order: dict[Shape, list[Candidate]] = {}

    def flops(self, cap: units.Cap) -> float:
        """The FLOPs that a budget buys at a guessed speed. Raises InputError where the price is not known."""
        if cap.key == "total_flops":
            return cap.amount
        receipts.affordable(self.base.replace(budget=cap.text), self.second)
        count = len(self.aim.devices)
        meshed = self.base.replace(batch_size=count, mesh=config_lib.Mesh(data=count))
        mesh = mesh_lib.make_mesh(meshed, self.aim.devices)
        speed = count * self.machine.flops_per_s(mesh, self.base.compute_dtype)
        return cap.amount * SHARE / self.second[cap.key] * speed

    def estimate(self, shape: Shape) -> Offer | None:
        """A size's price by the closed form, on its best mesh; None where none has memory for it."""
        if shape not in self._rough:
            config = tasks.sized(self.load(shape.keys() | self.keys))
            found = [c for c in candidates(config, self.aim, OVER[:2]) if c.least_bytes <= self.capacity]
            found.sort(key=lambda c: (c.likely_bytes > self.capacity, c.step_s))
            self._order[shape] = search.thinned(found, self.capacity)
            self._rough[shape] = self._by_closed_form(shape, found[0]) if found else None
        return self._rough[shape]

    def _by_closed_form(self, shape: Shape, found: Candidate) -> Offer:
        config, model = found.config, found.config.model
        assert isinstance(model, GPT)
        params, tokens = shapes.parameters(model, config.seq_len, shape), config.batch_size * config.seq_len
        flops = (model.flops_per_token(config.seq_len) or 6 * params) * tokens
        prices = ("total_s", "chip_hours", "kwh", "dollars")
        step = {key: found.step_s * self.second[key] for key in prices if key in self.second}
        return Offer(shape, config, params, step | {"total_flops": flops}, None, tokens)

    def compile(self, shape: Shape) -> Offer | None:
        """A size's price by the target's compiler; None where it fits on none of the likeliest meshes."""
        while self._order[shape]:
            self.compilations += 1
            found = self._order[shape].pop(0)
            self.say(f"compiling {shape}: {name(found.config)} ...")
            try:
                made = planner.on(found.config, self.aim, assume=self.assume, advise=False).receipt
            except InputError:
                continue
            step = {key: made[key] / made["steps"] for key, _ in units.SPENT.values() if key in made}
            return Offer(shape, found.config, made["active_parameters"], step, made, made["tokens_per_step"])
        return None


def choose(market: Market, law: Law, cap: units.Cap, most: int = 4) -> Choice:
    """Returns the sizes that a budget buys on a market, ranked by the loss that a law predicts.

    Args:
        most: sizes to compile; of the best one MESHES further meshes.

    Raises:
        InputError: nothing fits, a price that is not known, or a budget too small for the smallest size.
    """
    began, flops = time.perf_counter(), market.flops(cap)
    config, devices = market.base, len(market.aim.devices)
    if "batch_size" not in market.keys:
        market.keys["batch_size"] = str(batch_size(flops, config.seq_len, devices))
    best = laws.optimal(law, flops).params
    sizes = shapes.between(config, best * REACH[0], best * REACH[1])
    buyer = Buyer(law, cap, market.estimate, market.compile, most)
    compiled, others = buyer.run(sizes)
    if not compiled or not compiled[0].steps:
        span = f"{units.quantity(best * REACH[0])}to {units.quantity(best * REACH[1])}parameters"
        raise InputError(
            f"--budget={cap.text}: {market.aim.spec} has no memory for {len(sizes)} sizes from {span}, "
            "or the budget pays no step; give a larger one, another target or a smaller --config.batch_size"
        )
    for _ in range(MESHES):
        if (offer := market.compile(compiled[0].shape)) is not None:
            compiled = sorted([*compiled, buyer.worth(offer)], key=_loss)
    left_out = [s for s in sizes if market.estimate(s) is None or buyer.compiled.get(s, s) is None]
    seconds = time.perf_counter() - began
    edge = compiled[0].shape in (sizes[0], sizes[-1])
    return Choice(tuple(compiled), tuple(others), len(left_out), market.compilations, seconds, edge)


def settings(best: Offer, base: Config) -> dict[str, str]:
    """The keys that make a run of an offer, in place of the base config's."""
    flags = [flag.removeprefix("--config.").partition("=") for flag in overrides(best.config)]
    found = best.shape.keys() | {key: value for key, _, value in flags}
    if base.optim.warmup_steps > (tenth := max(best.steps // 10, 1)):
        found["optim.warmup_steps"] = str(tenth)
    return found


def plain(offer: Offer, base: Config) -> dict[str, Any]:
    """An offer as plain values, fit for JSON."""
    keys = ("params", "tokens", "steps", "loss", "low", "high")
    row = {key: getattr(offer, key) for key in keys} | {"compiled": offer.receipt is not None}
    row |= {"settings": settings(offer, base)}
    row |= {key: offer.of_run(key) for key in offer.step}
    return disk.without_nan(row | ({"receipt": offer.receipt} if offer.receipt else {}))


def table(choice: Choice, law: Law, cap: units.Cap, spec: str) -> list[str]:
    """The choice as lines: offers by predicted loss, what was left out, and the prediction's grounds."""
    share = "" if cap.key == "total_flops" else f", {SHARE:.0%} of it for steps"
    heads = f"{'loss':>8} {'interval':>16} {'params':>9} {'tokens':>9} {'steps':>9} {'step':>9} {'MFU':>6}"
    rest = f"{len(choice.others)} more sizes (~) by the closed form, corrected; {choice.left_out} do not fit"
    return [
        f"budget    {cap} on {spec or 'this machine'}{share}",
        f"  {'':3}{heads} {'memory':>9}",
        *(_row(rank, offer) for rank, offer in enumerate(choice.compiled, 1)),
        *(_row("~", offer) for offer in choice.others[:LISTED]),
        f"  {choice.compilations} compiled in {units.duration(choice.seconds)}; {rest}",
        f"cost      {_cost(choice.best)}",
        f"law       {law.about.get('source') or law.about.get('form')}",
        *(f"          {note}" for note in notes(choice, law)),
    ]


def _row(mark: object, offer: Offer) -> str:
    made = offer.receipt or {}
    interval = "" if math.isnan(offer.low) else f"{offer.low:.3f} to {offer.high:.3f}"
    mfu = f"{made['mfu_full_attention']:.1%}" if "mfu_full_attention" in made else "-"
    memory = units.size(made["peak_bytes"]) if made else "-"
    counts = f"{units.quantity(offer.params):>9} {units.quantity(offer.tokens):>9} {offer.steps:>9,}"
    step = f"{units.seconds(offer.step['total_s']):>9} {mfu:>6} {memory:>9}"
    return (
        f"  {mark:<3}{offer.loss:>8.4f} {interval:>16} {counts} {step}  {offer.shape}; {name(offer.config)}"
    )


def _cost(best: Offer) -> str:
    price = {key: best.of_run(key) for key in best.step}
    parts = [units.duration(price["total_s"]), f"{units.quantity(price['total_flops'])}FLOP"]
    named = {"chip_hours": "{:,.4g} chip-hours", "kwh": "{:,.4g} kWh", "dollars": "${:,.2f}"}
    parts += [text.format(price[key]) for key, text in named.items() if key in price]
    return ", ".join(parts) + (f"; {best.receipt['time_source']}" if best.receipt else "")


def notes(choice: Choice, law: Law) -> list[str]:
    """Grounds and limits of the predicted loss, a line each."""
    best, about = choice.best, law.about
    flops, chance = 6 * best.params * best.tokens, math.log(max(best.config.model.vocab_size, 2))
    least, most = about.get("flops", PUBLISHED_FLOPS)
    runs = f"{law.level:.0%}, by {len(law.resamples):,} resamples of its {about.get('runs')} runs"
    published = "published coefficients, of other data and tokens: the order counts, not the loss"
    every = {
        published: math.isnan(best.low),
        f"interval: {runs}; it knows the law's uncertainty and its runs' noise": not math.isnan(best.low),
        f"extrapolated: {flops / most:.3g} times the FLOPs of its largest run": flops > most,
        f"extrapolated: its smallest run has {least / flops:.3g} times these FLOPs": flops < least,
        f"a loss above {chance:.3g}, that of guessing among the vocabulary: it is not of such tokens": (
            best.loss > chance
        ),
        "the best size is at the edge of those that were looked at": choice.at_the_edge,
        "it is of data that do not repeat, and of a learning rate that suits the size: tune optim.lr": True,
    }
    return [note for note, is_so in every.items() if is_so]
