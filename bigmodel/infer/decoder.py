"""A language model's compiled prefill and decode, with a cache of keys and values.

A prompt is read in one pass (prefill); then every token costs one pass over itself alone, several of them in
one compiled loop. Rows of a batch may be of any lengths: each lies at the start of its cache row, and nothing
that a row computes depends on the others.

Legend: B rows, L length of the longest prompt, S slots of a cache row, V vocabulary, N steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel import mesh
from bigmodel.config import Config, InputError
from bigmodel.infer import sampling
from bigmodel.infer.sampling import Sampling
from bigmodel.models import cache as cache_lib
from bigmodel.models import module
from bigmodel.models.module import Definition
from bigmodel.models.weights import InBlocks, Quantized
from bigmodel.program import Program, State, on_mesh

CHUNK = 16  # tokens decoded in one compiled loop, between looks at what has ended
UNROLLED = 64  # layers; a deeper stack is scanned, which copies its cache at every token but compiles faster

Params = Any


def context(config: Config) -> int:
    """Tokens that one answer's prompt and text may have together."""
    return config.task.answer_len or config.seq_len


def cache_spec(config: Config, rows: int, slots: int = 0, dtype: str = "") -> dict[str, jax.ShapeDtypeStruct]:
    """A cache's shapes, with a leading [depth]; by default for the whole context, or its window."""
    slots = slots or min(context(config), config.model.window or context(config))
    return cache_lib.spec(config.model, rows, slots, dtype or config.compute_dtype)


# -------------------------------------------------------------------------------------------- the decoder


