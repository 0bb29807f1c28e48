"""Continuous batching: requests join and leave a running batch between steps, over a paged cache.

The batch has a fixed number of slots. A request waits until a slot and the pages for its prompt and its whole
answer are free, so what has begun always ends; its prompt is read in chunks between the others' steps (Yu et
al. 2022; Kwon et al. 2023). A row's arithmetic does not depend on the others, nor do its draws.

The device holds the cache and the ids that occurred; all else about a slot is numpy, which the host edits.

Legend: B slots, T pages of a slot, R prompts read at once, C ids of a chunk, V vocabulary.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel import mesh
from bigmodel.config import InputError
from bigmodel.infer import sampling
from bigmodel.infer.decoder import Decoder, context
from bigmodel.infer.sampling import GREEDY, Draw, Sampling
from bigmodel.models.attention import Owners

ALONE = 4  # chunks of a prompt that are read in one call where it is the only one
READ = (1, 4)  # parts of the context that reading is compiled for: no more is looked at than is needed
DECODE = (1, 2, 4, 8)  # likewise parts of all pages; the first ones are in use
NOWHERE = 1 << 30  # a position beyond all others
STEPS = 4  # ids decoded in one call: between two calls requests join, and what is new is sent


@dataclass(frozen=True)
class Request:
    """A prompt (int ids, at least one) and how many ids may follow it."""

    prompt: Sequence[int]
    length: int
    settings: Sampling = GREEDY


class News(NamedTuple):
    """What a step brought one request."""

    number: int  # as `Engine.add` gave it
    ids: list[int]
    done: bool


@dataclass
class _Slot:
    """A request at work."""

    number: int
    request: Request
    pages: list[int]
    read: int = 0  # ids of the prompt that are in the cache


@dataclass(frozen=True)
class Sizes:
    """How much an engine holds at once; zeros mean "derived"."""

    slots: int = 16
    page: int = 32  # positions
    pages: int = 0  # of all slots together; 0: enough for half of the slots at full length
    chunk: int = 16  # ids of a prompt read in one call
    prompts: int = 0  # read in one call; 0: a quarter of the slots


class Engine:
    """`add` requests, then `step` until `busy` is false. Not for several threads at once."""

    def __init__(self, decoder: Decoder, sizes: Sizes = Sizes()) -> None:
        """Raises InputError for a model that is no decoder-only language model, or sizes that do not fit."""
        config = decoder.program.config
        if not decoder.batches:
            raise InputError(
                f"model.name={config.model.name} with task.name={config.task.name} cannot be batched so; "
                "continuous batching is for Transformers of task.name=lm"
            )
        self.decoder, self.context = decoder, context(config)
        self.most_pages = -(-self.context // sizes.page)
        most = self.most_pages
        pages = sizes.pages or max(sizes.slots * most // 2, most)
        if min(sizes.slots, sizes.page, sizes.chunk) < 1 or sizes.prompts < 0 or pages < most:
            raise InputError(f"an engine needs slots, and {most} pages or more for one full context: {sizes}")
        prompts = sizes.prompts or max(sizes.slots // 4, 1)
        self.sizes = dataclasses.replace(sizes, pages=pages, prompts=prompts)
        slots = sizes.slots
        self.vocabulary = config.model.vocab_size
        self._cache = decoder.empty_cache(pages, sizes.page, paged=True)
        here = mesh.replicated(decoder.program.mesh)
        self._seen_BV = jnp.zeros((slots, self.vocabulary), bool, device=here)
        self._token_B, self._at_B, self._left_B, self._drawn_B = np.zeros((4, slots), np.int32)
        self._draw = sampling.draw([GREEDY] * slots)
        self._pages_BT = np.full((slots, most), pages, np.int32)  # `pages`: none
        owners: Any = (np.zeros(pages, np.int32), np.full(pages, NOWHERE, np.int32))
        self._owners: Any = Owners(*owners)
        self._slots: list[_Slot | None] = [None] * slots
        self._free = list(range(pages))
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._count = 0
        self._decode = decoder.jit(self._decoded, donate=(2, 3))
        self._read = decoder.jit(self._read_chunks, donate=(2, 3))

    # ------------------------------------------------------------------------------------------ requests

    def check(self, request: Request) -> None:
        """Raises InputError for a request that never fits. Any thread may call this."""
        total = len(request.prompt) + request.length
        if not len(request.prompt) or request.length < 1:
            raise InputError("a request needs one id of a prompt or more, and a length of 1 or more")
        if total > self.context:
            raise InputError(
                f"a prompt of {len(request.prompt)} ids and {request.length} new ones are {total}, more than "
                f"the model's context of {self.context}; shorten the prompt or ask for fewer"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.vocabulary:
            raise InputError(f"a prompt's ids must lie in 0 to {self.vocabulary - 1}")

    def add(self, request: Request) -> int:
        """-> the request's number, by which its news will come. Raises InputError as `check`."""
        self.check(request)
        self._count += 1
        self._waiting.append((self._count, request))
        return self._count

    def cancel(self, number: int) -> None:
        """Forgets a request; one that is unknown or done is no error."""
        for entry in self._waiting:
            if entry[0] == number:
                self._waiting.remove(entry)
                return
        for row, slot in enumerate(self._slots):
            if slot is not None and slot.number == number:
                self._leave(row)

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(slot is not None for slot in self._slots)

    @property
    def load(self) -> dict[str, int]:
        """Requests running and waiting, pages used and in all."""
        return {
            "running": sum(slot is not None for slot in self._slots), "waiting": len(self._waiting),
            "pages_used": self.sizes.pages - len(self._free), "pages": self.sizes.pages,
        }  # fmt: skip

    # ---------------------------------------------------------------------------------------------- steps

    def step(self) -> list[News]:
        """Lets waiting requests join, reads a chunk of new prompts, decodes a few ids for all others."""
        self._join()
        return self._read_prompts() + self._decode_some()

    def warm(self) -> None:
        """Compiles everything that `step` may call, so that no request waits for it."""
        idle = np.full(self.sizes.slots, 0, np.int32)
        for pages in _parts(self.most_pages, READ):
            for shape in self._shapes():
                self._call_read([], shape, pages)
        for pages in _parts(self.sizes.pages, DECODE):
            self._call_decode(idle, pages, 1)

    def _join(self) -> None:
        for row, slot in enumerate(self._slots):
            if slot is not None or not self._waiting:
                continue
            number, request = self._waiting[0]
            needed = -(-(len(request.prompt) + request.length) // self.sizes.page)
            if needed > len(self._free):
                return
            self._waiting.popleft()
            pages = [heapq.heappop(self._free) for _ in range(needed)]
            self._slots[row] = _Slot(number, request, pages)
            self._pages_BT[row, :needed] = pages
            self._owners.row_P[pages] = row
            self._owners.first_P[pages] = np.arange(needed, dtype=np.int32) * self.sizes.page
            self._left_B[row] = 0
            for column, value in zip(self._draw, sampling.draw([request.settings]), strict=True):
                column[row] = value[0]

    def _leave(self, row: int) -> None:
        slot = self._slots[row]
        assert slot is not None
        for page in slot.pages:
            heapq.heappush(self._free, page)
        self._owners.first_P[slot.pages] = NOWHERE
        self._pages_BT[row] = self.sizes.pages
        self._slots[row], self._left_B[row] = None, 0

    # --------------------------------------------------------------------------------------------- prompts

    def _shapes(self) -> list[tuple[int, int]]:
        """(prompts, ids of each) that reading is compiled for: several prompts, one alone, or its rest."""
        chunk = self.sizes.chunk
        return sorted({(1, chunk), (1, ALONE * chunk), (self.sizes.prompts, chunk)})

    def _read_prompts(self) -> list[News]:
        """As many ids of new prompts as one call takes; the first ids of those that are read to their end."""
        left = {r: len(s.request.prompt) - s.read for r, s in enumerate(self._slots) if s is not None}
        oldest = sorted(filter(left.get, left), key=lambda row: self._slots[row].number)  # type: ignore
        if not oldest:
            return []

        def gain(shape: tuple[int, int]) -> tuple[int, int]:
            return sum(min(left[row], shape[1]) for row in oldest[: shape[0]]), -shape[0] * shape[1]

        shape = max(self._shapes(), key=gain)
        rows = oldest[: shape[0]]
        longest = max(len(self._slots[row].pages) for row in rows)  # type: ignore[union-attr]
        ids_R = self._call_read(rows, shape, _part(self.most_pages, READ, longest))
        news = []
        for index, row in enumerate(rows):
            slot = self._slots[row]
            assert slot is not None
            slot.read += min(left[row], shape[1])
            if slot.read == len(slot.request.prompt):
                self._at_B[row], self._drawn_B[row] = slot.read, 0
                self._left_B[row] = slot.request.length
                news.append(self._take(row, [int(ids_R[index])]))
        return news

    def _call_read(self, rows: Sequence[int], shape: tuple[int, int], pages: int) -> np.ndarray:
        """Reads the next ids of these rows' prompts -> int32 [R], what follows each that is at its end."""
        tokens_RC = np.zeros(shape, np.int32)
        at_RC, last_R = np.full_like(tokens_RC, -1), np.full(shape[0], -1, np.int32)
        row_R, first_R = np.full(shape[0], self.sizes.slots, np.int32), np.zeros(shape[0], bool)
        for index, row in enumerate(rows):
            slot = self._slots[row]
            assert slot is not None
            ids = slot.request.prompt[slot.read : slot.read + shape[1]]
            tokens_RC[index, : len(ids)] = ids
            at_RC[index, : len(ids)] = np.arange(slot.read, slot.read + len(ids))
            row_R[index], first_R[index] = row, slot.read == 0
            if slot.read + len(ids) == len(slot.request.prompt):
                last_R[index] = len(ids) - 1
        here = np.minimum(row_R, self.sizes.slots - 1)
        settings = Draw(*(column[here] for column in self._draw))
        pages_RT = self._pages_BT[here, :pages]
        self._cache, self._seen_BV, ids_R = self._read(
            self.decoder.params, self.decoder.rest, self._cache, self._seen_BV, tokens_RC, at_RC, pages_RT,
            row_R, first_R, last_R, settings,
        )  # fmt: skip
        return np.asarray(ids_R)

    def _read_chunks(
        self, params: Any, rest: Any, cache: Any, seen_BV: jax.Array, tokens_RC: jax.Array, at_RC: jax.Array,
        pages_RT: jax.Array, row_R: jax.Array, first_R: jax.Array, last_R: jax.Array, settings: Draw,
    ) -> tuple[Any, jax.Array, jax.Array]:  # fmt: skip
        """-> (cache, seen, ids [R]). To be traced. A row number of B is no row, a `last` of -1 no end."""
        batch = {
            "tokens": tokens_RC, "positions": at_RC, "cache": cache, "pages": pages_RT,
            "read_at": jnp.maximum(last_R, 0)[:, None],
        }  # fmt: skip
        logits_R1V, cache = self.decoder.apply(params, rest, batch)
        assert logits_R1V is not None
        reset_R = jnp.where(first_R, row_R, seen_BV.shape[0])
        seen_BV = seen_BV.at[reset_R].set(False, mode="drop")
        real_RC = jnp.where(at_RC >= 0, row_R[:, None], seen_BV.shape[0])
        seen_BV = seen_BV.at[real_RC, tokens_RC].set(True, mode="drop")
        seen_RV = seen_BV.at[row_R].get(mode="clip")
        ids_R = sampling.pick(logits_R1V[:, 0], seen_RV, settings, jnp.zeros_like(row_R))
        ended_R = jnp.where(last_R >= 0, row_R, seen_BV.shape[0])
        return cache, seen_BV.at[ended_R, ids_R].set(True, mode="drop"), ids_R

    # ------------------------------------------------------------------------------------------- decoding

    def _decode_some(self) -> list[News]:
        rows = [row for row in range(self.sizes.slots) if self._left_B[row] > 0]
        if not rows:
            return []
        steps = STEPS
        if self._waiting:  # a slot that is free earlier is filled earlier
            steps = min(steps, int(np.min(self._left_B[rows])))
        last = max(max(self._slots[row].pages) for row in rows)  # type: ignore[union-attr]
        ids_BN = self._call_decode(self._left_B, _part(self.sizes.pages, DECODE, last + 1), steps)
        return [self._take(row, [int(i) for i in ids_BN[row] if i >= 0]) for row in rows]

    def _call_decode(self, left_B: np.ndarray, pages: int, steps: int) -> np.ndarray:
        owners = Owners(*(x[:pages] for x in self._owners))
        self._cache, self._seen_BV, ids_BN = self._decode(
            self.decoder.params, self.decoder.rest, self._cache, self._seen_BV, self._token_B, self._at_B,
            left_B, self._drawn_B, self._pages_BT, owners, self._draw, np.int32(steps),
        )  # fmt: skip
        return np.asarray(ids_BN)

    def _decoded(
        self, params: Any, rest: Any, cache: Any, seen_BV: jax.Array, token_B: jax.Array, at_B: jax.Array,
        left_B: jax.Array, drawn_B: jax.Array, pages_BT: jax.Array, owners: Owners, settings: Draw,
        steps: jax.Array,
    ) -> tuple[Any, jax.Array, jax.Array]:  # fmt: skip
        state = {
            "token": token_B, "at": at_B, "left": left_B, "drawn": drawn_B, "seen": seen_BV, "draw": settings,
            "cache": cache, "pages": pages_BT, "owners": owners,
        }  # fmt: skip
        state, ids_BN = self.decoder.decoded(params, rest, state, steps)
        return state["cache"], state["seen"], ids_BN

    def _take(self, row: int, ids: list[int]) -> News:
        """New ids of a row into its numbers; it leaves at its end."""
        slot = self._slots[row]
        assert slot is not None
        first = self._drawn_B[row] == 0
        self._token_B[row] = ids[-1]
        self._at_B[row] += len(ids) - int(first)  # the first id comes of the prompt's last place
        self._drawn_B[row] += len(ids)
        self._left_B[row] = 0 if ids[-1] in self.decoder.ends else self._left_B[row] - len(ids)
        done = self._left_B[row] == 0
        if done:
            self._leave(row)
        return News(slot.number, ids, bool(done))


def _parts(whole: int, shares: Sequence[int]) -> list[int]:
    return sorted({-(-whole // share) for share in shares})


def _part(whole: int, shares: Sequence[int], needed: int) -> int:
    return next(part for part in _parts(whole, shares) if part >= needed)


def run(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """All requests' answers, in order."""
    answers: dict[int, list[int]] = {engine.add(request): [] for request in requests}
    while engine.busy:
        for news in engine.step():
            answers[news.number] += news.ids
    return list(answers.values())
