"""Speculative decoding: a small model proposes several ids, the large one judges them in one pass.

The answer's distribution is the large model's own (Leviathan et al. 2023): a proposal x is accepted with
probability min(1, p(x) / q(x)), and the first that is not is replaced by a sample from max(p - q, 0). At
temperature 0 the answer is the large model's, id for id, up to ties in rounding.

Legend: B rows, N proposals, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel.config import InputError
from bigmodel.infer import decode, sampling
from bigmodel.infer.decode import context
from bigmodel.infer.decoder import Decoder
from bigmodel.infer.sampling import GREEDY, Draw, Sampling


class Answer(NamedTuple):
    ids: list[np.ndarray]  # int32, one array a prompt
    passes: int  # of the large model, after the prompts' own
    accepted: float  # the share of the proposals


class Rows(NamedTuple):
    """The host's record of each answer: numpy arrays, arguments of every round."""

    previous: Any  # int32 [B]: the id before the last, which the draft's cache may lack
    token: Any  # int32 [B]: the last id, which is in no cache yet
    at: Any  # int32 [B]: its position
    active: Any  # bool [B]
    draw: Draw  # sampling settings [B]


class Speculative:
    """Two decoders of one vocabulary that write each answer together."""

    def __init__(self, target: Decoder, draft: Decoder, proposals: int = 4) -> None:
        """Raises InputError for models that do not fit together, or no proposals."""
        sizes = [d.lm.vocabulary for d in (target, draft)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"the draft has model.vocab_size={sizes[1]}, the model {sizes[0]}; take a draft of the same "
                "vocabulary"
            )
        for decoder in (target, draft):
            if not decoder.batches or decoder.program.config.model.window:
                raise InputError(
                    f"model.name={decoder.program.config.model.name}: both models must be Transformers of "
                    "task.name=lm without a window"
                )
        if proposals < 1:
            raise InputError(f"proposals={proposals}: set it to 1 or more")
        self.target, self.draft, self.proposals = target, draft, proposals
        self.context = min(context(target.program.config), context(draft.program.config))
        self._round = target.jit(self._traced_round, donate=(1,))

    def generate(self, prompts: Sequence[Sequence[int]], length: int, settings: Sampling = GREEDY) -> Answer:
        """Continues every prompt by up to `length` ids, as `generate.generate` does, within both contexts.

        Raises:
            InputError: a prompt and its answer are longer than a context, or a repetition penalty.
        """
        longest = max(map(len, prompts)) + length + self.proposals
        if longest > self.context:
            raise InputError(
                f"prompt, answer and proposals are {longest} ids, more than the context of both models, "
                f"{self.context}; shorten the prompt or the length"
            )
        each = [settings] * len(prompts) if isinstance(settings, Sampling) else list(settings)
        if any(one.repetition_penalty != 1 for one in each):
            raise InputError("repetition_penalty: speculative decoding has none; set it to 1")
        rows, room = len(prompts), length + self.proposals + 1  # the cache takes proposals too
        both = (self.target, self.draft)
        states = [decoder.prefill(prompts, [room] * rows, each) for decoder in both]
        weights, caches = [(d.params, d.rest) for d in both], [state["cache"] for state in states]
        answers = [[int(i)] for i in np.asarray(states[0]["token"])]
        draw = sampling.draw(each)
        last = Rows(
            previous=np.array([ids[-1] for ids in prompts], np.int32), token=np.zeros(rows, np.int32),
            at=np.array([len(ids) for ids in prompts], np.int32), active=np.ones(rows, bool), draw=draw,
        )  # fmt: skip
        passes = accepted = proposed = 0
        while any(left := [self._left(ids, length) for ids in answers]):
            last.token[:], last.active[:] = [ids[-1] for ids in answers], np.array(left) > 0
            key = jax.random.fold_in(jax.random.key(draw.seed[0]), passes)
            out_BN, count_B, caches = self._round(weights, caches, last, key)
            new_BN, new_B = np.asarray(out_BN), np.asarray(count_B)
            for row in np.flatnonzero(left):
                accepted, proposed = accepted + int(new_B[row]) - 1, proposed + self.proposals
                fresh = [last.token[row], *new_BN[row, : new_B[row]]]
                last.previous[row] = fresh[-2]
                last.at[row] += new_B[row]
                answers[row] += [int(i) for i in fresh[1:]]
            passes += 1
        return Answer([self._cut(ids, length) for ids in answers], passes, accepted / max(proposed, 1))

    def _left(self, ids: list[int], length: int) -> int:
        return 0 if self._end(ids) else max(length - len(ids), 0)

    def _cut(self, ids: list[int], length: int) -> np.ndarray:
        return np.array(ids[: min(self._end(ids) or length, length)], np.int32)

    def _end(self, ids: list[int]) -> int:
        """Counts the ids up to the first that ends an answer; 0: none does."""
        return next((index + 1 for index, id in enumerate(ids) if id in self.target.ends), 0)

    def _traced_round(
        self, weights: Sequence[tuple[Any, Any]], caches: Sequence[Any], last: Rows, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, list[Any]]:
        """-> (ids [B, N + 1], how many of them count [B], both caches)."""
        (target, draft), (target_cache, draft_cache) = weights, caches
        n, keys = self.proposals, jax.random.split(key, self.proposals + 2)
        at_B1 = jnp.where(last.active, last.at, -1)[:, None]

        def batch(tokens_BL: jax.Array, offsets_L: jax.Array, cache: Any) -> dict[str, Any]:
            at_BL = jnp.where(at_B1 >= 0, at_B1 + offsets_L, -1)
            return {"tokens": tokens_BL, "positions": at_BL, "cache": cache}

        x_B: list[jax.Array] = []
        q_BV: list[jax.Array] = []
        tokens_BL, offsets_L = jnp.stack([last.previous, last.token], 1), jnp.arange(-1, 1, dtype=jnp.int32)
        for index in range(n):
            new = batch(tokens_BL, offsets_L, draft_cache)
            logits_BLV, draft_cache = decode.apply(self.draft.lm, *draft, new)
            q_BV.append(_shares(logits_BLV[:, -1], last.draw))
            x_B.append(_sampled(q_BV[-1], keys[index]))
            tokens_BL, offsets_L = x_B[-1][:, None], jnp.full(1, index + 1, jnp.int32)
        new = batch(jnp.stack([last.token, *x_B], 1), jnp.arange(n + 1, dtype=jnp.int32), target_cache)
        logits_BNV, target_cache = decode.apply(self.target.lm, *target, new)
        p_BNV = jax.vmap(lambda logits_BV: _shares(logits_BV, last.draw), 1, 1)(logits_BNV)
        out_BN, count_B = judge(p_BNV, jnp.stack(q_BV, 1), jnp.stack(x_B, 1), keys[n], keys[n + 1])
        return out_BN, count_B, [target_cache, draft_cache]


