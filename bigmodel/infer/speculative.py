"""Speculative decoding: a small model proposes several ids, the large one judges them in one pass.

The answer's distribution is the large model's own (Leviathan et al. 2023): a proposal x is kept with
probability min(1, p(x) / q(x)), and the first that is not is replaced by a draw from max(p - q, 0). At
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
from bigmodel.infer import sampling
from bigmodel.infer.decoder import Decoder, context
from bigmodel.infer.sampling import GREEDY, Draw, Sampling


class Answer(NamedTuple):
    ids: list[np.ndarray]  # int32, one array a prompt
    passes: int  # of the large model, after the prompts' own
    kept: float  # the share of proposals that were kept


class Speculative:
    """Two decoders of one vocabulary, that share every id of the answers."""

    def __init__(self, target: Decoder, draft: Decoder, proposals: int = 4) -> None:
        """Raises InputError for models that cannot go together, or no proposals."""
        sizes = [d.program.config.model.vocab_size for d in (target, draft)]
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
        self._round = target.jit(self._rounded, donate=(4, 5))

    def generate(self, prompts: Sequence[Sequence[int]], length: int, settings: Sampling = GREEDY) -> Answer:
        """Continues every prompt by up to `length` ids, as `infer.generate`; all fit in both contexts.

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
        draw = sampling.draw(each)
        both = [d.prefill(prompts, [room] * rows, each) for d in (self.target, self.draft)]
        caches = [state["cache"] for state in both]
        answers = [[int(i)] for i in np.asarray(both[0]["token"])]
        previous_B = np.array([ids[-1] for ids in prompts], np.int32)
        at_B = np.array([len(ids) for ids in prompts], np.int32)
        passes = kept = proposed = 0
        while any(left := [self._left(ids, length) for ids in answers]):
            token_B = np.array([ids[-1] for ids in answers], np.int32)
            key = jax.random.fold_in(jax.random.key(draw.seed[0]), passes)
            args = [(d.params, d.rest) for d in (self.target, self.draft)]
            out_BN, count_B, *caches = self._round(
                *args, previous_B, token_B, *caches, at_B, np.array(left) > 0, draw, key
            )
            new_BN, new_B = np.asarray(out_BN), np.asarray(count_B)
            for row, ids in enumerate(answers):
                if not left[row]:
                    continue
                kept, proposed = kept + int(new_B[row]) - 1, proposed + self.proposals
                fresh = [token_B[row], *new_BN[row, : new_B[row]]]
                previous_B[row] = fresh[-2]
                at_B[row] += new_B[row]
                ids += [int(i) for i in fresh[1:]]
            passes += 1
        return Answer([self._cut(ids, length) for ids in answers], passes, kept / max(proposed, 1))

    def _left(self, ids: list[int], length: int) -> int:
        return 0 if self._end(ids) else max(length - len(ids), 0)

    def _cut(self, ids: list[int], length: int) -> np.ndarray:
        return np.array(ids[: min(self._end(ids) or length, length)], np.int32)

    def _end(self, ids: list[int]) -> int:
        """How many ids there are up to the first that ends an answer; 0: none does."""
        return next((index + 1 for index, id in enumerate(ids) if id in self.target.ends), 0)

    def _rounded(
        self, target: Any, draft: Any, previous_B: jax.Array, token_B: jax.Array, target_cache: Any,
        draft_cache: Any, at_B: jax.Array, active_B: jax.Array, draw: Draw, key: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Any, Any]:  # fmt: skip
        """One round -> (ids [B, N + 1], how many of them count [B], both caches). To be traced.

        `token` is the last id, at position `at` and in no cache; the draft's may lack the one before it too.
        """
        n = self.proposals
        keys = jax.random.split(key, n + 2)
        where = jnp.where(active_B, at_B, -1)[:, None]
        first_B2 = jnp.stack([previous_B, token_B], 1)
        at_B2 = jnp.concatenate([where - 1, where], 1)
        at_B2 = jnp.where(where >= 0, at_B2, -1)
        logits, draft_cache = self.draft.apply(
            draft[0], draft[1], {"tokens": first_B2, "positions": at_B2, "cache": draft_cache}
        )
        assert logits is not None
        q_BV = [_shares(logits[:, -1], draw)]
        x_B = [_drawn(q_BV[0], keys[0])]
        for index in range(1, n):
            at = jnp.where(where >= 0, where + index, -1)
            batch = {"tokens": x_B[-1][:, None], "positions": at, "cache": draft_cache}
            logits, draft_cache = self.draft.apply(draft[0], draft[1], batch)
            assert logits is not None
            q_BV.append(_shares(logits[:, 0], draw))
            x_B.append(_drawn(q_BV[-1], keys[index]))
        tokens_BN = jnp.stack([token_B, *x_B], 1)
        at_BN = jnp.where(where >= 0, where + jnp.arange(n + 1, dtype=jnp.int32), -1)
        batch = {"tokens": tokens_BN, "positions": at_BN, "cache": target_cache}
        logits_BNV, target_cache = self.target.apply(target[0], target[1], batch)
        assert logits_BNV is not None
        p_BNV = jax.vmap(lambda logits_BV: _shares(logits_BV, draw), 1, 1)(logits_BNV)
        out_BN, count_B = judge(p_BNV, jnp.stack(q_BV, 1), jnp.stack(x_B, 1), keys[n], keys[n + 1])
        return out_BN, count_B, target_cache, draft_cache


def judge(
    p_BMV: jax.Array, q_BNV: jax.Array, x_BN: jax.Array, coins: jax.Array, again: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Leviathan et al. 2023, algorithm 1 -> (ids [B, M], how many of them count [B]); M = N + 1.

    Args:
        p_BMV: the large model's probabilities before each proposal, and after the last.
        q_BNV: the draft's, from which x was drawn.
        coins, again: keys, of the choices and of what replaces the first that was not kept.
    """
    b, n = x_BN.shape
    p_x_BN = jnp.take_along_axis(p_BMV[:, :n], x_BN[..., None], -1)[..., 0]
    q_x_BN = jnp.take_along_axis(q_BNV, x_BN[..., None], -1)[..., 0]
    kept_BN = jax.random.uniform(coins, (b, n)) * q_x_BN < p_x_BN
    count_B = jnp.cumprod(kept_BN.astype(jnp.int32), 1).sum(1)
    rest_BMV = jnp.maximum(p_BMV - jnp.pad(q_BNV, ((0, 0), (0, 1), (0, 0))), 0.0)
    rest_BV = jnp.take_along_axis(rest_BMV, count_B[:, None, None], 1)[:, 0]
    last_B = _drawn(rest_BV / jnp.maximum(rest_BV.sum(-1, keepdims=True), 1e-30), again)
    at_M = jnp.arange(n + 1, dtype=jnp.int32)
    out_BM = jnp.where(at_M == count_B[:, None], last_B[:, None], jnp.pad(x_BN, ((0, 0), (0, 1))))
    return out_BM, count_B + 1


def _shares(logits_BV: jax.Array, draw: Draw) -> jax.Array:
    return sampling.probabilities(logits_BV, jnp.zeros(logits_BV.shape, bool), draw)


def _drawn(share_BV: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.categorical(key, jnp.log(share_BV)).astype(jnp.int32)
