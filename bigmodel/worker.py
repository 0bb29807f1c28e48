"""An engine at work in a thread of its own, and what of an answer's text is certain so far."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from bigmodel import engine
from bigmodel.engine import Engine, News
from bigmodel.infer import Writer

Listener = Callable[[News | Exception], None]
Told = tuple[Listener, News | Exception]


class Worker(threading.Thread):
    """Steps an engine for as long as there is work. Other threads only `submit` and `cancel`."""

    def __init__(self, batch: Engine) -> None:
        super().__init__(daemon=True, name="engine")
        self.batch, self.failure = batch, ""
        self.hand_over: Callable[[list[Told]], None] = tell
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, Listener] = {}
        self._held: dict[int, list[int]] = {}  # ids so far of answers that are told as a whole

    def submit(self, request: engine.Request, listener: Listener, whole: bool = False) -> Callable[[], None]:
        """The listener will be told the request's news, or with `whole` one, at its end -> what cancels it.

        All that a step brought goes to `hand_over` at once, in this thread: waking another one costs more
        than most of what there is to tell.
        """
        number: list[int] = []

        def add() -> None:
            number.append(self.batch.add(request))
            self._listeners[number[0]] = listener
            if whole:
                self._held[number[0]] = []

        def cancel() -> None:
            if number and self._forget(number[0]) is not None:
                self.batch.cancel(number[0])

        self._inbox.put(add)
        return lambda: self._inbox.put(cancel)

    def stop(self) -> None:
        self._inbox.put(None)
        self.join()

    def run(self) -> None:
        while True:
            try:
                while not self.batch.busy or not self._inbox.empty():
                    task = self._inbox.get()
                    if task is None:
                        return
                    task()
                told = [pair for news in self.batch.step() if (pair := self._told(news)) is not None]
                if told:
                    self.hand_over(told)
            except Exception as error:  # the requests that run are lost; /health says why
                self.failure = f"{type(error).__name__}: {error}"
                self.hand_over([(listener, error) for listener in self._listeners.values()])
                return

    def _told(self, news: News) -> Told | None:
        held = self._held.get(news.number)
        if held is not None:
            held += news.ids
            news = news._replace(ids=held)
        listener = self._forget(news.number) if news.done else self._listeners.get(news.number)
        return None if listener is None or (held is not None and not news.done) else (listener, news)

    def _forget(self, number: int) -> Listener | None:
        self._held.pop(number, None)
        return self._listeners.pop(number, None)


def tell(told: list[Told]) -> None:
    """Calls each listener with its news."""
    for listener, news in told:
        listener(news)


class Text:
    """An answer's text as its ids come: nothing is given out that a later id could still change."""

    def __init__(self, writer: Writer, stop: Sequence[str]) -> None:
        self.writer, self.stop = writer, stop
        self.ids: list[int] = []
        self.sent = ""
        self.reason: str | None = None

    def add(self, ids: Sequence[int], done: bool) -> str:
        """-> the text that is new and certain; sets `reason` at the answer's end."""
        self.ids += ids
        text, ended = self.writer.decode(self.ids, self.stop)
        if ended or done:
            self.reason = "stop" if ended else "length"
        else:
            text = self._certain(text)
        new, self.sent = text[len(self.sent) :], text
        return new

    def _certain(self, text: str) -> str:
        held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        held = max(held, len(text) - len(text.rstrip("\ufffd")))  # bytes that wait for the rest of theirs
        return text[: len(text) - held]
