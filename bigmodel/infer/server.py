"""An HTTP server for a trained model, which OpenAI's clients understand.

One thread steps the engine, one makes text of its ids; the event loop reads requests, checks them and sends
the pieces of their answers. What is not served is refused with one line: 400, 401, 403, 404, 408, 413, 415,
422, 429, 431 or (while draining, or for a fault of the server) 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import pathlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import prometheus_client as prometheus
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from bigmodel.config import InputError
from bigmodel.infer import answers, engine, loading, openai_api
from bigmodel.infer.access import Gate, client_of
from bigmodel.infer.generate import Writer
from bigmodel.infer.openai_api import Refusal
from bigmodel.infer.predict import Answerer, Predictor
from bigmodel.infer.service import Limits, Service
from bigmodel.infer.worker import Update, notify

__all__ = ["Limits", "Service", "app", "load"]

T = TypeVar("T")
PAGE = pathlib.Path(__file__).with_name("page.html")


def app(service: Service, key: str = "", hosts: Sequence[str] = ()) -> FastAPI:
    """Makes the server's routes.

    Args:
        key: what clients must send as a bearer token, or several with commas between; "": nothing.
        hosts: names with a dot that a request's Host may have; none: any. A page of another site could
            otherwise reach a server on loopback by a name that it controls.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if service.worker is not None:
            loop = asyncio.get_running_loop()

            def deliver(pieces: list[Update]) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any longer
                    loop.call_soon_threadsafe(notify, pieces)

            service.worker.texts.deliver = deliver
            service.worker.start()
        yield
        service.pictures.close()
        if service.worker is not None:
            await asyncio.to_thread(service.worker.stop)

    api = FastAPI(title="bigmodel", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @api.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        headers = {"Retry-After": "1"} if refusal.status in (429, 503) else None
        return JSONResponse(refusal.body(), refusal.status, headers)

    @api.exception_handler(HTTPException)
    async def missing(request: Request, error: HTTPException) -> JSONResponse:
        refusal = Refusal(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")
        return JSONResponse(refusal.body(), refusal.status, error.headers)

    @api.exception_handler(ClientDisconnect)
    async def left(request: Request, gone: ClientDisconnect) -> Response:
        return Response(status_code=499)  # it left before its body was here; nobody reads this

    api.add_middleware(Gate, service=service, keys=tuple(filter(None, key.split(","))), hosts=tuple(hosts))
    api.include_router(_text_routes(service))
    api.include_router(_other_routes(service))
    return api


async def _body(service: Service, request: Request) -> dict[str, Any]:
    """Reads the request's JSON object. Raises Refusal as soon as the body is too large."""
    most, body = service.limits.body_bytes, bytearray()
    too_large = Refusal(413, f"the body is larger than {most} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > most:
        raise too_large
    try:
        async for part in request.stream():
            body += part
            service.receiving += len(part)
            if len(body) > most:
                raise too_large
            if service.receiving > service.limits.bodies_bytes:
                raise Refusal(503, "too many bodies are being sent at once; try again in a second")
    finally:
        service.receiving -= len(body)
    return openai_api.parse(bytes(body))


def _text_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        tree = await _body(service, request)
        wanted = openai_api.completion(tree, service.limits.answers, service.drawing)
        return await answers.respond(service, request, wanted, "text_completion", client_of(request))

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        tree = await _body(service, request)
        wanted = openai_api.chat(tree, service.limits.answers, service.drawing, service.chat_ids)
        return await answers.respond(service, request, wanted, "chat.completion", client_of(request))

    return router


def _other_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        wanted = openai_api.embedding(await _body(service, request), service.limits.inputs)
        if wanted.model not in (None, service.name):
            raise Refusal(404, f"model {wanted.model!r} is not here; this is {service.name}", "model")
        rows, count = await _predicted(service, request, wanted.inputs, embed=True)
        if wanted.dimensions not in (None, len(rows[0])):
            said = f"dimensions is {wanted.dimensions}, but vectors have {len(rows[0])}"
            raise Refusal(422, said, "dimensions")
        data = [
            {"object": "embedding", "index": i, "embedding": openai_api.packed(row) if wanted.base64 else row}
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
        rows, _ = await _predicted(service, request, inputs)
        return JSONResponse({"model": service.name, "predictions": rows})

    @router.get("/v1/models")
    async def listed() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @router.get("/v1/models/{name:path}")
    async def described(name: str) -> Response:
        if name != service.name:
            raise Refusal(404, f"model {name[:100]!r} is not here; this is {service.name}", "model")
        return JSONResponse(_model(service))

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
        text = (
            PAGE.read_text()
            .replace("INPUT_KIND", service.input_kind)
            .replace("MODEL", html.escape(service.name))
        )
        return HTMLResponse(text)

    return router


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": 0, "owned_by": "bigmodel"}


# ---------------------------------------------------------------------------------------------- predictions


async def _predicted(
    service: Service, request: Request, inputs: Sequence[Any], embed: bool = False
) -> tuple[list[Any], int]:
    """Predicts a row for each input, until the client leaves. Raises Refusal or ClientDisconnect."""
    predictor = service.predictor
    if predictor is None:
        raise Refusal(404, f"{service.name} predicts nothing; it writes text")
    with service.place(client_of(request), len(inputs)):
        try:
            async with asyncio.timeout(service.limits.request_s):
                return await answers.unless_gone(request, _rows(service, predictor, inputs, embed))
        except InputError as error:
            raise Refusal(422, str(error), "inputs") from error
        except TimeoutError as error:
            said = f"not at an end within {service.limits.request_s:g} s; send fewer inputs"
            raise Refusal(503, said) from error


async def _rows(
    service: Service, predictor: Predictor | Answerer, inputs: Sequence[Any], embed: bool
) -> tuple[list[Any], int]:
    """Reads inputs one by one, without the lock; then each batch waits for its turn at the model."""
    rows: list[Any] = []
    tokens = 0
    run: Callable[..., tuple[list[Any], int]] = predictor.embedded if embed else predictor.predicted
    for first in range(0, len(inputs), predictor.rows):
        part = enumerate(inputs[first : first + predictor.rows], first)
        read = [await asyncio.to_thread(predictor.read, item, number) for number, item in part]
        async with service.predicting:
            new, count = await _to_its_end(asyncio.to_thread(run, read, first))
        rows, tokens = rows + new, tokens + count
    return rows, tokens


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Returns the work's result; waits for its end even if cancelled, since a thread cannot be stopped."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        task.exception()  # nobody else will look
        raise


def load(
    directory: pathlib.Path,
    step: int | None = None,
    *,
    name: str,
    limits: Limits,
    slots: int,
    cache_dtype: str,
) -> Service:
    """Loads the run in `directory` and compiles everything that serving it needs.

    Raises:
        InputError: as `infer.load`.
    """
    built, state = loading.load(directory, step)
    sizes = engine.Sizes(slots=slots)
    writer: Writer | None = None
    predictor: Predictor | Answerer | None = None
    if built.config.task.generates:
        writer = Writer.of(built, state, directory, cache_dtype=cache_dtype)
    if writer is None:
        predictor = Predictor.of(built, state, directory)
    elif not writer.decoder.batches:
        predictor, writer = Answerer(writer), None
    service = Service(name, writer, predictor, limits, sizes)
    service.warm()
    return service
