"""An engine at work in a thread of its own, and what of an answer's text is certain so far."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from bigmodel import engine
from bigmodel.engine import Engine, News
from bigmodel.infer import Writer


class Worker(threading.Thread):
    """Steps an engine for as long as there is work. Other threads only `submit` and `cancel`."""

    def __init__(self, batch: Engine) -> None:
        super().__init__(daemon=True, name="engine")
        self.batch, self.failure = batch, ""
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, Callable[[News | Exception], None]] = {}

    def submit(
        self, request: engine.Request, listener: Callable[[News | Exception], None]
    ) -> Callable[[], None]:
        """The listener is called in this thread with the request's news -> a function that cancels it."""
        number: list[int] = []

        def add() -> None:
            number.append(self.batch.add(request))
            self._listeners[number[0]] = listener

        def cancel() -> None:
            if number and self._listeners.pop(number[0], None) is not None:
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
                for news in self.batch.step():
                    listener = self._listeners.get(news.number)
                    if listener is not None:
                        listener(news)
                    if news.done:
                        self._listeners.pop(news.number, None)
            except Exception as error:  # the requests that run are lost; /health says why
                self.failure = f"{type(error).__name__}: {error}"
                for listener in self._listeners.values():
                    listener(error)
                return


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
