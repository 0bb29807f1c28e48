"""Turns ids into text while they come, and stops at stop strings.

A character, or the spaces around a word, can depend on ids that are still to come. So nothing is given out
that a later id could change, and the last characters wait while they may be the start of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bigmodel.data.corpus import is_byte_level
from bigmodel.infer.engine import TokenEvent
from bigmodel.infer.generate import Writer
from bigmodel.infer.stops import Stops

CONTEXT_IDS = 16  # that are decoded again with new ones: no tokenizer's character is longer
WINDOW_IDS = 48  # when so many are decoded each time, the first of them are let go


class Piece(NamedTuple):
    """New text of an answer that is certain, and why it ended, if it has."""

    text: str
    reason: str | None
    done: bool  # the engine works on it no more


class Detokenizer:
    """One answer's text, id by id.

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
        self._certain = 0  # characters of the window's text that later ids cannot change
        self._rest = ""  # certain, but perhaps the start of a stop string

    def piece(self, event: TokenEvent) -> Piece:
        """The text that an event adds; nothing, once the text has ended."""
        if self.reason is not None:
            return Piece("", None, event.done)
        return Piece(self.add(event.ids, event.done), self.reason, event.done)

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
            out = self._rest[: len(self._rest) - self.stops.pending]
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
        """Counts the last characters that may change: bytes that wait for the rest of theirs.

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