def judge(
    p_BMV: jax.Array, q_BNV: jax.Array, x_BN: jax.Array, coins: jax.Array, again: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Accepts or replaces proposals (Leviathan et al. 2023, algorithm 1) -> (ids [B, M], how many count [B]).

    M is N + 1.

    Args:
        p_BMV: the large model's probabilities before each proposal, and after the last.
        q_BNV: the draft's, from which x was drawn.
        coins, again: keys, of the choices and of what replaces the first proposal that was not accepted.
    """
    b, n = x_BN.shape
    p_x_BN = jnp.take_along_axis(p_BMV[:, :n], x_BN[..., None], -1)[..., 0]
    q_x_BN = jnp.take_along_axis(q_BNV, x_BN[..., None], -1)[..., 0]
    accepted_BN = jax.random.uniform(coins, (b, n)) * q_x_BN < p_x_BN
    count_B = jnp.cumprod(accepted_BN.astype(jnp.int32), 1).sum(1)
    rest_BMV = jnp.maximum(p_BMV - jnp.pad(q_BNV, ((0, 0), (0, 1), (0, 0))), 0.0)
    rest_BV = jnp.take_along_axis(rest_BMV, count_B[:, None, None], 1)[:, 0]
    last_B = _sampled(rest_BV / jnp.maximum(rest_BV.sum(-1, keepdims=True), 1e-30), again)
    at_M = jnp.arange(n + 1, dtype=jnp.int32)
    out_BM = jnp.where(at_M == count_B[:, None], last_B[:, None], jnp.pad(x_BN, ((0, 0), (0, 1))))
    return out_BM, count_B + 1


def _shares(logits_BV: jax.Array, draw: Draw) -> jax.Array:
    return sampling.probabilities(logits_BV, jnp.zeros(logits_BV.shape, bool), draw)


def _sampled(share_BV: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.categorical(key, jnp.log(share_BV)).astype(jnp.int32)
