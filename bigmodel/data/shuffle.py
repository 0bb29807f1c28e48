"""A random permutation of any size, computed at the positions that are asked for: Grain's, for whole arrays.

A position is enciphered by a small Feistel network (SIMON, Beaulieu et al. 2013, of 4 rounds) over the next
even number of bits, again and again until the result is below the size ("cycle walking", Black and Rogaway
2002). Grain's `MapDataset.shuffle` does so for one position a call, which takes longer than reading a small
record; this gives the same permutations, in numpy.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

ROUNDS = 4
LEAST_BITS = 16  # of a block: smaller ones show patterns


class Shuffled:
    """An endless order in epochs, each a new permutation of all examples."""

    def __init__(self, num_examples: int, seed: int) -> None:
        self._count, self._seed = num_examples, seed

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Returns the examples at int64 positions of the order."""
        epochs, at = np.divmod(positions, self._count)
        out = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = permuted(at[here], self._count, (self._seed + epoch) % 2**32)
        return out


class InTurn:
    """An endless order in epochs, each all examples as they come."""

    def __init__(self, num_examples: int) -> None:
        self._count = num_examples

    def take(self, positions: np.ndarray) -> np.ndarray:
        return positions % self._count


def permuted(index: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Returns the places of indices in a permutation of 0..size-1.

    Args:
        index: int (n,), each below `size`.
        seed: of the permutation, below 2^32.
    """
    if size == 1:
        return np.zeros_like(index)
    if size <= 2**LEAST_BITS:
        return _permutation(size, seed)[index]
    bits = int(np.ceil(np.log2(size - 1)))
    keys, half = round_keys(seed), (bits + bits % 2) // 2
    out = _enciphered(index.astype(np.uint32 if half <= 16 else np.int64), keys, half)
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = _enciphered(out[outside], keys, half)
    return out.astype(np.int64)


@functools.lru_cache(maxsize=8)
def _permutation(size: int, seed: int) -> np.ndarray:
    """Returns all of a permutation of fewer numbers than a block has; walking from each would take long."""
    block = np.arange(2**LEAST_BITS)
    after = _enciphered(block, round_keys(seed), LEAST_BITS // 2)
    out, reached = after[:size], np.where(block < size, block, after)
    while (out >= size).any():  # twice as many steps at once each time
        out, reached = reached[out], reached[reached]
    return out


def _enciphered(x: np.ndarray, keys: list[int], half: int) -> np.ndarray:
    """Two halves of the bits, each in turn changed by a function of the other and the round's key."""
    word: Any = np.uint16 if half <= 16 else np.uint32
    mask = word((1 << half) - 1)
    fixed, changed = (x & int(mask)).astype(word), (x >> half).astype(word)

    def rotated(a: np.ndarray, by: int) -> np.ndarray:
        return ((a << word(by)) | (a >> word(half - by))) & mask

    for key in keys:
        mixed = (rotated(fixed, 1) & rotated(fixed, 8)) ^ rotated(fixed, 2)
        fixed, changed = changed ^ mixed ^ word(key & int(mask)), fixed
    return (changed.astype(x.dtype) << half) | fixed


def round_keys(seed: int) -> list[int]:
    """Returns the 32-bit keys of the rounds, as std::seed_seq of C++ (rand.util.seedseq) makes them."""
    n, word = ROUNDS, 2**32
    shift, low = (n - (n - 1) // 2) // 2, (n - 1) // 2
    far = shift + low
    keys = [0x8B8B8B8B] * n

    def scrambled(x: int) -> int:
        return x ^ (x >> 27)

    added = [1, seed + 1, *range(2, n)]  # the number of seeds; then each step's number, with the seed's value
    for k in range(n):
        first = 1664525 * scrambled(keys[k] ^ keys[(k + shift) % n] ^ keys[k - 1]) % word
        second = (first + added[k]) % word
        keys[(k + shift) % n] = (keys[(k + shift) % n] + first) % word
        keys[(k + far) % n] = (keys[(k + far) % n] + second) % word
        keys[k] = second
    for k in range(n):
        first = 1566083941 * scrambled((keys[k] + keys[(k + shift) % n] + keys[k - 1]) % word) % word
        second = (first - k) % word
        keys[(k + shift) % n] ^= first
        keys[(k + far) % n] ^= second
        keys[k] = second
    return keys
