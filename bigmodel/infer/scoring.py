"""Scores a text id by id: log-probabilities under a language model, and the likeliest ids at each place.

Legend: B = 1, C ids of a chunk, V vocabulary, K likeliest ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel.data.corpus import bytes_of
from bigmodel.data.tokenizers import Tokenizer
from bigmodel.infer import decode
from bigmodel.infer.decode import context
from bigmodel.infer.decoder import Decoder

CHUNK = 64  # ids read in one call
TOP = 20


class Scores(NamedTuple):
    """Scores of every id of a text but the first, given all before it."""

    logprob: np.ndarray  # float32 [N - 1]
    top_ids: np.ndarray  # int32 [N - 1, K], the likeliest first
    top_logprobs: np.ndarray  # float32 [N - 1, K]


class Scorer:
    """Reads a text through a decoder's cache, chunk by chunk: one compiled program for all lengths."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.context = decoder, context(decoder.program.config)
        self.chunk = min(CHUNK, self.context)
        self.top = min(TOP, decoder.lm.vocabulary)
        self._score = decoder.jit(self._scored, donate=(2,))

    def warm(self) -> None:
        """Compiles what `score` calls."""
        self.score([0] * min(self.chunk + 2, self.context))  # twice: a new cache, and one that was returned

    def score(self, ids: Sequence[int], stopped: Callable[[], bool] = lambda: False) -> Scores:
        """
        Args:
            ids: two or more, up to the context.
            stopped: checked after each chunk; if true, only the chunks so far are scored.
        """
        cache = self.decoder.empty_cache(1, self.context)
        parts: list[Any] = []
        known = np.asarray(ids, np.int32)
        for first in range(0, len(known) - 1, self.chunk):
            tokens_C, next_C = (known[at : at + self.chunk] for at in (first, first + 1))
            count = len(next_C)
            at_C = np.where(np.arange(self.chunk) < len(tokens_C), first + np.arange(self.chunk), -1)
            padded = [np.pad(x, (0, self.chunk - len(x)))[None] for x in (tokens_C, next_C)]
            at_BC = at_C[None].astype(np.int32)
            params, rest = self.decoder.params, self.decoder.rest
            cache, *out = self._score(params, rest, cache, padded[0], at_BC, padded[1])
            parts.append([np.asarray(x)[:count] for x in out])
            if stopped():
                break
        return Scores(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    def _scored(
        self, params: Any, rest: Any, cache: Any, tokens_BC: jax.Array, at_BC: jax.Array, next_BC: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        """-> (cache, scores of what follows [C], the likeliest ids [C, K], theirs [C, K]). To be traced."""
        batch = {"tokens": tokens_BC, "positions": at_BC, "cache": cache}
        logits_BCV, cache = decode.apply(self.decoder.lm, params, rest, batch)
        score_CV = jax.nn.log_softmax(logits_BCV[0].astype(jnp.float32))
        top_CK, ids_CK = jax.lax.top_k(score_CV, self.top)
        return cache, jnp.take_along_axis(score_CV, next_BC[0][:, None], 1)[:, 0], ids_CK, top_CK


class Tokens:
    """Turns ids into texts and bytes, each as it reads after the one before it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def text(self, before: int | None, index: int) -> str:
        r"""The text that the id adds; as OpenAI writes it, bytes:\xe2 for a part of a character."""
        alone = self.tokenizer.decode([index])
        if "\ufffd" in alone:
            raw = bytes_of(self.tokenizer, index)
            return alone if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        if before is None:
            return alone
        first, both = self.tokenizer.decode([before]), self.tokenizer.decode([before, index])
        return both[len(first) :] if "\ufffd" not in first and both.startswith(first) else alone

    def raw(self, before: int | None, index: int) -> bytes:
        """The id's bytes of UTF-8."""
        raw = bytes_of(self.tokenizer, index)
        return self.text(before, index).encode() if raw is None else raw

    def offsets(self, ids: Sequence[int], before: int | None = None) -> list[int]:
        """For every id, the index in the text of the character that its first byte belongs to."""
        decoder, count, out = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
        for index in ids:
            raw = self.raw(before, index)
            out.append(count)
            for number, byte in enumerate(raw):
                new = len(decoder.decode(bytes([byte])))
                waits = bool(decoder.getstate()[0])  # this byte belongs to an incomplete character
                if not number:
                    out[-1] = count + new - (not waits)
                count += new
            before = index
        return out
