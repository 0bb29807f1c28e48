"""A language model's compiled prefill and decode (`decode.py`), with its weights and a cache.

A prompt is read in one pass; then every id costs one pass over itself alone, several of them in one compiled
loop. Rows of a batch may be of any lengths: each lies at the start of its cache row.

Legend: B rows, L ids of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel.infer import decode, sampling
from bigmodel.infer.decode import DecodeState, LanguageModel
from bigmodel.infer.sampling import Sampling
from bigmodel.program import Program, State


class Decoder:
    """A language model ready to write: `prefill`, then `decode` as often as needed.

    The state that both take and return is `decode.py`'s; it is donated at every call.
    """

    def __init__(
        self,
        program: Program,
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
            start: the id from which an answer to an input starts; None: the first of `end`.
            slots: of a cache row; 0: as many as the context, or the window if that is narrower.
            cache_dtype: the compute dtype's, or int8.

        Raises:
            InputError: the model generates no text.
        """
        self.ends: tuple[int, ...] = () if end is None else (end,) if isinstance(end, int) else tuple(end)
        self.end = self.ends[0] if self.ends else -1
        self.lm = LanguageModel.of(program, self.ends, max(self.end, 0) if start is None else start)
        self.program, self.slots, self.cache_dtype = program, slots or self.lm.slots, cache_dtype
        self.programs = decode.jitted(program, self.lm)
        spec, _ = decode.weights_spec(program)
        self._arrange = jax.jit(
            program.on_mesh(lambda *weights: decode.arrange(program, *weights)[0]),
            out_shardings=jax.tree.map(lambda s: s.sharding, spec),
        )
        self.load(state)

    def load(self, state: State) -> None:
        """Takes the weights of a run's state."""
        self.params: Any = self._arrange(self.program.evaluated(state), state["rest"])
        self.rest: Any = self.program.model.divide(state["rest"])[1]

    def unload(self) -> None:
        """Lets the weights go, until the next `load`."""
        self.params = self.rest = None

    @property
    def batches(self) -> bool:
        """True for a model that `Engine` and `Speculative` take: a Transformer that continues its prompt."""
        return self.lm.caches and self.lm.continues

    def jit(self, function: Callable[..., Any], donate: tuple[int, ...] = ()) -> Any:
        """`jax.jit` of a function that applies the model, on the program's mesh."""
        return jax.jit(self.program.on_mesh(function), donate_argnums=donate)

    def empty_cache(self, rows: int, slots: int | None = None, paged: bool = False) -> Any:
        """Zeros in the shapes and places of `decode.cache_spec`."""
        spec = decode.cache_spec(self.lm, rows, slots or self.slots, self.cache_dtype, paged)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), spec)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        settings: Sequence[Sampling],
        drawn: Any = 0,
    ) -> DecodeState:
        """Reads prompts (int ids, at least one each) and draws the first id of each answer -> the state.

        Args:
            lengths: how many ids each answer may have.
            drawn: how many ids of each answer were drawn before.

        Prompts are padded to a power of two, so that few shapes are compiled.
        """
        state, *padded = self.unread(prompts, lengths, settings)
        state["drawn"] = np.zeros(len(prompts), np.int32) + np.int32(drawn)
        return self.programs.begin(self.params, self.rest, state, *padded)

    def unread(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], settings: Sequence[Sampling]
    ) -> tuple[DecodeState, np.ndarray, np.ndarray]:
        """-> (the state before anything is read, the prompts padded [B, L], their lengths [B])."""
        rows, longest = len(prompts), max(map(len, prompts))
        tokens_BL = np.zeros((rows, min(decode.padded(longest), self.program.config.seq_len)), np.int32)
        seen_BV = np.zeros((rows, self.lm.vocabulary), bool)
        for row, ids in enumerate(prompts):
            tokens_BL[row, : len(ids)] = ids
            seen_BV[row, ids] = True
        needed = max(lengths) + (longest if self.lm.continues else 0)  # attention reads every slot
        cache = self.empty_cache(rows, min(self.slots, max(decode.padded(needed, 64), tokens_BL.shape[1])))
        state = {
            "token": np.zeros(rows, np.int32), "at": np.zeros(rows, np.int32),
            "left": np.asarray(lengths, np.int32), "drawn": np.zeros(rows, np.int32),
            "seen": seen_BV, "draw": sampling.draw(settings), "cache": cache,
        }  # fmt: skip
        return state, tokens_BL, np.array([len(ids) for ids in prompts], np.int32)

    def decode(self, state: DecodeState, steps: int) -> tuple[DecodeState, jax.Array]:
        """-> (state, ids int32 [B, CHUNK]: -1 where none was drawn). `steps` is at most `decode.CHUNK`."""
        return self.programs.extend(self.params, self.rest, state, np.int32(steps))
