"""An engine at work in a thread of its own, and a second thread that makes text of what it brings.

Clients take turns: of all that wait for a slot, the next to get one is the next client's oldest request.
"""

from __future__ import annotations

import collections
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bigmodel.data.corpus import is_byte_level
from bigmodel.infer import engine
from bigmodel.infer.engine import Engine, News
from bigmodel.infer.generate import Writer
from bigmodel.infer.stops import Stops
from bigmodel.machines import memory

CONTEXT_IDS = 16  # that are decoded again with new ones: no tokenizer's character is longer
IDLE_S = 10.0  # after which the memory of the last requests is given back
WINDOW_IDS = 48  # when so many are decoded each time, the first of them are let go


class Late(Exception):
    """A request that waited too long for a slot."""


class Piece(NamedTuple):
    """New text of an answer that is certain, and why it ended, if it has."""

    text: str
    reason: str | None
    done: bool  # the engine works on it no more


@dataclass(frozen=True)
class Answer:
    """Who hears of an answer. The listener is called where the worker's `hand_over` calls `tell`."""

    listener: Callable[[Piece | Exception], None]
    text: Text
    entire: bool  # told once, at the answer's end


@dataclass
class _Waiting:
    request: engine.Request
    answer: Answer
    since: float
    number: int | None = None  # of the engine, which has it then
    cancelled: bool = False


Told = tuple[Answer, Any]  # News or an Exception from the engine; a Piece or an Exception for the listener


class Worker(threading.Thread):
    """Steps an engine for as long as there is work. Other threads only `submit`, `cancel` and `stop`."""

    def __init__(self, batch: Engine, queue_s: float = float("inf")) -> None:
        """Args: queue_s: how long a request may wait for a slot."""
        super().__init__(daemon=True, name="engine")
        self.batch, self.queue_s, self.failure = batch, queue_s, ""
        self.scribe = Scribe()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: dict[str, collections.deque[_Waiting]] = {}  # by client; the first has the next turn
        self._answers: dict[int, Answer] = {}
        self._ids: dict[int, list[int]] = {}  # so far, of answers that are told once

    def submit(self, request: engine.Request, answer: Answer, client: str = "") -> Callable[[], None]:
        """The answer's listener will be told -> what cancels it.

        All that a step brought is handed over at once: waking another thread costs more than most of what
        there is to tell.
        """
        entry = _Waiting(request, answer, time.monotonic())

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
        """Requests that the engine does not have yet; any thread may ask."""
        return sum(map(len, list(self._waiting.values())))

    def start(self) -> None:
        self.scribe.start()
        super().start()

    def stop(self) -> None:
        self._inbox.put(None)
        self.join()
        self.scribe.stop()

    def run(self) -> None:
        while True:
            try:
                while not (self.batch.busy or self._waiting) or not self._inbox.empty():
                    task = self._next_task()
                    if task is None:
                        return
                    task()
                told = self._take_turns()
                told += [pair for news in self.batch.step() if (pair := self._told(news)) is not None]
                if told:
                    self.scribe.put(told)
            except Exception as error:  # the requests that run are lost; /health says why
                self.failure = f"{type(error).__name__}: {error}"
                lost = [entry.answer for line in self._waiting.values() for entry in line]
                self.scribe.put([(answer, error) for answer in [*self._answers.values(), *lost]])
                return

    def _next_task(self) -> Callable[[], None] | None:
        """Waits for the next task. Gives unused memory back once, if that takes long."""
        try:
            return self._inbox.get(timeout=IDLE_S)
        except queue.Empty:
            memory.give_back()
            return self._inbox.get()

    def _take_turns(self) -> list[Told]:
        """Gives the engine what its free slots take, and one more, client after client -> who is too late."""
        late: list[Told] = []
        load = self.batch.load
        room = self.batch.sizes.slots + 1 - load["running"] - load["waiting"]
        oldest = time.monotonic() - self.queue_s
        for client, line in list(self._waiting.items()):
            while line and (line[0].cancelled or line[0].since < oldest):
                entry = line.popleft()
                late += [] if entry.cancelled else [(entry.answer, Late())]
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
        self._answers[entry.number] = entry.answer
        if entry.answer.entire:
            self._ids[entry.number] = []

    def _told(self, news: News) -> Told | None:
        ids = self._ids.get(news.number)
        if ids is not None:
            ids += news.ids
            news = news._replace(ids=ids)
        answer = self._forget(news.number) if news.done else self._answers.get(news.number)
        return None if answer is None or (ids is not None and not news.done) else (answer, news)

    def _forget(self, number: int) -> Answer | None:
        self._ids.pop(number, None)
        return self._answers.pop(number, None)


