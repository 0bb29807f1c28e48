"""Prefill and decode: the two pure functions by which a language model writes text.

`prefill` reads prompts into a cache, `decode` reads each row's last id; both return the logits of what
follows. There is no other path: `Decoder` and `Engine` compile them with sampling, the serving plan compiles
what `Decoder` does for a cluster that need not be there, and a StableHLO export writes the two themselves.

A state is a dict of arrays:

    cache       keys and values that were read (`models/cache.py`); of a model without one, the ids
    token, at   int32 [B]: each row's last id, which is not in the cache yet, and its position
    left        int32 [B]: how many more ids may follow
    drawn       int32 [B]: how many ids were sampled
    seen        bool [B, V]: ids that occurred
    draw        `sampling.Draw`, the rows' settings
    segments    int32 [B, L], where inputs are answered: 1 at the input's ids
    pages, owners    where a paged cache holds each row

Nothing that a row computes depends on the other rows.

Legend: B rows, L ids of the longest prompt, S slots of a cache row, V vocabulary, N steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bigmodel import mesh as mesh_lib
from bigmodel import trees
from bigmodel.config import Config, InputError
from bigmodel.infer import sampling
from bigmodel.models import cache as cache_lib
from bigmodel.models import module
from bigmodel.models.module import Definition
from bigmodel.models.weights import InBlocks, Quantized
from bigmodel.program import Program

CHUNK = 16  # ids decoded in one compiled loop, between looks at what has ended
UNROLLED = 64  # layers; a deeper stack is scanned, which copies its cache at every id but compiles faster

Params = Any
DecodeState = dict[str, Any]


def context(config: Config) -> int:
    """The most ids that a prompt and its answer may have together."""
    return config.task.answer_len or config.seq_len


@dataclass(frozen=True)
class LanguageModel:
    """A model that writes text, without its arrays. It takes weights as `weights_spec` describes them."""

    config: Config
    mesh: Mesh
    model: Definition
    ends: tuple[int, ...] = ()  # ids of which any ends an answer
    start: int = 0  # the id from which an answer to an input starts

    @classmethod
    def of(cls, program: Program, ends: tuple[int, ...] = (), start: int = 0) -> LanguageModel:
        """The model of a Program. Raises InputError for one that writes no text."""
        config = program.config
        if not config.task.generates:
            raise InputError(
                f"model.name={config.model.name} with task.name={config.task.name} generates no text; "
                "use a run of task.name=lm or seq2seq"
            )
        return cls(config, program.mesh, program.model.parameters_only(), ends, start)

    @property
    def continues(self) -> bool:
        """True for a model that goes on with its prompt, false for one that answers an input."""
        return self.config.task.generates == "continuation"

    @property
    def caches(self) -> bool:
        """False for a model without keys and values: every id then costs a pass over the entire text."""
        return self.config.model.cached_layers > 0

    @property
    def vocabulary(self) -> int:
        return self.config.model.vocab_size

    @property
    def slots(self) -> int:
        """Slots of a cache row: as many as the context, or the window if that is narrower."""
        return min(context(self.config), self.config.model.window or context(self.config))

    @property
    def stacked(self) -> bool:
        """True where the cache is one array for all layers, with a leading [depth]."""
        return self.config.model.cached_layers > UNROLLED


# ------------------------------------------------------------------------------------ what decoding reads


def arrange(program: Program, params: Params, rest: Any) -> tuple[Params, Any]:
    """Parameters and rest of a run as decoding reads them: quantized weights in their places, matrices in the
    compute dtype, a stack's layers apart. To be traced."""
    params, rest = _cast(program, params, rest)
    return (module.unstack(params) if _apart(program) else params), rest


def weights_spec(program: Program) -> tuple[Params, Any]:
    """Specs, with shardings, of what `arrange` returns."""
    spec = program.state_spec
    params, rest = jax.eval_shape(lambda *args: _cast(program, *args), spec["params"], spec["rest"])

    def placed(path: Any, s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A stored weight lies as the weight would: its parts are no names of parameters.
        name = re.sub("/(base|turned|codes|scale|activation)$", "", trees.path_str(path))
        where = mesh_lib.param_sharding(program.mesh, program.model.rules, name, s.shape)
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)

    params, rest = jax.tree_util.tree_map_with_path(placed, params), _placed_as(spec["rest"], rest)
    return (module.unstack(params) if _apart(program) else params), rest


def _placed_as(spec: Any, tree: Any) -> Any:
    return {key: spec[key] for key in tree}


def _cast(program: Program, params: Params, rest: Any) -> tuple[Params, Any]:
    config, devices = program.config, program.mesh.devices.flat
    one_cpu = len(devices) == 1 and devices[0].platform == "cpu"  # of several, each has a part of the outputs

    def quantized(x: Any) -> bool:
        return isinstance(x, Quantized)

    def cast(x: Any) -> Any:
        if quantized(x):
            return InBlocks.of(x) if one_cpu else x
        return x.astype(config.compute_dtype) if x.ndim > 1 and x.dtype == config.param_dtype else x

    params, rest = program.model.unpacked(params, rest)
    return jax.tree.map(cast, params, is_leaf=quantized), rest


