"""Guards the server: API keys, allowed hosts, requests from foreign web pages, and unhandled errors."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Sequence

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bigmodel.infer.openai_api import Refusal
from bigmodel.infer.service import Service

log = logging.getLogger("uvicorn.error")

NAMES = ("completions", "chat/completions", "embeddings", "models", "predict")
PATHS = {"/", "/health", "/metrics", *(f"/v1/{name}" for name in NAMES)}
CLIENT = "bigmodel.client"  # key of the scope: the client whose share of the queue a request takes


def client_of(request: Request) -> str:
    """The client's name, by which it gets its share of the queue."""
    return str(request.scope.get(CLIENT, ""))


class Gate:
    """ASGI middleware around every request: refuses, counts, times, and answers unhandled errors."""

    def __init__(
        self, inner: ASGIApp, service: Service, keys: Sequence[str] = (), hosts: Sequence[str] = ()
    ) -> None:
        self.inner, self.service, self.keys, self.hosts = inner, service, keys, {h.lower() for h in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        began, path, status, typed = time.perf_counter(), scope["path"], 0, b""

        async def sending(message: Message) -> None:
            nonlocal status, typed
            if message["type"] == "http.response.start":
                status = message["status"]
                typed = dict(message.get("headers", ())).get(b"content-type", b"")
            await send(message)

        try:
            try:
                self._admit(scope, Headers(scope=scope))
            except Refusal as refusal:
                await JSONResponse(refusal.body(), refusal.status)(scope, receive, sending)
            else:
                await self.inner(scope, receive, sending)
        except (Exception, asyncio.CancelledError) as error:
            last = _last(scope, error)
            if not status:
                await JSONResponse(last.body(), last.status)(scope, receive, sending)
            elif typed.startswith(b"text/event-stream"):
                body = f"data: {json.dumps(last.body())}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": False})
            else:
                raise
        finally:
            path = path if path in PATHS else "other"  # clients cannot add paths to the metrics
            self.service.requests.labels(path, status).inc()
            self.service.seconds.labels(path).observe(time.perf_counter() - began)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """Returns the name of the request's client. Raises Refusal for a request that is not allowed."""
        address = _network(scope["client"][0]) if scope.get("client") else ""
        scope[CLIENT] = address
        if not self.keys:
            if self.hosts and not self._is_here(headers.get("host", "")):
                said = "this server does not answer to that Host; add the name to --allowed_hosts"
                raise Refusal(403, said)
        elif scope["path"].startswith("/v1/"):
            number = self._key(headers.get("authorization", ""))
            if len(self.keys) > 1:
                scope[CLIENT] = f"key {number}"
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            # A page of another site may send other types, or none, without asking the server first.
            if kind != "application/json" and (kind or "origin" in headers):
                raise Refusal(415, "send the body as Content-Type: application/json")

    def _key(self, header: str) -> int:
        """-> which of the keys was sent. Raises Refusal 401."""
        scheme, _, given = header.partition(" ")
        found = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self.keys]
        if scheme.lower() != "bearer" or not any(found):
            raise Refusal(401, "send the API key as: Authorization: Bearer KEY")
        return found.index(True)

    def _is_here(self, host: str) -> bool:
        """True for a Host that is an address, a name without a dot, or one of the server's: no name on the
        internet, which a foreign page could have made to lead here."""
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name in self.hosts or ("." not in name.strip(".") and ":" not in name):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _network(address: str) -> str:
    """The address; for IPv6 the network, of which one customer has all addresses."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
    return address


def _last(scope: Scope, error: BaseException) -> Refusal:
    """Makes a refusal of an exception that nothing else handled; the log has its traceback."""
    if isinstance(error, asyncio.CancelledError):
        return Refusal(503, "the server stops before this answer's end")
    log.error("%s %s", scope["method"], scope["path"], exc_info=error)
    return Refusal(503, f"the server failed at this request: {type(error).__name__}; its log says where")
