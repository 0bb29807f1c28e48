"""Finds stop strings in a text that grows, in time linear in the text (Knuth, Morris and Pratt 1977)."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Several stop strings and how far the text matches each; empty ones are ignored.

    The string that is completed first ends the text; of several completed by the same character the longest.
    So the result does not depend on the pieces in which the text arrives.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [word for word in words if word]
        self._borders = [_borders(word) for word in self._words]
        self._matched = [0] * len(self._words)
        self._read = 0

    def __bool__(self) -> bool:
        return bool(self._words)

    @property
    def pending(self) -> int:
        """Counts the last characters that may be the start of a stop string."""
        return max(self._matched, default=0)

    def read(self, piece: str) -> int | None:
        """-> where in the text so far the stop string begins that this piece completes, or None."""
        first: tuple[int, int] | None = None  # (its end, its start)
        for index, word in enumerate(self._words):
            end = self._follow(index, word, piece)
            if end is not None:
                found = (end, end - len(word))
                first = found if first is None else min(first, found)
        start = None if first is None else self._read + first[1]
        self._read += len(piece)
        return start

    def _follow(self, index: int, word: str, piece: str) -> int | None:
        """-> how many characters of the piece complete this word."""
        borders, matched, at = self._borders[index], self._matched[index], 0
        while at < len(piece):
            if not matched:
                at = piece.find(word[0], at)
                if at < 0:
                    break
            while matched and piece[at] != word[matched]:
                matched = borders[matched - 1]
            matched += piece[at] == word[matched]
            at += 1
            if matched == len(word):
                self._matched[index] = 0
                return at
        self._matched[index] = matched
        return None


def _borders(word: str) -> list[int]:
    """For every prefix, the length of its longest proper prefix that also ends it."""
    out, length = [0] * len(word), 0
    for at in range(1, len(word)):
        while length and word[at] != word[length]:
            length = out[length - 1]
        length += word[at] == word[length]
        out[at] = length
    return out


def cut(text: str, words: Sequence[str]) -> str | None:
    """The text before its first stop string, or None if it has none."""
    start = Stops(words).read(text)
    return None if start is None else text[:start]
