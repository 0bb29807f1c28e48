"""What serving a language model will cost on a target: the largest batch and context, latencies, prices.

The very functions that `decoder.Decoder` compiles (a prompt's prefill, and a step of decoding) are compiled
for the target and walked, as a training step is by `planner`.

Legend: B rows, L ids of a prompt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from bigmodel import mesh, trees, units
from bigmodel.config import Config, InputError
from bigmodel.infer import decoder as decoder_lib
from bigmodel.models import module
from bigmodel.plan import compiled as compiled_lib
from bigmodel.plan import estimate, planner, target
from bigmodel.plan import machine as machine_lib
from bigmodel.plan.target import Target
from bigmodel.program import Program

Receipt = dict[str, Any]
TRIES = 4  # batches that are compiled until one fits


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A function on the target: its seconds, and bytes of one device at its peak."""

    time_s: float
    peak_bytes: float
    how: str


def plan(
    config: Config, spec: str = "", *, prompt: int = 0, assume: Mapping[str, float] | None = None
) -> Receipt:
    """Serving `config` on the target `spec` ("": the devices of this job).

    Args:
        prompt: ids of a prompt; 0: half of the context.
        assume: `dollars_per_chip_hour`, in place of the chip's list price.

    Raises:
        InputError: no such target, a model that keeps no cache, or one row that does not fit.
    """
    if config.task.generates != "continuation" or not decoder_lib.Decoder.keeps_cache(config):
        raise InputError(
            f"--mode=serve is for Transformers of task.name=lm, not model.name={config.model.name} with "
            f"task.name={config.task.name}"
        )
    prompt, context = prompt or max(decoder_lib.context(config) // 2, 1), decoder_lib.context(config)
    if not 1 <= prompt < context:
        raise InputError(f"--prompt={prompt}: choose 1 to {context - 1}, less than seq_len")
    aim = target.of(config, spec)
    built = planner.build(config, aim)
    params, rest = _params(built)
    capacity = machine_lib.of(aim).capacity_bytes
    weights, row = estimate.tree_bytes((params, rest)), _row_bytes(built)
    one = _decode(built, aim, params, rest, mesh.batch_ways(built.mesh))
    batch, many = _largest(built, aim, params, rest, one, capacity)
    read = _prefill(built, aim, params, rest, prompt)
    tokens_per_s = batch / many.time_s
    out: Receipt = {
        "mode": "serve", "target": aim.spec, "devices": built.mesh.size, "how": many.how, "context": context,
        "prompt": prompt, "weights_bytes": weights, "cache_bytes_per_token": row / context,
        "capacity_bytes": capacity, "batch": batch, "peak_bytes": many.peak_bytes,
        "context_at_batch_1": _longest(capacity, one, row, context), "prefill_s": read.time_s,
        "token_s_at_batch_1": one.time_s, "token_s": many.time_s, "tokens_per_s": tokens_per_s,
    }  # fmt: skip
    return {**out, **_price(aim, built, tokens_per_s, assume or {})}


def table(r: Receipt) -> list[str]:
    """The receipt as lines."""
    size, where = units.size, r["target"] or "this machine"
    room = f" of {size(r['capacity_bytes'])}" if r["capacity_bytes"] else " (batch_size: capacity unknown)"
    cache = size(r["cache_bytes_per_token"])
    many = f"batch {r['batch']:,} at context {r['context']:,}"
    lines = [
        f"serve     on {where}: {r['devices']} devices; times from {r['how']}",
        f"memory    a device: weights {size(r['weights_bytes'])}, cache {cache} an id",
        f"largest   {many}: {size(r['peak_bytes'])}{room} a device",
        f"          context {r['context_at_batch_1']:,} at batch 1",
        f"prefill   {1e3 * r['prefill_s']:,.4g} ms for a prompt of {r['prompt']:,}",
        f"a token   {1e3 * r['token_s_at_batch_1']:,.4g} ms at the smallest batch, "
        f"{1e3 * r['token_s']:,.4g} ms at the largest",
        f"speed     {r['tokens_per_s']:,.5g} tokens/s at the largest batch",
    ]  # fmt: skip
    if "dollars_per_million_tokens" in r:
        lines.append(
            f"price     ${r['dollars_per_million_tokens']:,.4g} a million tokens ({r['price_note']})"
        )
    return lines


def _params(built: Program) -> tuple[Any, Any]:
    """Specs, with sharding, of what decoding reads: as `decoder.for_decoding` arranges it."""

    def of(tree: Any) -> Any:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), tree)

    model, config = built.model, built.config
    parts, rest = model.divide(built.state_spec["rest"])
    unpacked = jax.eval_shape(model.unpack, of(built.state_spec["params"]), of(parts))

    def placed(path: Any, s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        floats = len(s.shape) > 1 and s.dtype == config.param_dtype
        where = mesh.param_sharding(built.mesh, model.rules, trees.path_str(path), s.shape)
        return jax.ShapeDtypeStruct(s.shape, config.compute_dtype if floats else s.dtype, sharding=where)

    stacked = jax.tree_util.tree_map_with_path(placed, unpacked)
    shallow = config.model.cached_layers <= decoder_lib.UNROLLED
    return (_apart(stacked) if shallow else stacked), rest


def _apart(tree: Any) -> Any:
    """`module.unstack` of specs."""

    def cut(s: jax.ShapeDtypeStruct) -> module.Layers:
        assert isinstance(s.sharding, NamedSharding)
        where = NamedSharding(s.sharding.mesh, PartitionSpec(*s.sharding.spec[1:]))
        return module.Layers(
            jax.ShapeDtypeStruct(s.shape[1:], s.dtype, sharding=where) for _ in range(s.shape[0])
        )

    return {k: jax.tree.map(cut, v) if k == "blocks" else v for k, v in tree.items()}


def _cache(built: Program, rows: int) -> Any:
    """Specs of `rows` rows of cache, rows over the batch axes and heads over tensor, as `empty_cache`'s."""

    def one(s: jax.ShapeDtypeStruct) -> Any:
        axes: tuple[mesh.Dimension, ...] = ("batch", "heads", None, None)
        where = mesh.sharding(built.mesh, s.shape[1:], *axes[: len(s.shape) - 1])
        if built.config.model.cached_layers > decoder_lib.UNROLLED:
            where = NamedSharding(where.mesh, PartitionSpec(None, *where.spec))
            return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
        layer = jax.ShapeDtypeStruct(s.shape[1:], s.dtype, sharding=where)
        return module.Layers([layer] * s.shape[0])

    return {name: one(s) for name, s in decoder_lib.cache_spec(built.config, rows).items()}


def _row_bytes(built: Program) -> float:
    """Of one row's cache, on the device that holds most of it."""
    ways = mesh.batch_ways(built.mesh)
    return estimate.tree_bytes(_cache(built, ways))


def _compile(
    built: Program, aim: Target, function: Callable[..., Any], args: tuple[Any, ...], donate: tuple[int, ...]
) -> _Compiled:
    def step(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(built.mesh.abstract_mesh):
            return function(*args)

    try:
        made = compiled_lib.of(jax.jit(step, donate_argnums=donate).trace(*args).lower().compile())
    except jax.errors.JaxRuntimeError as error:
        if compiled_lib.is_out_of_memory(str(error)):
            return _Compiled(math.inf, math.inf, aim.compiler)
        raise InputError(
            f"--target={aim.spec}: the compiler refuses: {' '.join(str(error).split())[:300]}"
        ) from error
    schedule, source = machine_lib.of(aim).step(built, made, calibrated=True)
    peak = made.argument_bytes + made.output_bytes - made.alias_bytes + made.temporary_bytes
    return _Compiled(schedule.total_s, peak, source.name)


def _ids(built: Program, *shape: int) -> jax.ShapeDtypeStruct:
    where = mesh.sharding(built.mesh, shape, "batch", *(None,) * (len(shape) - 1))
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)


def _decode(built: Program, aim: Target, params: Any, rest: Any, rows: int) -> _Compiled:
    """One more id for every row, at a full context."""
    model = decoder_lib.unheld(built.model)

    def step(params: Any, rest: Any, cache: Any, token_B: jax.Array, at_B: jax.Array) -> Any:
        batch = {"tokens": token_B[:, None], "positions": at_B[:, None], "cache": cache}
        outputs, _ = model.apply(params, rest, batch, key=None, train=False)
        return outputs["logits"][:, 0].argmax(-1), outputs["cache"]

    ids = _ids(built, rows)
    return _compile(built, aim, step, (params, rest, _cache(built, rows), ids, ids), (2,))


def _prefill(built: Program, aim: Target, params: Any, rest: Any, prompt: int) -> _Compiled:
    """One prompt (or as many as the mesh splits a batch into) into the cache, and the first id after it."""
    model, rows = decoder_lib.unheld(built.model), mesh.batch_ways(built.mesh)

    def step(params: Any, rest: Any, cache: Any, tokens_BL: jax.Array) -> Any:
        at_BL = jnp.broadcast_to(jnp.arange(prompt, dtype=jnp.int32), tokens_BL.shape)
        batch = {
            "tokens": tokens_BL, "positions": at_BL, "segments": jnp.ones_like(at_BL), "cache": cache,
            "read_at": at_BL[:, -1:],
        }  # fmt: skip
        outputs, _ = model.apply(params, rest, batch, key=None, train=False)
        return outputs["logits"][:, 0].argmax(-1), outputs["cache"]

    return _compile(built, aim, step, (params, rest, _cache(built, rows), _ids(built, rows, prompt)), (2,))


def _largest(
    built: Program, aim: Target, params: Any, rest: Any, one: _Compiled, capacity: float | None
) -> tuple[int, _Compiled]:
    """-> (rows that fit at a full context, their step). Raises InputError where one a device does not."""
    ways, row = mesh.batch_ways(built.mesh), _row_bytes(built)
    if capacity is None:
        rows = built.config.batch_size
        return rows, _decode(built, aim, params, rest, rows)
    if one.peak_bytes > capacity:
        raise InputError(
            f"--target={aim.spec}: one row a device takes {units.size(one.peak_bytes)} of "
            f"{units.size(capacity)}; split the model with --config.mesh.tensor or fsdp, or lower seq_len"
        )
    eight = _decode(built, aim, params, rest, 8 * ways)
    if eight.peak_bytes < math.inf:  # a compiler may pad a cache beyond its own bytes
        row = max(row, (eight.peak_bytes - one.peak_bytes) / 7)
    rows = 1 + int((capacity - one.peak_bytes) / row)  # a device
    for _ in range(TRIES):
        step = _decode(built, aim, params, rest, rows * ways)
        if step.peak_bytes <= capacity:
            return rows * ways, step
        rows = max(int(rows * (capacity / step.peak_bytes if step.peak_bytes < math.inf else 0.8)) - 1, 1)
    return ways, one


def _longest(capacity: float | None, one: _Compiled, row: float, context: int) -> int:
    """Ids that one row's cache could hold in what is left of a device (as far as the model can count)."""
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