class Decoder:
    """A language model's compiled prefill and decode. Its state is a dict of arrays, donated at every call:

    `cache`; `token`, `at`, `left`, `drawn` int32 [B]: the last id (not yet in the cache), its position, how
    many more may follow, how many were drawn; `seen` bool [B, V]; `draw`, the rows' sampling settings.
    """

    def __init__(
        self,
        built: Program,
        state: State,
        *,
        end: int | Sequence[int] | None = None,
        start: int | None = None,
        slots: int = 0,
        cache_dtype: str = "",
    ) -> None:
        """
        Args:
            end: the id that ends an answer, or several of which any does; None: none does.
            start: the id that a decoder of inputs and targets starts from; None: the first of `end`.
            slots: of a cache row; 0: as many as the context, or the window if that is narrower.
            cache_dtype: the compute dtype's, or int8.

        Raises:
            InputError: the model generates no text.
        """
        self.program = built
        self.ends: tuple[int, ...] = () if end is None else (end,) if isinstance(end, int) else tuple(end)
        self.end = self.ends[0] if self.ends else -1
        self.start = max(self.end, 0) if start is None else start
        config = built.config
        if not config.task.generates:
            raise InputError(
                f"model.name={config.model.name} with task.name={config.task.name} generates no text; "
                "use a run of task.name=lm or seq2seq"
            )
        self.keeps = self.keeps_cache(config)
        self.batches = self.keeps and config.task.generates == "continuation"  # fit for continuous batching
        self.slots = slots or min(context(config), config.model.window or context(config))
        self.cache_dtype = cache_dtype or config.compute_dtype
        self.depth = config.model.cached_layers
        self.model, self.params, self.rest = for_decoding(built, state)
        self._prefill = self.jit(self._started, donate=(2,))
        self._decode = self.jit(self.decoded, donate=(2,))

    @staticmethod
    def keeps_cache(config: Config) -> bool:
        """Whether the model keeps keys and values; if not, every id costs a pass over the whole text."""
        return config.model.cached_layers > 0

    def jit(self, function: Callable[..., Any], donate: tuple[int, ...] = ()) -> Any:
        """`jax.jit` of a function that calls `apply`, on the program's mesh."""
        return jax.jit(on_mesh(self.program.mesh, function), donate_argnums=donate)

    def empty_cache(self, rows: int, slots: int | None = None, paged: bool = False) -> Any:
        """Zeros, over the mesh: rows over the batch axes (unless they are pages), heads over tensor."""
        if not self.keeps:
            return {"ids": jnp.zeros((rows, context(self.program.config)), jnp.int32)}
        spec = cache_spec(self.program.config, rows, slots or self.slots, self.cache_dtype)

        axes: tuple[mesh.Dimension, ...] = (None, None if paged else "batch", "heads", None, None)

        def zeros(s: jax.ShapeDtypeStruct) -> Any:
            stacked = self.depth > UNROLLED
            shape, spread = (s.shape, axes) if stacked else (s.shape[1:], axes[1:])
            where = mesh.sharding(self.program.mesh, shape, *spread[: len(shape)])
            if stacked:
                return jnp.zeros(shape, s.dtype, device=where)
            return module.Layers(jnp.zeros(shape, s.dtype, device=where) for _ in range(self.depth))

        return {name: zeros(s) for name, s in spec.items()}

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        settings: Sequence[Sampling],
        drawn: Any = 0,
    ) -> dict[str, Any]:
        """Reads prompts (int ids, at least one each) and draws the first id of each answer -> the state.

        Args:
            lengths: how many ids each answer may have.
            drawn: how many ids of each answer were drawn before.

        Prompts are padded to a power of two, so that few shapes are compiled.
        """
        state, tokens_BL = self.fresh(prompts, lengths, settings)
        state["drawn"] = np.zeros(len(prompts), np.int32) + np.int32(drawn)
        return self._prefill(self.params, self.rest, state, tokens_BL)

    def fresh(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], settings: Sequence[Sampling]
    ) -> tuple[dict[str, Any], np.ndarray]:
        """-> (the state before anything is read, the prompts padded [B, L])."""
        rows, longest = len(prompts), max(map(len, prompts))
        tokens_BL = np.zeros((rows, min(_padded(longest), self.program.config.seq_len)), np.int32)
        seen_BV = np.zeros((rows, self.vocabulary), bool)
        for row, ids in enumerate(prompts):
            tokens_BL[row, : len(ids)] = ids
            seen_BV[row, ids] = True
        reads_all = (
            self.program.config.task.generates == "continuation"
        )  # attention reads every slot: no more than needed
        needed = max(lengths) + (longest if reads_all else 0)
        cache = self.empty_cache(rows, min(self.slots, max(_padded(needed, 64), tokens_BL.shape[1])))
        state = {
            "token": np.zeros(rows, np.int32), "at": np.array([len(ids) for ids in prompts], np.int32),
            "left": np.asarray(lengths, np.int32), "drawn": np.zeros(rows, np.int32),
            "seen": seen_BV, "draw": sampling.draw(settings), "cache": cache,
        }  # fmt: skip
        return state, tokens_BL

    def _started(
        self, params: Params, rest: Any, state: dict[str, Any], tokens_BL: jax.Array
    ) -> dict[str, Any]:
        return self.follow(*self.read(params, rest, state, tokens_BL))

    def read(
        self, params: Params, rest: Any, state: dict[str, Any], tokens_BL: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Prompts into the state's cache -> (logits [B, V] of what follows, state). To be traced.

        The state's `at` comes in as the prompts' lengths, and goes out as the place of what follows.
        """
        return READERS[self.program.config.task.generates](self, params, rest, state, tokens_BL)

    def decode(self, state: dict[str, Any], steps: int) -> tuple[dict[str, Any], jax.Array]:
        """-> (state, ids int32 [B, CHUNK]: -1 where none was drawn). `steps` is at most CHUNK."""
        return self._decode(self.params, self.rest, state, np.int32(steps))

    @property
    def vocabulary(self) -> int:
        return self.program.config.model.vocab_size

    def apply(self, params: Params, rest: Any, batch: dict[str, Any]) -> tuple[jax.Array | None, Any]:
        """-> (logits, cache); to be traced."""
        if not self.keeps:
            return self._apply_whole(params, rest, batch)
        outputs, _ = self.model.apply(params, rest, batch, key=None, train=False)
        return outputs.get("logits"), outputs["cache"]

    def rows_of(self, cache: Any, row_N: jax.Array) -> Any:
        """The cache whose rows are these rows of it. To be traced."""
        axis = 1 if self.keeps and self.depth > UNROLLED else 0
        return jax.tree.map(lambda x: jnp.take(x, row_N, axis), cache)

    def _apply_whole(self, params: Params, rest: Any, batch: dict[str, Any]) -> tuple[jax.Array, Any]:
        """As `apply`, of a model that keeps nothing: the cache is the ids themselves."""
        at_BN, ids_BS = batch["positions"], batch["cache"]["ids"]
        rows_B1 = jnp.arange(ids_BS.shape[0], dtype=jnp.int32)[:, None]
        place_BN = jnp.where(at_BN >= 0, at_BN, ids_BS.shape[1])
        ids_BS = ids_BS.at[rows_B1, place_BN].set(batch["tokens"], mode="drop")
        read_BN = batch.get("read_at", jnp.maximum(at_BN, 0))
        at_BS = jnp.broadcast_to(jnp.arange(ids_BS.shape[1], dtype=jnp.int32), ids_BS.shape)
        real_BS = (at_BS <= read_BN.max(1, keepdims=True)).astype(jnp.int32)
        whole = {"tokens": ids_BS, "segments": real_BS, "positions": at_BS}
        outputs, _ = self.model.apply(params, rest, whole, key=None, train=False)
        logits_BSV = outputs["logits"]
        return jnp.take_along_axis(logits_BSV, read_BN[..., None], 1), {"ids": ids_BS}

    def follow(self, logits_BV: jax.Array, state: dict[str, Any]) -> dict[str, Any]:
        """The state with the ids that these logits give; a row with nothing left stays. To be traced."""
        active_B = state["left"] > 0
        token_B = sampling.pick(logits_BV, state["seen"], state["draw"], state["drawn"])
        token_B = jnp.where(active_B, token_B, state["token"])
        count = token_B.shape[0]
        rows = jnp.where(active_B, jnp.arange(count, dtype=jnp.int32), count)
        left_B = jnp.where(active_B & ~self.ended(token_B), state["left"] - 1, 0)
        return {
            **state, "token": token_B, "left": left_B,
            "drawn": state["drawn"] + active_B.astype(jnp.int32),
            "seen": state["seen"].at[rows, token_B].set(True, mode="drop"),
        }  # fmt: skip

    def ended(self, token_B: jax.Array) -> jax.Array:
        """Which ids end an answer, bool. To be traced."""
        return jnp.isin(token_B, jnp.asarray(self.ends, token_B.dtype))

    def step(self, params: Params, rest: Any, state: dict[str, Any]) -> dict[str, Any]:
        """One more id for every row that has any left. To be traced."""
        return self.follow(*self.logits(params, rest, state))

    def logits(self, params: Params, rest: Any, state: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """-> (logits [B, V] of what follows each row's last id, state), of rows that have any left."""
        active_B = state["left"] > 0
        at_B1 = jnp.where(active_B, state["at"], -1)[:, None]
        name = "decoder_tokens" if "segments" in state else "tokens"
        batch = {name: state["token"][:, None], "positions": at_B1, "cache": state["cache"]}
        batch |= {key: state[key] for key in ("segments", "pages", "owners") if key in state}
        logits_B1V, cache = self.apply(params, rest, batch)
        assert logits_B1V is not None
        return logits_B1V[:, 0], {**state, "cache": cache, "at": state["at"] + active_B.astype(jnp.int32)}

    def decoded(
        self, params: Params, rest: Any, state: dict[str, Any], steps: jax.Array
    ) -> tuple[dict[str, Any], jax.Array]:
        """Up to `steps` ids of every row that has any left -> (state, ids [B, CHUNK]). To be traced."""

        def more(carry: tuple[jax.Array, dict[str, Any], jax.Array]) -> jax.Array:
            return (carry[0] < steps) & (carry[1]["left"] > 0).any()

        def one(carry: tuple[jax.Array, dict[str, Any], jax.Array]) -> Any:
            index, state, ids_BN = carry
            active_B = state["left"] > 0
            state = self.step(params, rest, state)
            return index + 1, state, ids_BN.at[:, index].set(jnp.where(active_B, state["token"], -1))

        none_BN = jnp.full((state["token"].shape[0], CHUNK), -1, jnp.int32)
        _, state, ids_BN = jax.lax.while_loop(more, one, (jnp.int32(0), state, none_BN))
        return state, ids_BN


def _read_lm(
    decoder: Decoder, params: Params, rest: Any, state: dict[str, Any], tokens_BL: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    length_B = state["at"]
    at_L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)
    batch = {
        "tokens": tokens_BL, "positions": jnp.broadcast_to(at_L, tokens_BL.shape), "cache": state["cache"],
        "segments": (at_L < length_B[:, None]).astype(jnp.int32), "read_at": length_B[:, None] - 1,
    }  # fmt: skip
    logits_B1V, cache = decoder.apply(params, rest, batch)
    assert logits_B1V is not None
    return logits_B1V[:, 0], {**state, "cache": cache}


def _read_seq2seq(
    decoder: Decoder, params: Params, rest: Any, state: dict[str, Any], tokens_BL: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """Inputs through the encoder; the decoder starts as it did in training."""
    at_L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)
    segments_BL = (at_L < state["at"][:, None]).astype(jnp.int32)
    batch = {"tokens": tokens_BL, "segments": segments_BL, "cache": state["cache"]}
    _, cache = decoder.apply(params, rest, batch)
    start_B = jnp.full_like(state["token"], decoder.start)
    state = {**state, "cache": cache, "segments": segments_BL, "token": start_B}
    return decoder.logits(params, rest, {**state, "at": jnp.zeros_like(start_B)})


READERS: dict[str, Callable[..., tuple[jax.Array, dict[str, Any]]]] = {
    "continuation": _read_lm,
    "answer": _read_seq2seq,
}


def _padded(length: int, least: int = 8) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(least, 1 << (length - 1).bit_length())


def for_decoding(built: Program, state: State) -> tuple[Definition, Params, Any]:
    """The model, its parameters and its rest as decoding reads them: quantized weights in their places,
    matrices in the compute dtype, a stack's layers apart."""
    config, model = built.config, built.model
    deepest = max((layers for _, layers in config.model.stacks.values()), default=0)
    devices = built.mesh.devices.flat
    one_cpu = len(devices) == 1 and devices[0].platform == "cpu"  # of several, each has a part of the outputs

    def quantized(x: Any) -> bool:
        return isinstance(x, Quantized)

    def cast(x: Any) -> Any:
        if quantized(x):
            return InBlocks.of(x) if one_cpu else x
        return x.astype(config.compute_dtype) if x.ndim > 1 and x.dtype == config.param_dtype else x

    def arrange(params: Params, parts: Any) -> Params:
        params = jax.tree.map(cast, model.unpack(params, parts), is_leaf=quantized)
        return module.unstack(params) if deepest <= UNROLLED else params

    parts, rest = model.divide(state["rest"])
    params = jax.jit(arrange)(built.evaluated(state), parts)
    return unheld(model), params, rest


def unheld(model: Definition) -> Definition:
    """The model that takes its quantized weights among the parameters, as `Definition.unpack` gives them."""
    return dataclasses.replace(model, weight_parts=(), unpack=lambda params, parts: params)
