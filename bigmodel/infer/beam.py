"""Beam search: finds likely answers by extending the K best beginnings at every step.

A beam that has ended stays among them with its score; answers are ranked by their log-probability over their
length to the power of `penalty` (0: the sum, which favors short ones; 1: the mean).

Legend: B prompts, K beams, V vocabulary, N ids of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel.config import InputError
from bigmodel.infer import decode
from bigmodel.infer.decode import DecodeState, context
from bigmodel.infer.decoder import Decoder
from bigmodel.infer.sampling import GREEDY


class BeamSearch:
    """Beam search with a decoder; compiles once for each number of prompts, beams and ids."""

    def __init__(self, decoder: Decoder, beams: int = 4, penalty: float = 1.0) -> None:
        """Raises InputError if beams is below 1."""
        if beams < 1:
            raise InputError(f"beams={beams}: set it to 1 or more")
        self.decoder, self.beams, self.penalty = decoder, beams, penalty
        self._search = decoder.jit(self._searched)

    def generate(
        self, prompts: Sequence[Sequence[int]], length: int
    ) -> tuple[list[list[np.ndarray]], np.ndarray]:
        """Answers of up to `length` ids -> (each prompt's beams, best first; their scores float32 [B, K]).

        Raises:
            InputError: a prompt and its answer are longer than the context.
        """
        decoder, k = self.decoder, self.beams
        config = decoder.program.config
        total = length + (max(map(len, prompts)) if decoder.lm.continues else 0)
        if total > context(config):
            raise InputError(f"{total} ids are more than the context of {context(config)}; lower the length")
        every = [ids for ids in prompts for _ in range(k)]
        state, *padded = decoder.unread(every, [length] * len(every), [GREEDY] * len(every))
        room = np.full((len(prompts), k, length), -1, np.int32)
        ids, scores = jax.device_get(self._search(decoder.params, decoder.rest, state, padded, room))
        return [[beam[beam >= 0] for beam in beams] for beams in ids], scores

    def _searched(
        self, params: Any, rest: Any, state: DecodeState, padded: Sequence[jax.Array], ids_BKN: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        (b, k, length), lm = ids_BKN.shape, self.decoder.lm
        logits, state = decode.prefill(lm, params, rest, state, *padded)
        first_K = jnp.where(jnp.arange(k) == 0, 0.0, -jnp.inf)  # all beams are alike: one starts
        carry = self._grown(logits, state, ids_BKN, jnp.broadcast_to(first_K, (b, k)), jnp.int32(0))

        def goes_on(carry: Any) -> jax.Array:
            return (carry[3] < length) & (carry[0]["left"] > 0).any()

        def one(carry: Any) -> Any:
            state, ids_BKN, score_BK, index = carry
            logits, state = decode.decode(lm, params, rest, state)
            return self._grown(logits, state, ids_BKN, score_BK, index)

        _, ids_BKN, score_BK, _ = jax.lax.while_loop(goes_on, one, carry)
        count_BK = (ids_BKN >= 0).sum(-1).astype(jnp.float32)
        score_BK = score_BK / jnp.maximum(count_BK, 1.0) ** self.penalty
        order_BK = jnp.argsort(-score_BK, axis=1)
        ids_BKN = jnp.take_along_axis(ids_BKN, order_BK[..., None], 1)
        return ids_BKN, jnp.take_along_axis(score_BK, order_BK, 1)

    def _grown(
        self,
        logits: jax.Array,
        state: DecodeState,
        ids_BKN: jax.Array,
        score_BK: jax.Array,
        index: jax.Array,
    ) -> tuple[DecodeState, jax.Array, jax.Array, jax.Array]:
        """The K best of all beams' continuations -> (state, ids, scores, index + 1)."""
        b, k, _ = ids_BKN.shape
        vocabulary = logits.shape[-1]
        share = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(b, k, vocabulary)
        over_BK = state["left"].reshape(b, k) <= 0
        stay_V = jnp.where(jnp.arange(vocabulary) == 0, 0.0, -jnp.inf)  # an ended beam has one continuation
        share = jnp.where(over_BK[..., None], stay_V, share)
        score_BK, at_BK = jax.lax.top_k((score_BK[..., None] + share).reshape(b, -1), k)
        parent_BK, token_BK = at_BK // vocabulary, (at_BK % vocabulary).astype(jnp.int32)
        row = (jnp.arange(b)[:, None] * k + parent_BK).reshape(-1)
        over_BK = jnp.take_along_axis(over_BK, parent_BK, 1)
        new_BK = jnp.where(over_BK, -1, token_BK)
        ids_BKN = jnp.take_along_axis(ids_BKN, parent_BK[..., None], 1).at[:, :, index].set(new_BK)
        left = state["left"][row] - 1
        ended = (over_BK | decode.is_end(self.decoder.lm, token_BK)).reshape(-1)
        state = {
            **state,
            "cache": self._rows_of(state["cache"], row), "at": state["at"][row],
            "token": token_BK.reshape(-1), "left": jnp.where(ended, 0, left),
        }  # fmt: skip
        return state, ids_BKN, score_BK, index + 1

    def _rows_of(self, cache: Any, row_N: jax.Array) -> Any:
        """The cache that has these of its rows, in this order."""
        axis = 1 if self.decoder.lm.stacked else 0
        return jax.tree.map(lambda x: jnp.take(x, row_N, axis), cache)
