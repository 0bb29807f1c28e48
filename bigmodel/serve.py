"""An HTTP server for a trained model, which OpenAI's clients understand.

One thread steps the engine; the event loop reads requests, checks them and hands the news of their answers
on. What is not served is refused with one line: 400, 401, 404, 413, 422, 429 or (while draining) 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import html
import json
import pathlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import prometheus_client as prometheus
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bigmodel import decoder as decoder_lib
from bigmodel import engine, infer, openai_api
from bigmodel.config import InputError
from bigmodel.engine import Engine, News
from bigmodel.infer import Writer
from bigmodel.openai_api import Ask, Refusal
from bigmodel.predict import Answerer, Predictor
from bigmodel.worker import Listener, Text, Told, Worker, tell

PAGE = pathlib.Path(__file__).with_name("page.html")
NAMES = ("completions", "chat/completions", "embeddings", "models", "predict")
PATHS = {"/", "/health", "/metrics", *(f"/v1/{name}" for name in NAMES)}


@dataclass(frozen=True)
class Limits:
    """What one request, and all at once, may ask for."""

    body_bytes: int = 1 << 20
    prompt_tokens: int = 0  # 0: the model's context
    output_tokens: int = 0  # 0: the model's context
    answers: int = 16  # of one request: its prompts times n
    queue: int = 256  # answers that may wait beyond those that run
    inputs: int = 64  # of one /v1/predict or /v1/embeddings


class Service:
    """What the routes share: the model, its engine if it writes text, limits and metrics."""

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
        self.slots, self.waiting, self.context = sizes.slots, 0, 0
        if writer is not None:
            self.worker = Worker(Engine(writer.decoder, sizes))
            self.context = self.worker.batch.context
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
            gauge.set_function(lambda key=key: self.worker.batch.load[key] if self.worker else 0)  # type: ignore

    @property
    def asks(self) -> str:
        """What the page asks for: `completion`, `text`, `image` or `row`."""
        if self.predictor is None:
            return "completion"
        return self.predictor.reads

    def ids_of(self, prompt: str | tuple[int, ...]) -> list[int]:
        """Raises Refusal for a prompt that is too long or has no such ids."""
        assert self.writer is not None
        ids = self.writer.encode(prompt).tolist() if isinstance(prompt, str) else list(prompt)
        if len(ids) > self.limits.prompt_tokens:
            raise Refusal(
                422,
                f"the prompt has {len(ids)} tokens, more than {self.limits.prompt_tokens}; shorten it",
                "prompt",
            )
        return ids

    def plan(self, ask: Ask) -> list[engine.Request]:
        """A request to the engine for every answer. Raises Refusal."""
        if self.worker is None:
            raise Refusal(404, f"{self.name} writes no text; use /v1/predict")
        if self.worker.failure:
            raise Refusal(503, f"the engine failed: {self.worker.failure}")
        if ask.model not in (None, self.name):
            raise Refusal(404, f"model {ask.model!r} is not here; this is {self.name}", "model")
        out = []
        for prompt in ask.prompts:
            ids = self.ids_of(prompt)
            room = self.context - len(ids)
            length = min(room, self.limits.output_tokens) if ask.max_tokens is None else ask.max_tokens
            if length > self.limits.output_tokens or length > room or length < 1:
                most = max(min(room, self.limits.output_tokens), 0)
                said = f"max_tokens is {length}, but after {len(ids)} of the prompt at most {most} fit"
                raise Refusal(422, said, "max_tokens")
            for index in range(ask.n):
                seed = (ask.settings.seed + index) % 2**31
                request = engine.Request(ids, length, dataclasses.replace(ask.settings, seed=seed))
                try:
                    self.worker.batch.check(request)
                except InputError as error:
                    raise Refusal(422, str(error), "prompt") from error
                out.append(request)
        if self.waiting + len(out) > self.slots + self.limits.queue:
            raise Refusal(429, f"{self.waiting} answers are under way already; try again in a second")
        return out

    async def answers(
        self, ask: Ask, requests: Sequence[engine.Request]
    ) -> AsyncGenerator[tuple[int, str, str | None, int]]:
        """(answer's index, new text, reason if it has ended, its ids then) as they come.

        Whatever ends this generator cancels what is left.
        """
        assert self.worker is not None
        assert self.writer is not None
        inbox = asyncio.Queue[tuple[int, News | Exception]]()
        texts = [Text(self.writer, ask.stop) for _ in requests]
        self.waiting += len(requests)
        cancels: dict[int, Callable[[], None]] = {}
        whole = not ask.stream and not ask.stop  # then nobody looks at what has come so far
        try:
            for index, request in enumerate(requests):
                self.tokens.labels("prompt").inc(len(request.prompt))
                cancels[index] = self.worker.submit(request, _listener(inbox, index), whole)
            while cancels:
                index, news = await inbox.get()
                if isinstance(news, Exception):
                    raise Refusal(503, f"the engine failed: {self.worker.failure}")
                text = texts[index]
                if index not in cancels:
                    continue  # it ended by its text, and this was on its way
                new = text.add(news.ids, news.done)
                if text.reason is not None:
                    self.tokens.labels("completion").inc(len(text.ids))
                    cancel = cancels.pop(index)
                    if not news.done:
                        cancel()
                if new or text.reason is not None:
                    yield index, new, text.reason, len(text.ids) if text.reason else 0
        finally:
            self.waiting -= len(requests)
            for cancel in cancels.values():
                cancel()


def _listener(inbox: asyncio.Queue[tuple[int, News | Exception]], index: int) -> Listener:
    return lambda news: inbox.put_nowait((index, news))


# --------------------------------------------------------------------------------------------- the app


def app(service: Service, key: str = "") -> FastAPI:
    """The routes. `key`: what clients must send as a bearer token; "": nothing."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if service.worker is not None:
            loop = asyncio.get_running_loop()

            def hand_over(told: list[Told]) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(tell, told)

            service.worker.hand_over = hand_over
            service.worker.start()
        yield
        if service.worker is not None:
            await asyncio.to_thread(service.worker.stop)

    api = FastAPI(title="bigmodel", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @api.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        headers = {"Retry-After": "1"} if refusal.status in (429, 503) else None
        return JSONResponse(refusal.body(), refusal.status, headers)

    @api.exception_handler(ClientDisconnect)
    async def left(request: Request, gone: ClientDisconnect) -> Response:
        return Response(status_code=499)  # before its body was here; nobody reads this

    api.add_middleware(Watch, service=service, key=key)
    api.include_router(_text_routes(service))
    api.include_router(_other_routes(service))
    return api


class Watch:
    """Around every request, as plain ASGI: the API key, counts and times."""

    def __init__(self, inner: ASGIApp, service: Service, key: str) -> None:
        self.inner, self.service, self.key = inner, service, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        began, path, status = time.perf_counter(), scope["path"], 500

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if self.key and path.startswith("/v1/") and not self._knows(Headers(scope=scope)):
                refusal = Refusal(401, "send the API key as: Authorization: Bearer KEY")
                await JSONResponse(refusal.body(), refusal.status)(scope, receive, sending)
            else:
                await self.inner(scope, receive, sending)
        finally:
            path = path if path in PATHS else "other"  # metrics keep no names that clients make up
            self.service.requests.labels(path, status).inc()
            self.service.seconds.labels(path).observe(time.perf_counter() - began)

    def _knows(self, headers: Headers) -> bool:
        given = headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self.key.encode())


async def _body(service: Service, request: Request) -> dict[str, Any]:
    """The request's JSON object. Raises Refusal, as soon as the body is too large."""
    most, body = service.limits.body_bytes, bytearray()
    too_large = Refusal(413, f"the body is larger than {most} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise too_large
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_large
    return openai_api.parse(bytes(body))


def _text_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        ask = openai_api.completion(await _body(service, request), service.limits.answers)
        return await _respond(service, request, ask, "text_completion")

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        ask = openai_api.chat(await _body(service, request), service.limits.answers)
        return await _respond(service, request, ask, "chat.completion")

    return router


def _other_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        tree = await _body(service, request)
        found = openai_api.texts(tree, "input", service.limits.inputs)
        rows, count = await _predicted(service, found, embed=True)
        as_base64 = tree.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": openai_api.packed(row) if as_base64 else row}
            for i, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})

    @router.post("/v1/predict")
    async def predict(request: Request) -> Response:
        tree = await _body(service, request)
        inputs = tree.get("inputs")
        if not isinstance(inputs, list) or not 1 <= len(inputs) <= service.limits.inputs:
            raise Refusal(422, f"inputs must be a list of 1 to {service.limits.inputs}", "inputs")
        rows, _ = await _predicted(service, inputs)
        return JSONResponse({"model": service.name, "predictions": rows})

    @router.get("/v1/models")
    async def listed() -> Response:
        model = {"id": service.name, "object": "model", "created": 0, "owned_by": "bigmodel"}
        return JSONResponse({"object": "list", "data": [model]})

    @router.get("/health")
    async def health() -> Response:
        failure = service.worker.failure if service.worker else ""
        return JSONResponse({"status": failure or "ok"}, 500 if failure else 200)

    @router.get("/metrics")
    async def metrics() -> Response:
        text = prometheus.generate_latest(service.registry)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/")
    async def page() -> Response:
        text = PAGE.read_text().replace("ASKS", service.asks).replace("MODEL", html.escape(service.name))
        return HTMLResponse(text)

    return router


