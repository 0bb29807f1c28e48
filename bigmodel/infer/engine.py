"""Continuous batching: requests join and leave a running batch between steps, over a paged cache.

The batch has a fixed number of slots. A request waits until a slot and the pages for its prompt and its
longest answer are free, so what has begun always ends; its prompt is read in chunks between the others' steps
(Yu et al. 2022; Kwon et al. 2023). A row's arithmetic does not depend on the others, nor do its samples.

`Engine.step` is the loop's body, in four parts:

1. admit: waiting requests get free slots and pages (`_admit`)
2. read prompts: one call of `decode.prefill` over the next chunks of new prompts (`_read_prompts`)
3. decode: one call of `decode.next_ids` for all rows whose prompt is read (`_decode`)
4. hand out: new ids become `TokenEvent`s, and rows at their end free their slot and pages (`_hand_out`)

The device keeps the cache and the ids that occurred; all else about a slot is numpy, which the host edits.

Legend: B slots, T pages of a slot, P pages in use, R prompts read at once, C ids of a chunk, V vocabulary, N
steps.
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
from bigmodel.infer import decode, sampling
from bigmodel.infer.decode import context
from bigmodel.infer.decoder import Decoder
from bigmodel.infer.sampling import GREEDY, Draw, Sampling
from bigmodel.models.attention import Owners

CHUNKS_ALONE = 4  # chunks of a prompt that are read in one call where it is the only one
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


class TokenEvent(NamedTuple):
    """New ids of one request."""

    number: int  # as `Engine.add` returned it
    ids: list[int]
    done: bool


@dataclass
class _Job:
    """A request in a slot."""

    number: int
    request: Request
    pages: list[int]
    read: int = 0  # ids of the prompt that are in the cache

    @property
    def unread(self) -> int:
        return len(self.request.prompt) - self.read


@dataclass(frozen=True)
class Sizes:
    """Limits of an engine's work at once; zeros mean "derived"."""

    slots: int = 16
    page: int = 32  # positions
    pages: int = 0  # of all slots together; 0: enough for half of the slots at full length
    chunk: int = 16  # ids of a prompt read in one call
    prompts: int = 0  # read in one call; 0: a quarter of the slots


class Slots(NamedTuple):
    """The host's record of each slot: numpy arrays, arguments of every call that decodes."""

    token: Any  # int32 [B]: the last id, which is not in the cache yet
    at: Any  # int32 [B]: its position
    left: Any  # int32 [B]: how many more ids may follow; 0: none, or the prompt is not read yet
    drawn: Any  # int32 [B]: how many ids were sampled
    pages: Any  # int32 [B, T]: where the cache holds the row; the number of pages: nowhere
    owners: Owners  # of each page [P]
    draw: Draw  # sampling settings [B]


