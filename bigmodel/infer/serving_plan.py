"""Plans serving a language model on a target: the largest batch and context, latencies, prices.

The two programs that `decoder.Decoder` runs (`decode.jitted`: a prompt's prefill, and the loop that decodes,
both with sampling) are compiled for the target and walked for greedy ids, as a training step is by `planner`.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel import mesh, units
from bigmodel.config import Config, InputError
from bigmodel.infer import decode
from bigmodel.infer.decode import LanguageModel
from bigmodel.plan import compiled as compiled_lib
from bigmodel.plan import estimate, planner, target
from bigmodel.plan import machine as machine_lib
from bigmodel.plan.target import Target
from bigmodel.program import Program

Receipt = dict[str, Any]
TRIES = 4  # batch sizes that are compiled until one fits
STEP = 8  # factor between two batch sizes of the curve


@dataclasses.dataclass(frozen=True)
class Cost:
    """A program on the target: its seconds, and bytes of one device at its peak."""

    time_s: float
    peak_bytes: float
    how: str


def plan(
    config: Config, spec: str = "", *, prompt: int = 0, assume: Mapping[str, float] | None = None
) -> Receipt:
    """Plans serving `config` on the target `spec` ("": the devices of this job).

    Args:
        prompt: ids of a prompt; 0: half of the context.
        assume: `dollars_per_chip_hour`, in place of the chip's list price.

    Raises:
        InputError: no such target, a model without a cache, or one row that does not fit.
    """
    if config.task.generates != "continuation" or not config.model.cached_layers:
        raise InputError(
            f"--mode=serve is for Transformers of task.name=lm, not model.name={config.model.name} with "
            f"task.name={config.task.name}"
        )
    context = decode.context(config)
    prompt = prompt or max(context // 2, 1)
    if not 1 <= prompt < context:
        raise InputError(f"--prompt={prompt}: choose 1 to {context - 1}, less than seq_len")
    aim = target.of(config, spec)
    built = planner.build(config, aim)
    compiler, capacity = Compiler(built, aim), machine_lib.of(aim).capacity_bytes
    one = compiler.decode(compiler.ways)
    batch, many = _largest(compiler, one, capacity)
    read = compiler.prefill(prompt)
    row = compiler.row_bytes
    curve = [_point(compiler, rows, assume or {}) for rows in _batches(compiler, batch)]
    out: Receipt = {
        "mode": "serve", "target": aim.spec, "devices": built.mesh.size, "how": many.how, "context": context,
        "prompt": prompt, "weights_bytes": estimate.tree_bytes(compiler.weights),
        "cache_bytes_per_token": row / context, "capacity_bytes": capacity,
        "context_at_batch_1": min(_room(capacity, one, row, context), context),
        "room_at_batch_1": _room(capacity, one, row, context), "prefill_s": read.time_s,
        "token_s_at_batch_1": one.time_s, "curve": curve,
    }  # fmt: skip
    return {**out, **curve[-1]}


def _batches(compiler: Compiler, largest: int) -> list[int]:
    """The smallest batch, times 8, times 64 and so on, and the largest."""
    rows = [compiler.ways]
    while rows[-1] * STEP < largest:
        rows.append(rows[-1] * STEP)
    return sorted({*rows, largest})


def _point(compiler: Compiler, batch: int, assume: Mapping[str, float]) -> Receipt:
    """Decoding at one batch size: a point of the curve."""
    cost = compiler.decode(batch)
    tokens_per_s = batch / cost.time_s
    return {
        "batch": batch, "peak_bytes": cost.peak_bytes, "token_s": cost.time_s, "tokens_per_s": tokens_per_s,
        **_price(compiler.aim, compiler.built, tokens_per_s, assume),
    }  # fmt: skip


def table(r: Receipt) -> list[str]:
    """Formats a receipt as lines."""
    size, where = units.size, r["target"] or "this machine"
    room = f" of {size(r['capacity_bytes'])}" if r["capacity_bytes"] else " (batch_size: capacity unknown)"
    cache = size(r["cache_bytes_per_token"])
    many = f"batch {r['batch']:,} at context {r['context']:,}"
    lines = [
        f"serve     on {where}: {r['devices']} devices; times from {r['how']}",
        f"memory    a device: weights {size(r['weights_bytes'])}, cache {cache} an id",
        f"largest   {many}: {size(r['peak_bytes'])}{room} a device",
        f"          one row would have room for {r['room_at_batch_1']:,} ids; the model's context is "
        f"{r['context']:,}",
        f"prefill   {units.seconds(r['prefill_s'])} for a prompt of {r['prompt']:,}",
        f"decode    {'batch':>9}  {'a token':>10}  {'tokens/s':>10}  {'a device':>9}  {'$/M tokens':>10}",
    ]  # fmt: skip
    for point in r["curve"]:
        price = f"{point['dollars_per_million_tokens']:.4g}" if "dollars_per_million_tokens" in point else "-"
        per_s = units.quantity(point["tokens_per_s"]).strip()
        lines.append(
            f"          {point['batch']:>9,}  {units.seconds(point['token_s']):>10}  {per_s:>10}  "
            f"{size(point['peak_bytes']):>9}  {price:>10}"
        )
    return [*lines, *([f"price     {r['price_note']}"] if "price_note" in r else [])]


def draw(r: Receipt, directory: pathlib.Path, title: str) -> pathlib.Path:
    """Draws a token's latency and tokens a second over batch sizes. -> the path of `serve.png`."""
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    batches = [point["batch"] for point in r["curve"]]
    per_second, unit = units.time_unit(max(point["token_s"] for point in r["curve"]))
    for axes, values, label in zip(
        figure.subplots(1, 2),
        ([per_second * p["token_s"] for p in r["curve"]], [p["tokens_per_s"] for p in r["curve"]]),
        (f"{unit} a token", "tokens/s"),
        strict=True,
    ):
        axes.plot(batches, values, "o-", color="#1f4e79")
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel=label)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{title}, context {r['context']:,}")
    figure.savefig(directory / "serve.png", dpi=120)
    return directory / "serve.png"