async def _predicted(service: Service, inputs: Sequence[Any], embed: bool = False) -> tuple[list[Any], int]:
    """Rows of `Predictor`, one request at a time, off the event loop."""
    if service.predictor is None:
        raise Refusal(404, f"{service.name} predicts nothing; it writes text")
    if service.waiting + len(inputs) > service.slots + service.limits.queue:
        raise Refusal(429, f"{service.waiting} answers are under way already; try again in a second")
    service.waiting += len(inputs)
    try:
        async with service.predicting:
            work = service.predictor.embed if embed else service.predictor.predict
            return await asyncio.to_thread(work, inputs)
    except InputError as error:
        raise Refusal(422, str(error), "inputs") from error
    finally:
        service.waiting -= len(inputs)


async def _respond(service: Service, request: Request, ask: Ask, kind: str) -> Response:
    plans = service.plan(ask)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    prompt_tokens = sum(len(plan.prompt) for plan in plans[:: ask.n])
    if ask.stream:
        lines = _stream(service, ask, plans, kind, head, prompt_tokens)
        return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    whole = asyncio.ensure_future(_whole(service, ask, plans))
    left = asyncio.ensure_future(_disconnected(request))
    await asyncio.wait({whole, left}, return_when=asyncio.FIRST_COMPLETED)
    left.cancel()
    if not whole.done():
        whole.cancel()
        return Response(status_code=499)  # nobody reads it
    texts, reasons, count = whole.result()
    choices: list[dict[str, Any]] = []
    for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
        said = {"text": text} if kind == "text_completion" else {"message": _message(text)}
        choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
    return JSONResponse({**head, "object": kind, "choices": choices, "usage": _usage(prompt_tokens, count)})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(
    service: Service, ask: Ask, plans: Sequence[engine.Request]
) -> tuple[list[str], list[str], int]:
    texts, reasons, count = [""] * len(plans), [""] * len(plans), 0
    async with contextlib.aclosing(service.answers(ask, plans)) as answers:
        async for index, new, reason, ids in answers:
            texts[index] += new
            reasons[index], count = reason or "", count + ids
    return texts, reasons, count