def _apart(program: Program) -> bool:
    return max((layers for _, layers in program.config.model.stacks.values()), default=0) <= UNROLLED


def cache_spec(lm: LanguageModel, rows: int, slots: int = 0, dtype: str = "", paged: bool = False) -> Any:
    """Specs of a cache: rows over the mesh as a batch is (unless they are pages), and heads.

    Args:
        slots: of a row; 0: as many as the model needs.
        dtype: the compute dtype's, or int8.
    """
    config = lm.config
    if not lm.caches:
        return {"ids": jax.ShapeDtypeStruct((rows, context(config)), jnp.int32)}
    axes: tuple[mesh_lib.Dimension, ...] = (None, None if paged else "batch", "heads", None, None)

    def placed(s: jax.ShapeDtypeStruct) -> Any:
        shape, spread = (s.shape, axes) if lm.stacked else (s.shape[1:], axes[1:])
        where = mesh_lib.sharding(lm.mesh, shape, *spread[: len(shape)])
        spec = jax.ShapeDtypeStruct(shape, s.dtype, sharding=where)
        return spec if lm.stacked else module.Layers([spec] * config.model.cached_layers)

    shapes = cache_lib.spec(config.model, rows, slots or lm.slots, dtype or config.compute_dtype)
    return {name: placed(s) for name, s in shapes.items()}


