"""HTTP connections with limits on their number, on the size and time of headers and bodies, and on stalls.

Uvicorn's protocol over httptools limits none of these. Times are checked once a second for all
connections, so that a request starts no timers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

log = logging.getLogger("uvicorn.error")

LINGER_S = 1.0  # between an early refusal and the end of its connection: the client is still sending
OVERHEAD = 8  # bytes around each byte of a body at most, as in chunks of one byte
IDLE, HEADER, BODY, ANSWER = "idle", "header", "body", "answer"


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of connections."""

    connections: int = 1024
    header_bytes: int = 32 << 10
    headers: int = 100
    body_bytes: int = 1 << 20
    header_s: float = 10.0  # from a connection's or a request's beginning to the end of its header
    body_s: float = 30.0  # from there to the end of its body
    write_s: float = 60.0  # in which a client reads nothing of what was sent


class Connection(HttpToolsProtocol):
    """One client's connection. `limits` is set by `limited`."""

    limits: ConnectionLimits

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.phase, self.since = IDLE, time.monotonic()
        self.stalled: float | None = None
        self.refused = False
        self._raw = self._body = 0  # bytes of the incoming request, and of its body

    # -------------------------------------------------------------------------------------- its beginning

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._enter(HEADER)
        if len(self.connections) > self.limits.connections:
            _warn_that_all_are_in_use(self.limits.connections)
            resting = [c for c in self.connections if isinstance(c, Connection) and c.phase != ANSWER]
            oldest = min(resting, key=lambda each: each.since)
            if oldest is self:
                self.refuse(503, f"all {self.limits.connections} connections are in use; try again")
            else:
                oldest.transport.abort()
                self.connections.discard(oldest)

    def _enter(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    # -------------------------------------------------------------------------------------- what comes in

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return
        self._raw += len(data)
        super().data_received(data)
        if self.refused or self.transport.is_closing():
            return
        if self.phase in (IDLE, HEADER):
            if self._raw > self.limits.header_bytes:
                self._refuse_header()
        elif self.phase == BODY:
            around = self._raw - self._body
            if around > 2 * self.limits.header_bytes + OVERHEAD * self._body:
                self.refuse(400, "the chunks of the body hold more than the body")
            elif self._body > 2 * self.limits.body_bytes:
                self.refuse(413, f"the body is larger than {self.limits.body_bytes} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._raw = self._body = 0
        self._enter(HEADER)

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.header_bytes or len(self.headers) > self.limits.headers:
            self._refuse_header()
        if self.refused:
            return
        self._enter(BODY)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        if not self.refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.refused:
            return
        super().on_message_complete()
        self._enter(IDLE if self.cycle.response_complete else ANSWER)
        self._raw = 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.phase == ANSWER and not self.pipeline:
            self._enter(IDLE)

    # --------------------------------------------------------------------------------------- what goes out

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = time.monotonic()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stalled = None

    def send_400_response(self, msg: str) -> None:
        """Refuses what is not HTTP; uvicorn calls this."""
        self.refuse(400, msg)

    def _refuse_header(self) -> None:
        most = f"{self.limits.header_bytes} bytes or {self.limits.headers} lines"
        self.refuse(431, f"the header has more than {most}")

    def refuse(self, status: int, message: str, linger_s: float = LINGER_S) -> None:
        """Answers with one line unless an answer has begun, stops reading, and ends the connection."""
        if self.refused or self.transport.is_closing():
            return
        self.refused = True
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            kind = "server_error" if status >= 500 else "invalid_request_error"
            error = {"message": message, "type": kind, "param": None, "code": None}
            body = json.dumps({"error": error}).encode()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + head % len(body) + body)
        if self.cycle is not None:
            self.cycle.disconnected = True  # the application's answer goes nowhere
            self.cycle.message_event.set()
        self._unset_keepalive_if_required()
        self.flow.pause_reading()
        if linger_s:
            self.loop.call_later(linger_s, self.transport.abort)
        else:
            self.transport.close()

    def shutdown(self) -> None:
        """Stops with the server: an incomplete request is refused, a complete one is answered."""
        unread = self.phase == BODY and self.cycle is not None and not self.cycle.response_complete
        if unread:
            self.refuse(503, "the server stops", linger_s=0)
        else:
            super().shutdown()

    def overdue(self, now: float) -> None:
        """Ends the connection if its time is over."""
        if self.transport is None or self.transport.is_closing() or self.refused:
            return
        waited = now - self.since
        if self.stalled is not None and now - self.stalled > self.limits.write_s:
            self.transport.abort()
        elif self.phase in (IDLE, HEADER) and waited > self.limits.header_s:
            if self._raw:
                self.refuse(408, f"no header within {self.limits.header_s:g} s")
            else:
                self.transport.close()
        elif self.phase == BODY and waited > self.limits.body_s:
            self.refuse(408, f"no body within {self.limits.body_s:g} s")


def limited(limits: ConnectionLimits) -> type[Connection]:
    """The protocol class with these limits, for `uvicorn.Config(http=...)`."""
    return type("LimitedConnection", (Connection,), {"limits": limits})


async def watch(connections: Callable[[], Iterable[Any]], every_s: float = 1.0) -> None:
    """Ends overdue connections, for as long as it runs."""
    while True:
        await asyncio.sleep(every_s)
        now = time.monotonic()
        for connection in list(connections()):
            if isinstance(connection, Connection):
                connection.overdue(now)


_warned = [-1e9]


def _warn_that_all_are_in_use(most: int) -> None:
    """Warns at most once a minute."""
    if time.monotonic() - _warned[0] > 60:
        _warned[0] = time.monotonic()
        log.warning("all %d connections are in use: those that rest longest are closed (--connections)", most)