async def _stream(
    service: Service, ask: Ask, plans: Sequence[engine.Request], kind: str, head: dict[str, Any],
    prompt_tokens: int,
) -> AsyncIterator[str]:  # fmt: skip
    """Server-sent events, as OpenAI's: a chunk for every piece of text, and [DONE]."""
    chat = kind == "chat.completion"
    head = {**head, "object": f"{kind}.chunk" if chat else kind}
    started: set[int] = set()
    count = 0
    try:
        async with contextlib.aclosing(service.answers(ask, plans)) as answers:
            async for index, new, reason, ids in answers:
                count += ids
                said: dict[str, Any] = {"text": new}
                if chat:
                    said = {"delta": _message(new) if index not in started else {"content": new}}
                    started.add(index)
                choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
                yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
    except Refusal as refusal:
        yield f"data: {json.dumps(refusal.body())}\n\n"
    if ask.include_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': _usage(prompt_tokens, count)})}\n\n"
    yield "data: [DONE]\n\n"


def _message(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def load(
    directory: pathlib.Path,
    step: int | None = None,
    *,
    name: str,
    limits: Limits,
    slots: int,
    cache_dtype: str,
) -> Service:
    """The run in `directory`, ready to serve: everything it will need is compiled.

    Raises:
        InputError: as `infer.load`.
    """
    built, state = infer.load(directory, step)
    sizes = engine.Sizes(slots=slots)
    writer: Writer | None = None
    predictor: Predictor | Answerer | None = None
    if built.config.task.name in decoder_lib.READERS:
        writer = Writer.of(built, state, directory, cache_dtype=cache_dtype)
    if writer is None:
        predictor = Predictor.of(built, state, directory)
    elif not writer.decoder.batches:
        predictor, writer = Answerer(writer), None
    service = Service(name, writer, predictor, limits, sizes)
    if service.worker is not None:
        service.worker.batch.warm()
    return service