class Scribe(threading.Thread):
    """Makes pieces of text from news, so that neither the engine nor an event loop waits for a tokenizer."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="scribe")
        self.hand_over: Callable[[list[Told]], None] = tell
        self._inbox: queue.SimpleQueue[list[Told] | None] = queue.SimpleQueue()

    def put(self, told: list[Told]) -> None:
        self._inbox.put(told)

    def stop(self) -> None:
        self._inbox.put(None)
        self.join()

    def run(self) -> None:
        while (told := self._inbox.get()) is not None:
            pieces: list[Told] = []
            for answer, news in told:
                try:
                    piece = answer.text.piece(news) if isinstance(news, News) else news
                except Exception as error:  # of this answer alone
                    piece = error
                if not isinstance(piece, Piece) or piece.text or piece.reason:
                    pieces.append((answer, piece))
            if pieces:
                self.hand_over(pieces)


def tell(told: list[Told]) -> None:
    """Calls each listener with its piece."""
    for answer, piece in told:
        answer.listener(piece)


class Text:
    """An answer's text as its ids come: nothing is given out that a later id could still change.

    Each call decodes the last few ids only, so that a long answer costs a time linear in its length.
    """

    def __init__(self, writer: Writer, stop: Sequence[str], before: Sequence[int] = ()) -> None:
        """Args: before: the prompt's ids, where the text goes on after the prompt's."""
        self.writer, self.stops, self.before = writer, Stops(stop), list(before)
        self._byte_level = is_byte_level(getattr(writer, "tokenizer", None))
        self.ids: list[int] = []
        self.reason: str | None = None
        self.length = 0  # characters given out
        self.cut = False  # by a stop string
        self._first = 0  # id of the window that is decoded
        self._certain = 0  # characters of the window's text that were read
        self._rest = ""  # read, but perhaps the start of a stop string

    def piece(self, news: News) -> Piece:
        """What the news bring; nothing, once the text has ended."""
        if self.reason is not None:
            return Piece("", None, news.done)
        return Piece(self.add(news.ids, news.done), self.reason, news.done)

    def add(self, ids: Sequence[int], done: bool) -> str:
        """-> the text that is new and certain; sets `reason` at the answer's end."""
        self.ids += ids
        text, ended = self._decoded(self._first)
        pending = 0 if ended or done else self._pending(text)
        new = text[self._certain : len(text) - pending]
        self._certain = max(self._certain, len(text) - pending)
        if len(self.ids) - self._first > WINDOW_IDS and (self._byte_level or not pending):
            self._slide(text)
        self._rest += new
        start = self.stops.read(new)
        if start is not None:
            self.reason, self.cut, out = "stop", True, self._rest[: max(start - self.length, 0)]
        elif ended or done:
            self.reason, out = "stop" if ended else "length", self._rest
        else:
            out = self._rest[: len(self._rest) - self.stops.held]
        self.length += len(out)
        self._rest = self._rest[len(out) :]
        return out

    def _decoded(self, first: int) -> tuple[str, bool]:
        """-> (the text of the ids from `first` on, as it follows those before; whether it has ended)."""
        if not self.before:
            return self.writer.decode(self.ids[first:])
        before = [*self.before[-CONTEXT_IDS:], *self.ids[:first]][-CONTEXT_IDS:]
        return self.writer.decode(self.ids[first:], before=before)

    def _pending(self, text: str) -> int:
        """How many of the last characters may change: bytes that wait for the rest of theirs.

        They are 3 at most where each byte is read alone. Other tokenizers read a run of bytes as one, all of
        which is broken while its last character is; a run of many windows is broken for good.
        """
        broken = len(text) - len(text.rstrip("\ufffd"))
        if self._byte_level:
            return min(broken, 3)
        return broken if broken < 4 * WINDOW_IDS else 0

    def _slide(self, text: str) -> None:
        """Moves the window to the last ids, where their text alone is the end of the text so far."""
        for first in range(len(self.ids) - CONTEXT_IDS, len(self.ids) - CONTEXT_IDS - 4, -1):
            tail, _ = self._decoded(first)
            certain = self._certain - (len(text) - len(tail))
            broken = tail.startswith("\ufffd") and len(self.ids) - self._first < 4 * WINDOW_IDS
            if text.endswith(tail) and certain >= 0 and not broken:
                self._first, self._certain = first, certain
                return
