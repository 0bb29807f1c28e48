"""Runs an engine in a thread of its own, and makes text of its ids in a second one.

Clients take turns: of all that wait for a slot, the next to get one is the next client's oldest request.

An answer's path: `Worker.submit` (any thread) -> `Worker.run` steps the engine -> `TextThread` detokenizes
-> `deliver` calls the subscriber, by default in that thread; a server delivers in its event loop.
"""

from __future__ import annotations

import collections
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bigmodel.infer import engine
from bigmodel.infer.detokenize import Detokenizer, Piece
from bigmodel.infer.engine import Engine, TokenEvent
from bigmodel.machines import memory

IDLE_S = 10.0  # after which the memory of the last requests is given back


class Late(Exception):
    """A request that waited too long for a slot."""


@dataclass(frozen=True)
class Subscriber:
    """Who reads an answer."""

    notify: Callable[[Piece | Exception], None]  # called where the worker's `deliver` runs
    text: Detokenizer
    entire: bool  # notified once, at the answer's end


# First a TokenEvent or an Exception from the engine; then the Piece or Exception that the subscriber gets.
Update = tuple[Subscriber, Any]


@dataclass
class _Waiting:
    request: engine.Request
    subscriber: Subscriber
    since: float
    number: int | None = None  # of the engine, which has it then
    cancelled: bool = False


class Worker(threading.Thread):
    """Steps an engine for as long as there is work. Other threads only `submit`, `cancel` and `stop`."""

    def __init__(self, batch: Engine, queue_s: float = float("inf")) -> None:
        """Args: queue_s: how long a request may wait for a slot."""
        super().__init__(daemon=True, name="engine")
        self.batch, self.queue_s, self.failure = batch, queue_s, ""
        self.texts = TextThread()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: dict[str, collections.deque[_Waiting]] = {}  # by client; the first has the next turn
        self._running: dict[int, Subscriber] = {}
        self._ids: dict[int, list[int]] = {}  # so far, of answers whose subscribers are notified once

    def submit(self, request: engine.Request, subscriber: Subscriber, client: str = "") -> Callable[[], None]:
        """Queues a request -> what cancels it.

        All new ids of a step are put to the text thread at once: waking another thread costs more than most
        of what it then does.
        """
        entry = _Waiting(request, subscriber, time.monotonic())

        def add() -> None:
            self._waiting.setdefault(client, collections.deque()).append(entry)

        def cancel() -> None:
            entry.cancelled = True
            if entry.number is not None and self._forget(entry.number) is not None:
                self.batch.cancel(entry.number)

        self._inbox.put(add)
        return lambda: self._inbox.put(cancel)

    @property
    def waiting(self) -> int:
        """Requests that the engine does not have yet; any thread may read it."""
        return sum(map(len, list(self._waiting.values())))

    def start(self) -> None:
        self.texts.start()
        super().start()

    def stop(self) -> None:
        self._inbox.put(None)
        self.join()
        self.texts.stop()

    def run(self) -> None:
        while True:
            try:
                while not (self.batch.busy or self._waiting) or not self._inbox.empty():
                    task = self._next_task()
                    if task is None:
                        return
                    task()
                updates = self._take_turns()
                updates += [new for event in self.batch.step() if (new := self._route(event)) is not None]
                if updates:
                    self.texts.put(updates)
            except Exception as error:  # the requests that run are lost; /health says why
                self.failure = f"{type(error).__name__}: {error}"
                waiting = [entry.subscriber for line in self._waiting.values() for entry in line]
                self.texts.put([(subscriber, error) for subscriber in [*self._running.values(), *waiting]])
                return

    def _next_task(self) -> Callable[[], None] | None:
        """Waits for the next task. Gives unused memory back once, if that takes long."""
        try:
            return self._inbox.get(timeout=IDLE_S)
        except queue.Empty:
            memory.give_back()
            return self._inbox.get()

    def _take_turns(self) -> list[Update]:
        """Gives the engine what its free slots take, and one more, client after client -> who is too late."""
        late: list[Update] = []
        load = self.batch.load
        room = self.batch.sizes.slots + 1 - load["running"] - load["waiting"]
        oldest = time.monotonic() - self.queue_s
        for client, line in list(self._waiting.items()):
            while line and (line[0].cancelled or line[0].since < oldest):
                entry = line.popleft()
                late += [] if entry.cancelled else [(entry.subscriber, Late())]
            if not line:
                del self._waiting[client]
        while room > 0 and self._waiting:
            client, line = next(iter(self._waiting.items()))
            entry = line.popleft()
            del self._waiting[client]
            if line:
                self._waiting[client] = line  # now the last
            if not entry.cancelled:
                self._begin(entry)
                room -= 1
        return late

    def _begin(self, entry: _Waiting) -> None:
        entry.number = self.batch.add(entry.request)
        self._running[entry.number] = entry.subscriber
        if entry.subscriber.entire:
            self._ids[entry.number] = []

    def _route(self, event: TokenEvent) -> Update | None:
        """The event with its subscriber; None where nobody is to be notified now."""
        ids = self._ids.get(event.number)
        if ids is not None:
            ids += event.ids
            event = event._replace(ids=ids)
        subscriber = self._forget(event.number) if event.done else self._running.get(event.number)
        return None if subscriber is None or (ids is not None and not event.done) else (subscriber, event)

    def _forget(self, number: int) -> Subscriber | None:
        self._ids.pop(number, None)
        return self._running.pop(number, None)


class TextThread(threading.Thread):
    """Detokenizes events, so that neither the engine nor an event loop waits for a tokenizer."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="text")
        self.deliver: Callable[[list[Update]], None] = notify
        self._inbox: queue.SimpleQueue[list[Update] | None] = queue.SimpleQueue()

    def put(self, updates: list[Update]) -> None:
        self._inbox.put(updates)

    def stop(self) -> None:
        self._inbox.put(None)
        self.join()

    def run(self) -> None:
        while (updates := self._inbox.get()) is not None:
            pieces: list[Update] = []
            for subscriber, event in updates:
                try:
                    piece = subscriber.text.piece(event) if isinstance(event, TokenEvent) else event
                except Exception as error:  # of this answer alone
                    piece = error
                if not isinstance(piece, Piece) or piece.text or piece.reason:
                    pieces.append((subscriber, piece))
            if pieces:
                self.deliver(pieces)


def notify(pieces: list[Update]) -> None:
    """Calls each subscriber with its piece."""
    for subscriber, piece in pieces:
        subscriber.notify(piece)