def state_spec(lm: LanguageModel, rows: int) -> DecodeState:
    """Specs of a state with a cache of the entire context, rows over the mesh's batch axes."""

    def placed(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        where = mesh_lib.sharding(lm.mesh, shape, "batch", *(None,) * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    draw = sampling.draw([sampling.GREEDY])
    return {
        **{name: placed(jnp.int32, rows) for name in ("token", "at", "left", "drawn")},
        "seen": placed(jnp.bool, rows, lm.vocabulary),
        "draw": jax.tree.map(lambda x: placed(x.dtype, rows), draw),
        "cache": cache_spec(lm, rows),
    }


def padded(length: int, least: int = 8) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(least, 1 << (length - 1).bit_length())


# ---------------------------------------------------------------------------------------- prefill, decode


def prefill(
    lm: LanguageModel,
    params: Params,
    rest: Any,
    state: DecodeState,
    tokens_BL: jax.Array,
    length_B: jax.Array,
) -> tuple[jax.Array, DecodeState]:
    """Reads prompts into the cache -> (logits [B, V] of what follows each, state).

    The state comes in with `at`, the position of each row's first id, and goes out with the position of what
    follows its last one. Only a paged cache may hold ids of a row already.

    Args:
        tokens_BL: int32, padded.
        length_B: int32, how many ids of each row count.
    """
    at_L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)
    real_BL = at_L < length_B[:, None]
    batch: dict[str, Any] = {"tokens": tokens_BL, "cache": state["cache"]}
    if not lm.continues:
        return _prefill_input(lm, params, rest, state, batch | {"segments": real_BL.astype(jnp.int32)})
    if "pages" in state:
        at_BL = jnp.where(real_BL, state["at"][:, None] + at_L, -1)
        batch |= {"positions": at_BL, "pages": state["pages"]}
    else:
        at_BL = jnp.broadcast_to(at_L, tokens_BL.shape)
        batch |= {"positions": at_BL, "segments": real_BL.astype(jnp.int32)}
    batch["read_at"] = jnp.maximum(length_B - 1, 0)[:, None]
    logits_B1V, cache = apply(lm, params, rest, batch)
    return logits_B1V[:, 0], {**state, "cache": cache, "at": state["at"] + length_B}


def _prefill_input(
    lm: LanguageModel, params: Params, rest: Any, state: DecodeState, batch: dict[str, Any]
) -> tuple[jax.Array, DecodeState]:
    """Reads inputs through the encoder; then the answer starts as it did in training."""
    _, cache = apply(lm, params, rest, batch)
    start_B = jnp.full_like(state["token"], lm.start)
    state = {**state, "cache": cache, "segments": batch["segments"], "token": start_B}
    return decode(lm, params, rest, {**state, "at": jnp.zeros_like(start_B)})


def decode(lm: LanguageModel, params: Params, rest: Any, state: DecodeState) -> tuple[jax.Array, DecodeState]:
    """Reads each row's last id -> (logits [B, V] of what follows it, state), of rows that have any left."""
    active_B = state["left"] > 0
    at_B1 = jnp.where(active_B, state["at"], -1)[:, None]
    name = "decoder_tokens" if "segments" in state else "tokens"
    batch = {name: state["token"][:, None], "positions": at_B1, "cache": state["cache"]}
    batch |= {key: state[key] for key in ("segments", "pages", "owners") if key in state}
    logits_B1V, cache = apply(lm, params, rest, batch)
    return logits_B1V[:, 0], {**state, "cache": cache, "at": state["at"] + active_B.astype(jnp.int32)}


def apply(lm: LanguageModel, params: Params, rest: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Runs the model over new ids and a cache -> (logits, cache). An encoder has no logits: None."""
    if not lm.caches:
        return _apply_to_text(lm, params, rest, batch)
    outputs, _ = lm.model.apply(params, rest, batch, key=None, train=False)
    return outputs.get("logits"), outputs["cache"]


def _apply_to_text(
    lm: LanguageModel, params: Params, rest: Any, batch: dict[str, Any]
) -> tuple[jax.Array, Any]:
    """Does what `apply` does for a model without a cache: its cache is the text's ids."""
    at_BN, ids_BS = batch["positions"], batch["cache"]["ids"]
    rows_B1 = jnp.arange(ids_BS.shape[0], dtype=jnp.int32)[:, None]
    place_BN = jnp.where(at_BN >= 0, at_BN, ids_BS.shape[1])
    ids_BS = ids_BS.at[rows_B1, place_BN].set(batch["tokens"], mode="drop")
    read_BN = batch.get("read_at", jnp.maximum(at_BN, 0))
    at_BS = jnp.broadcast_to(jnp.arange(ids_BS.shape[1], dtype=jnp.int32), ids_BS.shape)
    real_BS = (at_BS <= read_BN.max(1, keepdims=True)).astype(jnp.int32)
    text = {"tokens": ids_BS, "segments": real_BS, "positions": at_BS}
    outputs, _ = lm.model.apply(params, rest, text, key=None, train=False)
    return jnp.take_along_axis(outputs["logits"], read_BN[..., None], 1), {"ids": ids_BS}


# --------------------------------------------------------------------------------------------- with samples


def sample(lm: LanguageModel, logits_BV: jax.Array, state: DecodeState) -> DecodeState:
    """Draws each row's next id from its logits -> the state with it; a row that has none left stays."""
    active_B = state["left"] > 0
    token_B = sampling.pick(logits_BV, state["seen"], state["draw"], state["drawn"])
    token_B = jnp.where(active_B, token_B, state["token"])
    count = token_B.shape[0]
    rows = jnp.where(active_B, jnp.arange(count, dtype=jnp.int32), count)
    left_B = jnp.where(active_B & ~is_end(lm, token_B), state["left"] - 1, 0)
    return {
        **state, "token": token_B, "left": left_B,
        "drawn": state["drawn"] + active_B.astype(jnp.int32),
        "seen": state["seen"].at[rows, token_B].set(True, mode="drop"),
    }  # fmt: skip


def is_end(lm: LanguageModel, token: jax.Array) -> jax.Array:
    """Marks the ids that end an answer, bool."""
    return jnp.isin(token, jnp.asarray(lm.ends, token.dtype))


def next_ids(
    lm: LanguageModel, params: Params, rest: Any, state: DecodeState, steps: jax.Array
) -> tuple[DecodeState, jax.Array]:
    """Decodes and samples up to `steps` ids of every row -> (state, ids [B, CHUNK]: -1 where none came)."""

    def goes_on(carry: tuple[jax.Array, DecodeState, jax.Array]) -> jax.Array:
        return (carry[0] < steps) & (carry[1]["left"] > 0).any()

    def one(carry: tuple[jax.Array, DecodeState, jax.Array]) -> Any:
        index, state, ids_BN = carry
        active_B = state["left"] > 0
        state = sample(lm, *decode(lm, params, rest, state))
        return index + 1, state, ids_BN.at[:, index].set(jnp.where(active_B, state["token"], -1))

    none_BN = jnp.full((state["token"].shape[0], CHUNK), -1, jnp.int32)
    _, state, ids_BN = jax.lax.while_loop(goes_on, one, (jnp.int32(0), state, none_BN))
    return state, ids_BN


class Programs(NamedTuple):
    """The two jitted functions that `Decoder` runs and the serving plan compiles; both donate the state."""

    begin: Any  # (params, rest, state, tokens_BL, length_B) -> the state with each answer's first id
    extend: Any  # (params, rest, state, steps) -> (state, ids), as `next_ids`


def jitted(program: Program, lm: LanguageModel) -> Programs:
    """Makes both for a Program's mesh."""

    def first_id(params: Params, rest: Any, state: DecodeState, *prompts: jax.Array) -> DecodeState:
        return sample(lm, *prefill(lm, params, rest, state, *prompts))

    def more_ids(params: Params, rest: Any, state: DecodeState, steps: jax.Array) -> Any:
        return next_ids(lm, params, rest, state, steps)

    return Programs(*(jax.jit(program.on_mesh(f), donate_argnums=2) for f in (first_id, more_ids)))
