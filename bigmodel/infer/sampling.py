"""Samples the next token from a model's logits, for every row of a batch by its own settings.

Nothing is sorted: the k-th largest of 50,000 numbers, and the least of those that make up a share p, are
found by bisection over the bits of float32, in 32 passes that fuse.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel.config import InputError


@dataclass(frozen=True)
class Sampling:
    """One answer's settings; the defaults are greedy. They apply in this order."""

    repetition_penalty: float = 1.0  # logits of ids that occurred: divided by it, or times it below 0
    temperature: float = 0.0  # logits are divided by it; 0: the likeliest id, always
    top_k: int = 0  # only the k likeliest ids (Fan et al. 2018); 0: all
    top_p: float = 1.0  # only the likeliest ids that together have this share (Holtzman et al. 2019)
    min_p: float = 0.0  # only ids this likely, as a share of the likeliest's (Nguyen et al. 2024)
    seed: int | None = None  # None: a new one for every answer, so that no two samples need be equal

    def problems(self) -> Iterable[tuple[str, str]]:
        """Yields (key, what is wrong and the fix)."""
        numbers = ("repetition_penalty", "temperature", "top_p", "min_p")
        for key in numbers:
            if not math.isfinite(getattr(self, key)):
                yield key, f"is {getattr(self, key)}: give a finite number"
                return
        if not 0 <= self.temperature <= 100:
            yield "temperature", f"is {self.temperature}: choose 0 to 100"
        if not 0 <= self.top_k < 2**31:
            yield "top_k", f"is {self.top_k}: set it to 0 (all ids) or more"
        if not 0 < self.top_p <= 1:
            yield "top_p", f"is {self.top_p}: choose a value above 0, up to 1"
        if not 0 <= self.min_p <= 1:
            yield "min_p", f"is {self.min_p}: choose 0 to 1"
        if not 0 < self.repetition_penalty <= 100:
            yield "repetition_penalty", f"is {self.repetition_penalty}: choose a value above 0, up to 100"
        if self.seed is not None and not 0 <= self.seed < 2**31:
            yield "seed", f"is {self.seed}: choose 0 to {2**31 - 1}"

    def check(self) -> Sampling:
        """Returns itself. Raises InputError for the first problem."""
        for key, problem in self.problems():
            raise InputError(f"{key} {problem}")
        return self


GREEDY = Sampling()


def fresh_seed() -> int:
    """A seed from the system's randomness."""
    return secrets.randbelow(2**31)


def folded(*numbers: int) -> int:
    """Hashes integers of any size to a seed."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "big") >> 1


def of_answer(settings: Sampling, index: int) -> Sampling:
    """The settings of one of several answers: each after the first gets a seed of its own."""
    if settings.seed is None or not index:
        return settings
    return dataclasses.replace(settings, seed=folded(settings.seed, index))


class Draw(NamedTuple):
    """The settings of B rows, as arrays [B]."""

    repetition_penalty: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array


def draw(rows: Sequence[Sampling]) -> Draw:
    """Settings -> numpy arrays [B], fit to be arguments of a compiled step."""
    types: dict[str, Any] = {"top_k": np.int32, "seed": np.int32}

    def number(row: Sampling, key: str) -> float:
        if key == "seed" and row.seed is None:
            return fresh_seed() if row.temperature > 0 else 0
        return float(getattr(row, key)) if key not in types else getattr(row, key)

    columns: list[Any] = [
        np.array([number(row, key) for row in rows], types.get(key, np.float32)) for key in Draw._fields
    ]
    return Draw(*columns)


def pick(logits_BV: jax.Array, seen_BV: jax.Array, settings: Draw, index_B: jax.Array) -> jax.Array:
    """-> int32 [B], the next ids. A row's draw depends on its logits, seed and index alone, not on its batch.

    Args:
        seen_BV: bool, the ids that occurred.
        index_B: how many ids the row has drawn before.
    """
    logits_BV = penalized(logits_BV.astype(jnp.float32), seen_BV, settings)
    random_B = settings.temperature > 0

    def sampled() -> jax.Array:
        def one(seed: jax.Array, index: jax.Array, row_V: jax.Array) -> jax.Array:
            return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), row_V.shape)

        kept_BV = filtered(logits_BV, settings)
        noise_BV = jax.vmap(one)(settings.seed, index_B, logits_BV)
        return jnp.where(random_B, likeliest(kept_BV + noise_BV), likeliest(logits_BV))

    return jax.lax.cond(random_B.any(), sampled, lambda: likeliest(logits_BV))


def probabilities(logits_BV: jax.Array, seen_BV: jax.Array, settings: Draw) -> jax.Array:
    """float32 [B, V]: what `pick` draws from; one-hot where the temperature is 0."""
    logits_BV = penalized(logits_BV.astype(jnp.float32), seen_BV, settings)
    greedy_BV = jax.nn.one_hot(likeliest(logits_BV), logits_BV.shape[-1])
    return jnp.where(
        settings.temperature[:, None] > 0, jax.nn.softmax(filtered(logits_BV, settings)), greedy_BV
    )


def penalized(logits_BV: jax.Array, seen_BV: jax.Array, settings: Draw) -> jax.Array:
    """The repetition penalty (Keskar et al. 2019, section 4.1)."""
    penalty = settings.repetition_penalty[:, None]
    lowered = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lowered, logits_BV)


def filtered(logits_BV: jax.Array, settings: Draw) -> jax.Array:
    """Logits over the temperature (1 where that is 0); -inf for ids outside top_k, top_p and min_p."""
    heat_B = jnp.where(settings.temperature > 0, settings.temperature, 1.0)
    x_BV = logits_BV / heat_B[:, None]

    def cut(x_BV: jax.Array) -> jax.Array:
        k_B = jnp.where(settings.top_k > 0, settings.top_k, x_BV.shape[-1]).astype(jnp.float32)
        x_BV = jnp.where(_largest(x_BV, jnp.ones_like(x_BV), k_B), x_BV, -jnp.inf)
        share_BV = jax.nn.softmax(x_BV)
        return jnp.where(_largest(x_BV, share_BV, settings.top_p), x_BV, -jnp.inf)

    needed = ((settings.top_k > 0) | (settings.top_p < 1)).any()
    x_BV = jax.lax.cond(needed, cut, lambda x: x, x_BV)
    least_B1 = x_BV.max(-1, keepdims=True) + jnp.log(settings.min_p)[:, None]
    return jnp.where(x_BV >= least_B1, x_BV, -jnp.inf)


def likeliest(x_BV: jax.Array) -> jax.Array:
    """int32 [B]: the first of the largest; in two passes that are fast on a CPU, which argmax is not."""
    top = x_BV.max(-1, keepdims=True)
    at = jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    return jnp.minimum(jnp.where(x_BV >= top, at, x_BV.shape[-1]).min(-1), x_BV.shape[-1] - 1)


def _largest(x_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """bool [B, V]: the fewest largest x whose weights sum to the target (all, if none do); ties stay."""
    bits = jax.lax.bitcast_convert_type(x_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order_BV = jnp.where(bits >= sign, ~bits, bits | sign)  # as unsigned numbers in the order of the floats

    def bit(index: int | jax.Array, least_B: jax.Array) -> jax.Array:
        higher_B = least_B | (sign >> jnp.uint32(index))
        total_B = jnp.where(order_BV >= higher_B[:, None], weight_BV, 0.0).sum(-1)
        return jnp.where(total_B >= target_B, higher_B, least_B)

    least_B = jax.lax.fori_loop(0, 32, bit, jnp.zeros(x_BV.shape[:1], jnp.uint32))
    return order_BV >= least_B[:, None]