class Compiler:
    """Compiles what `Decoder` runs of a Program for a target, and walks it."""

    def __init__(self, built: Program, aim: Target) -> None:
        self.built, self.aim, self.lm = built, aim, LanguageModel.of(built)
        self.weights = decode.weights_spec(built)
        self.ways = mesh.batch_ways(built.mesh)
        self.row_bytes: float = estimate.tree_bytes(decode.cache_spec(self.lm, self.ways))
        self._programs = decode.jitted(built, self.lm)
        self._decoded: dict[int, Cost] = {}  # by rows

    def lower_prefill(self, prompt: int) -> Any:
        """Lowers reading one prompt for each part into which the mesh splits a batch."""
        state = decode.state_spec(self.lm, self.ways)
        length = min(decode.padded(prompt), self.built.config.seq_len)
        where = mesh.batch_sharding(self.built.mesh)
        tokens = jax.ShapeDtypeStruct((self.ways, length), jnp.int32, sharding=where)
        return self._programs.begin.lower(*self.weights, state, tokens, state["at"])

    def lower_decode(self, rows: int) -> Any:
        """Lowers decoding rows with a cache of the entire context."""
        steps = jax.ShapeDtypeStruct((), jnp.int32)
        return self._programs.extend.lower(*self.weights, decode.state_spec(self.lm, rows), steps)

    def prefill(self, prompt: int) -> Cost:
        return self._cost(self.lower_prefill(prompt))

    def decode(self, rows: int) -> Cost:
        """The cost of one greedy id for every row."""
        if rows not in self._decoded:
            self._decoded[rows] = self._cost(self.lower_decode(rows))
        return self._decoded[rows]

    def _cost(self, lowered: Any) -> Cost:
        aim = self.aim
        try:
            made = compiled_lib.of(lowered.compile())
            made = dataclasses.replace(made, text=greedy_turn(made.text))
        except jax.errors.JaxRuntimeError as error:
            if compiled_lib.is_out_of_memory(str(error)):
                return Cost(math.inf, math.inf, aim.compiler)
            raise InputError(
                f"--target={aim.spec}: the compiler refuses: {' '.join(str(error).split())[:300]}"
            ) from error
        schedule, source = machine_lib.of(aim).step(self.built, made, calibrated=True)
        peak = made.argument_bytes + made.output_bytes - made.alias_bytes + made.temporary_bytes
        return Cost(schedule.total_s, peak, source.name)


def greedy_turn(text: str) -> str:
    """Marks in a scheduled program what one greedy id takes.

    The outermost loop of unknown length is one turn: how many ids `decode.next_ids` decodes depends on the
    data. A conditional takes its first branch, which is that of a false predicate: nothing is sampled.
    """
    start = text.index("\nENTRY ")
    lines = text[start:].splitlines()
    known = ', backend_config={"known_trip_count":{"n":"1"}}'
    marked = [f"{s}{known}" if " while(" in s and "known_trip_count" not in s else s for s in lines]
    text = text[:start] + "\n".join(marked)
    return re.sub(r"branch_computations=\{(%[\w.\-]+), [^}]*\}", r"branch_computations={\1}", text)


def _largest(compiler: Compiler, one: Cost, capacity: float | None) -> tuple[int, Cost]:
    """-> (rows that fit at a full context, their step). Raises InputError where one a device does not."""
    ways, row = compiler.ways, compiler.row_bytes
    if capacity is None:
        rows = compiler.built.config.batch_size
        return rows, compiler.decode(rows)
    if one.peak_bytes > capacity:
        raise InputError(
            f"--target={compiler.aim.spec}: one row a device takes {units.size(one.peak_bytes)} of "
            f"{units.size(capacity)}; split the model with --config.mesh.tensor or fsdp, or lower seq_len"
        )
    eight = compiler.decode(8 * ways)
    if eight.peak_bytes < math.inf:  # a compiler may pad a cache beyond its own bytes
        row = max(row, (eight.peak_bytes - one.peak_bytes) / 7)
    rows = 1 + int((capacity - one.peak_bytes) / row)  # a device
    for _ in range(TRIES):
        step = compiler.decode(rows * ways)
        if step.peak_bytes <= capacity:
            return rows * ways, step
        rows = max(int(rows * (capacity / step.peak_bytes if step.peak_bytes < math.inf else 0.8)) - 1, 1)
    return ways, one


def _room(capacity: float | None, one: Cost, row: float, context: int) -> int:
    """Ids for which one row's cache has room on a device."""
    if capacity is None:
        return context
    return context + int((capacity - one.peak_bytes) / (row / context))


def _price(aim: Target, built: Program, tokens_per_s: float, assume: Mapping[str, float]) -> Receipt:
    dollars = assume.get("dollars_per_chip_hour", aim.chip.dollars_per_hour)
    if dollars is None:
        return {}
    chips = built.mesh.size / aim.chip.per_chip
    price = chips * dollars / 3600 / tokens_per_s * 1e6
    note = f"{chips:g} chips at ${dollars:g} an hour, always busy; list price, unless given by --assume"
    return {"dollars_per_million_tokens": price, "price_note": note}