class Chunks(NamedTuple):
    """The next ids of up to R prompts, one call's worth."""

    tokens: Any  # int32 [R, C], padded
    count: Any  # int32 [R]: how many of them count
    at: Any  # int32 [R]: the position of the first
    row: Any  # int32 [R]: the slot; B: none
    ends: Any  # bool [R]: the prompt ends here
    pages: Any  # int32 [R, T]
    draw: Draw  # sampling settings [R]


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
        self.decoder, self.context, self.vocabulary = decoder, context(config), decoder.lm.vocabulary
        most = self._most_pages = -(-self.context // sizes.page)
        pages = sizes.pages or max(sizes.slots * most // 2, most)
        if min(sizes.slots, sizes.page, sizes.chunk) < 1 or sizes.prompts < 0 or pages < most:
            raise InputError(f"an engine needs slots, and {most} pages or more for one full context: {sizes}")
        prompts = sizes.prompts or max(sizes.slots // 4, 1)
        self.sizes = dataclasses.replace(sizes, pages=pages, prompts=prompts)
        here = mesh.replicated(decoder.program.mesh)
        self._device = {  # a decoding state's arrays that stay there, donated at every call
            "cache": decoder.empty_cache(pages, sizes.page, paged=True),
            "seen": jnp.zeros((sizes.slots, self.vocabulary), bool, device=here),
        }
        owners: Any = (np.zeros(pages, np.int32), np.full(pages, NOWHERE, np.int32))
        token, at, left, drawn = np.zeros((4, sizes.slots), np.int32)
        self._slots = Slots(
            token, at, left, drawn, np.full((sizes.slots, most), pages, np.int32), Owners(*owners),
            sampling.draw([GREEDY] * sizes.slots),
        )  # fmt: skip
        self._jobs: list[_Job | None] = [None] * sizes.slots
        self._free = list(range(pages))
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._count = 0
        self._next_ids = decoder.jit(self._traced_decode, donate=(2,))
        self._read_chunks = decoder.jit(self._traced_read, donate=(2,))

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
        """-> the request's number, which its events bear. Raises InputError as `check`."""
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
        for row, job in enumerate(self._jobs):
            if job is not None and job.number == number:
                self._leave(row)

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(job is not None for job in self._jobs)

    @property
    def load(self) -> dict[str, int]:
        """Requests running and waiting, pages used and in all."""
        return {
            "running": sum(job is not None for job in self._jobs), "waiting": len(self._waiting),
            "pages_used": self.sizes.pages - len(self._free), "pages": self.sizes.pages,
        }  # fmt: skip

    # ---------------------------------------------------------------------------------------------- steps

    def step(self) -> list[TokenEvent]:
        """Admits waiting requests, reads a chunk of new prompts, decodes a few ids for all others."""
        self._admit()
        return self._read_prompts() + self._decode()

    def warm(self) -> None:
        """Compiles everything that `step` may call, so that no request waits for it."""
        idle = self._slots._replace(left=np.zeros(self.sizes.slots, np.int32))
        for pages in _parts(self._most_pages, READ):
            for shape in self._shapes():
                self._call_read([], shape, pages)
        for pages in _parts(self.sizes.pages, DECODE):
            self._call_decode(idle, pages, 1)

    # 1. Admit: the oldest request waits for a slot and for all pages that it can come to need, so that no
    # request that runs ever waits for memory. Those behind it wait too: nobody is overtaken.

    def _admit(self) -> None:
        for row, job in enumerate(self._jobs):
            if job is not None or not self._waiting:
                continue
            number, request = self._waiting[0]
            needed = -(-(len(request.prompt) + request.length) // self.sizes.page)
            if needed > len(self._free):
                return
            self._waiting.popleft()
            pages = [heapq.heappop(self._free) for _ in range(needed)]  # the first free ones: see `_decode`
            self._jobs[row] = _Job(number, request, pages)
            slots = self._slots
            slots.pages[row, :needed] = pages
            slots.owners.row_P[pages] = row
            slots.owners.first_P[pages] = np.arange(needed, dtype=np.int32) * self.sizes.page
            slots.left[row] = 0
            for column, value in zip(slots.draw, sampling.draw([request.settings]), strict=True):
                column[row] = value[0]

    def _leave(self, row: int) -> None:
        job = self._job(row)
        for page in job.pages:
            heapq.heappush(self._free, page)
        self._slots.owners.first_P[job.pages] = NOWHERE
        self._slots.pages[row] = self.sizes.pages
        self._jobs[row], self._slots.left[row] = None, 0

    def _job(self, row: int) -> _Job:
        job = self._jobs[row]
        assert job is not None
        return job

    # 2. Read prompts: of the few shapes that are compiled, the one that reads the most ids of the oldest
    # prompts. A prompt that is read to its end has its first id, and decodes from now on.

    def _shapes(self) -> list[tuple[int, int]]:
        """(prompts, ids of each) that reading is compiled for: several prompts, one alone, or its rest."""
        chunk = self.sizes.chunk
        return sorted({(1, chunk), (1, CHUNKS_ALONE * chunk), (self.sizes.prompts, chunk)})

    def _read_prompts(self) -> list[TokenEvent]:
        """The first ids of the prompts that one call reads to their end."""
        unread = [(job.number, row) for row, job in enumerate(self._jobs) if job is not None and job.unread]
        oldest = [row for _, row in sorted(unread)]
        if not oldest:
            return []

        def gain(shape: tuple[int, int]) -> tuple[int, int]:
            read = sum(min(self._job(row).unread, shape[1]) for row in oldest[: shape[0]])
            return read, -shape[0] * shape[1]

        shape = max(self._shapes(), key=gain)
        rows = oldest[: shape[0]]
        longest = max(len(self._job(row).pages) for row in rows)
        ids_R = self._call_read(rows, shape, _part(self._most_pages, READ, longest))
        events = []
        for index, row in enumerate(rows):
            job = self._job(row)
            job.read += min(job.unread, shape[1])
            if not job.unread:
                self._slots.at[row], self._slots.drawn[row] = job.read, 0
                self._slots.left[row] = job.request.length
                events.append(self._hand_out(row, [int(ids_R[index])]))
        return events

    def _call_read(self, rows: Sequence[int], shape: tuple[int, int], pages: int) -> np.ndarray:
        """Reads the next ids of these rows' prompts -> int32 [R], what follows each that is at its end."""
        tokens_RC, ends_R = np.zeros(shape, np.int32), np.zeros(shape[0], bool)
        count_R, at_R = np.zeros((2, shape[0]), np.int32)
        row_R = np.full(shape[0], self.sizes.slots, np.int32)
        for index, row in enumerate(rows):
            job = self._job(row)
            ids = job.request.prompt[job.read : job.read + shape[1]]
            tokens_RC[index, : len(ids)] = ids
            row_R[index], at_R[index], count_R[index] = row, job.read, len(ids)
            ends_R[index] = len(ids) == job.unread
        here = np.minimum(row_R, self.sizes.slots - 1)
        draw = Draw(*(column[here] for column in self._slots.draw))
        chunks = Chunks(tokens_RC, count_R, at_R, row_R, ends_R, self._slots.pages[here, :pages], draw)
        decoder = self.decoder
        self._device, ids_R = self._read_chunks(decoder.params, decoder.rest, self._device, chunks)
        return np.asarray(ids_R)

    def _traced_read(
        self, params: Any, rest: Any, device: dict[str, Any], chunks: Chunks
    ) -> tuple[dict[str, Any], jax.Array]:
        """-> (cache and seen ids, the id [R] that follows each chunk)."""
        state = {"cache": device["cache"], "at": chunks.at, "pages": chunks.pages}
        logits_RV, state = decode.prefill(self.decoder.lm, params, rest, state, chunks.tokens, chunks.count)
        seen_BV, row_R = device["seen"], chunks.row
        none = seen_BV.shape[0]  # a row that is dropped
        seen_BV = seen_BV.at[jnp.where(chunks.at == 0, row_R, none)].set(False, mode="drop")
        real_RC = jnp.arange(chunks.tokens.shape[1], dtype=jnp.int32) < chunks.count[:, None]
        row_RC = jnp.where(real_RC, row_R[:, None], none)
        seen_BV = seen_BV.at[row_RC, chunks.tokens].set(True, mode="drop")
        seen_RV = seen_BV.at[row_R].get(mode="clip")
        ids_R = sampling.pick(logits_RV, seen_RV, chunks.draw, jnp.zeros_like(row_R))
        seen_BV = seen_BV.at[jnp.where(chunks.ends, row_R, none), ids_R].set(True, mode="drop")
        return {"cache": state["cache"], "seen": seen_BV}, ids_R

    # 3. Decode: a few ids of every row whose prompt is read. The first free pages are given out first, so the
    # pages in use lie at the front, and a program compiled for the first eighth of them often does.

    def _decode(self) -> list[TokenEvent]:
        left_B = self._slots.left
        rows = [row for row in range(self.sizes.slots) if left_B[row] > 0]
        if not rows:
            return []
        steps = STEPS
        if self._waiting:  # a slot that is free earlier is filled earlier
            steps = min(steps, int(np.min(left_B[rows])))
        last = max(max(self._job(row).pages) for row in rows)
        ids_BN = self._call_decode(self._slots, _part(self.sizes.pages, DECODE, last + 1), steps)
        return [self._hand_out(row, [int(i) for i in ids_BN[row] if i >= 0]) for row in rows]

    def _call_decode(self, slots: Slots, pages: int, steps: int) -> np.ndarray:
        slots = slots._replace(owners=Owners(*(x[:pages] for x in slots.owners)))
        decoder = self.decoder
        self._device, ids_BN = self._next_ids(
            decoder.params, decoder.rest, self._device, slots, np.int32(steps)
        )
        return np.asarray(ids_BN)

    def _traced_decode(
        self, params: Any, rest: Any, device: dict[str, Any], slots: Slots, steps: jax.Array
    ) -> tuple[dict[str, Any], jax.Array]:
        """-> (cache and seen ids, new ids [B, N])."""
        state = device | slots._asdict()
        state, ids_BN = decode.next_ids(self.decoder.lm, params, rest, state, steps)
        return {name: state[name] for name in device}, ids_BN

    # 4. Hand out: the host's numbers follow what the device did, and a row at its end leaves.

    def _hand_out(self, row: int, ids: list[int]) -> TokenEvent:
        job, slots = self._job(row), self._slots
        first = slots.drawn[row] == 0
        slots.token[row] = ids[-1]
        slots.at[row] += len(ids) - int(first)  # the first id comes of the prompt's last place
        slots.drawn[row] += len(ids)
        slots.left[row] = 0 if ids[-1] in self.decoder.ends else slots.left[row] - len(ids)
        done = slots.left[row] == 0
        if done:
            self._leave(row)
        return TokenEvent(job.number, ids, bool(done))


def _parts(total: int, shares: Sequence[int]) -> list[int]:
    return sorted({-(-total // share) for share in shares})


def _part(total: int, shares: Sequence[int], needed: int) -> int:
    return next(part for part in _parts(total, shares) if part >= needed)


def run(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """All requests' answers, in order."""
    answers: dict[int, list[int]] = {engine.add(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            answers[event.number] += event.ids
    return list(answers.values())
