"""The state that a server's routes share: model, engine if it writes text, limits, places, metrics."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import prometheus_client as prometheus

from bigmodel.config import InputError
from bigmodel.infer import engine, image_files, sampling
from bigmodel.infer.detokenize import Detokenizer, Piece
from bigmodel.infer.engine import Engine
from bigmodel.infer.generate import Writer
from bigmodel.infer.openai_api import Completion, Refusal
from bigmodel.infer.predict import Answerer, Predictor
from bigmodel.infer.scoring import Scorer, Scores
from bigmodel.infer.worker import Late, Subscriber, Worker


@dataclass(frozen=True)
class Limits:
    """Limits on one request, on one client, and on all at once."""

    body_bytes: int = 1 << 20
    bodies_bytes: int = 64 << 20  # all bodies being received
    prompt_tokens: int = 0  # 0: the model's context
    output_tokens: int = 0  # 0: the model's context
    answers: int = 16  # in one request: its prompts times n
    queue: int = 256  # answers of one client that may wait beyond those that run
    clients: int = 4  # clients that may each have so many answers in the queue
    queue_s: float = 120.0  # how long an answer may wait for a slot
    request_s: float = 600.0  # from a request's arrival to its answer's end
    inputs: int = 64  # in one request to /v1/predict or /v1/embeddings
    pixels: int = 1 << 24  # in one picture


class Service:
    """A model with its engine and all requests in progress."""

    def __init__(
        self,
        name: str,
        writer: Writer | None,
        predictor: Predictor | Answerer | None,
        limits: Limits,
        sizes: engine.Sizes,
    ) -> None:
        self.name, self.writer, self.predictor = name, writer, predictor
        self.worker: Worker | None = None
        self.scorer: Scorer | None = None
        self.scoring = asyncio.Lock()
        self.slots, self.context = sizes.slots, 0
        self.places: collections.Counter[str] = collections.Counter()  # answers in progress, by client
        self.receiving = 0  # bytes of bodies being received
        if writer is not None:
            self.worker = Worker(Engine(writer.decoder, sizes), limits.queue_s)
            self.context = self.worker.batch.context
            self.scorer = Scorer(writer.decoder)
        self.pictures = image_files.PictureDecoder(limits.pixels)
        if isinstance(predictor, Predictor):
            predictor.decode_image = self.pictures.decode
        self.limits = dataclasses.replace(
            limits,
            prompt_tokens=min(limits.prompt_tokens or self.context, self.context),
            output_tokens=min(limits.output_tokens or self.context, self.context),
        )
        self.predicting = asyncio.Lock()
        self.registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "bigmodel_requests", "answered requests", ["path", "status"], registry=self.registry
        )
        self.seconds = prometheus.Histogram(
            "bigmodel_request_seconds", "from a request's arrival to its answer's end", ["path"],
            registry=self.registry, buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
        )  # fmt: skip
        self.tokens = prometheus.Counter("bigmodel_tokens", "ids", ["kind"], registry=self.registry)
        for key in ("running", "waiting", "pages_used", "pages"):
            gauge = prometheus.Gauge(f"bigmodel_{key}", "of the engine", registry=self.registry)
            gauge.set_function(lambda key=key: self._load(key))  # type: ignore[misc]

    def warm(self) -> None:
        """Compiles everything that requests may need."""
        if self.worker is not None:
            self.worker.batch.warm()
        if self.scorer is not None:
            self.scorer.warm()
        if self.predictor is not None:
            self.predictor.warm()
        if self.input_kind == "image":
            self.pictures.warm()

    def _load(self, key: str) -> int:
        if self.worker is None:
            return 0
        return self.worker.batch.load[key] + (self.worker.waiting if key == "waiting" else 0)

    @property
    def input_kind(self) -> str:
        """The input that the page offers: `completion`, `text`, `image` or `row`."""
        if self.predictor is None:
            return "completion"
        return self.predictor.reads

    # ------------------------------------------------------------------------------------------- places

    @contextlib.contextmanager
    def place(self, client: str, count: int) -> Iterator[None]:
        """Reserves room for so many answers in a `with` block. Raises Refusal as `check_room`."""
        self.check_room(client, count)
        self.places[client] += count
        try:
            yield
        finally:
            self.places[client] -= count
            if not self.places[client]:
                del self.places[client]

    def check_room(self, client: str, count: int) -> None:
        """Raises Refusal 429 if the client's share, or the queue, has no room for so many answers."""
        share = self.slots + self.limits.queue
        for taken, most in ((self.places[client], share), (self.places.total(), share * self.limits.clients)):
            if taken + count > most:
                raise Refusal(429, f"{taken} answers are under way already; try again in a second")

    # --------------------------------------------------------------------------------------------- text

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int] | None:
        """The prompt that the model's chat template makes; None without one. Raises Refusal or InputError."""
        if self.writer is None:
            return None
        self._check_length(sum(len(message["content"]) for message in messages))
        ids = self.writer.chat(messages)
        return None if ids is None else ids.tolist()

    @property
    def drawing(self) -> dict[str, Any]:
        """Returns `Writer.drawing`."""
        return self.writer.drawing if self.writer is not None else {}

    def _check_length(self, characters: int) -> None:
        assert self.writer is not None
        longest = int(self.writer.tokenizer.token_bytes.max())
        if (
            characters > max(longest, 1) * self.limits.prompt_tokens * 2
        ):  # surely too many tokens: spare the tokenizer
            raise Refusal(422, f"the prompt has {characters} characters; shorten it", "prompt")

    def ids_of(self, prompt: str | tuple[int, ...], plain: bool = False) -> list[int]:
        """Encodes a prompt. Raises Refusal for one that is too long or has unknown ids."""
        assert self.writer is not None
        most = self.limits.prompt_tokens
        if isinstance(prompt, str):
            self._check_length(len(prompt))
            try:
                ids = self.writer.encode(prompt, plain).tolist()
            except InputError as error:
                raise Refusal(422, str(error), "prompt") from error
        else:
            ids = list(prompt)
        if len(ids) > most:
            raise Refusal(422, f"the prompt has {len(ids)} tokens, more than {most}; shorten it", "prompt")
        return ids

    def engine_requests(self, completion: Completion, client: str) -> list[engine.Request]:
        """Makes a request to the engine for every answer. Raises Refusal."""
        if self.worker is None:
            raise Refusal(404, f"{self.name} writes no text; use /v1/predict")
        if self.worker.failure:
            raise Refusal(503, f"the engine failed: {self.worker.failure}")
        if completion.model not in (None, self.name):
            raise Refusal(404, f"model {completion.model!r} is not here; this is {self.name}", "model")
        out: list[engine.Request] = []
        for prompt in completion.prompts:
            ids = self.ids_of(prompt, completion.plain)
            length = self._length(completion, ids)
            for _ in range(completion.n):
                out.append(engine.Request(ids, length, sampling.of_answer(completion.settings, len(out))))
            try:
                self._check(out[-1])
            except InputError as error:
                raise Refusal(422, str(error), "prompt") from error
        self.check_room(client, len(out))
        return out

    def _check(self, request: engine.Request) -> None:
        """Raises InputError. Nothing may follow a prompt that is scored only."""
        assert self.worker is not None
        check, ids = self.worker.batch.check, request.prompt
        if request.length:
            check(request)
        else:  # a prompt may fill the context; the engine wants room for an id
            check(engine.Request(ids[: self.context - 1], 1))
            check(engine.Request(ids[-1:], 1))

    def _length(self, completion: Completion, ids: Sequence[int]) -> int:
        room = self.context - len(ids)
        usual = self.limits.output_tokens if completion.usual_tokens is None else completion.usual_tokens
        length = completion.max_tokens
        if length is None:
            length = min(room, self.limits.output_tokens, usual)
        if length > self.limits.output_tokens or length > room or length < int(completion.max_tokens != 0):
            most = max(min(room, self.limits.output_tokens), 0)
            said = f"max_tokens is {length}, but after {len(ids)} of the prompt at most {most} fit"
            raise Refusal(422, said, "max_tokens")
        return length

    async def answers(
        self, completion: Completion, requests: Sequence[engine.Request], client: str
    ) -> AsyncGenerator[tuple[int, str, str | None, Detokenizer]]:
        """Yields (answer's index, new text, reason if it has ended, its detokenizer) as they come.

        When this generator ends, for any reason, it cancels the answers that are not complete.

        Raises:
            Refusal: no room, no slot in time, no end in time, or the engine failed.
        """
        assert self.worker is not None
        assert self.writer is not None
        inbox = asyncio.Queue[tuple[int, Piece | Exception]]()
        texts = [Detokenizer(self.writer, completion.stop, request.prompt) for request in requests]
        entire = not completion.stream and not completion.stop  # then only the entire text matters
        cancels: dict[int, Callable[[], None]] = {}
        overdue = asyncio.get_running_loop().call_later(
            self.limits.request_s, inbox.put_nowait, (-1, TimeoutError())
        )
        with self.place(client, len(requests)):
            try:
                for index, request in enumerate(requests):
                    self.tokens.labels("prompt").inc(len(request.prompt))
                    if not request.length:
                        yield index, "", "length", texts[index]
                        continue
                    subscriber = Subscriber(_into(inbox, index), texts[index], entire)
                    cancels[index] = self.worker.submit(request, subscriber, client)
                while cancels:
                    index, piece = await inbox.get()
                    if isinstance(piece, Exception):
                        raise self._refusal(piece)
                    if piece.reason is not None:
                        self.tokens.labels("completion").inc(len(texts[index].ids))
                        cancel = cancels.pop(index)
                        if not piece.done:
                            cancel()
                    yield index, piece.text, piece.reason, texts[index]
            finally:
                overdue.cancel()
                for cancel in cancels.values():
                    cancel()

    async def scores(self, ids: Sequence[int]) -> Scores:
        """Scores a text and its answer, one at a time, off the event loop. Raises Refusal."""
        assert self.scorer is not None
        gone = threading.Event()
        try:
            async with asyncio.timeout(self.limits.request_s), self.scoring:
                scores = await asyncio.to_thread(self.scorer.score, ids, gone.is_set)
        except TimeoutError as error:
            raise self._refusal(error) from error
        finally:
            gone.set()
        if not np.isfinite(scores.logprob).all():
            raise Refusal(422, "the model's scores of this text are not finite; it has diverged")
        return scores

    def _refusal(self, error: Exception) -> Refusal:
        assert self.worker is not None
        if isinstance(error, Late):
            return Refusal(503, f"no slot was free within {self.limits.queue_s:g} s; try again")
        if isinstance(error, TimeoutError):
            return Refusal(503, f"not at an end within {self.limits.request_s:g} s; ask for fewer tokens")
        if self.worker.failure:
            return Refusal(503, f"the engine failed: {self.worker.failure}")
        raise error


def _into(inbox: asyncio.Queue[tuple[int, Piece | Exception]], index: int) -> Callable[..., None]:
    return lambda piece: inbox.put_nowait((index, piece))
