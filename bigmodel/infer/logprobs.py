"""Log-probabilities of an answer's ids, in the two formats of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bigmodel.data.tokenizers import Tokenizer
from bigmodel.infer.scoring import Scores, Tokens


@dataclass(frozen=True)
class Scored:
    """A prompt and its answer with their scores, and the part of them that is reported."""

    ids: Sequence[int]
    first: int  # ids before it are scored, but not reported
    most_chars: int | None  # a stop string cut off what follows so many characters
    scores: Scores | None  # None: there is only one id
    top: int
    tokenizer: Tokenizer
    null_first: bool  # for an echo: its first id has no score

    def completion(self) -> dict[str, Any]:
        """`logprobs` of a completion; the end's id is included."""
        tokens = Tokens(self.tokenizer)
        out: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for at, offset in self._places(tokens):
            before = self.ids[at - 1] if at else None
            said, null = tokens.text(before, self.ids[at]), self.null_first and at == self.first
            out["tokens"].append(said)
            out["text_offset"].append(offset)
            out["token_logprobs"].append(None if null else self._logprob(at))
            top = None
            if not null:
                found = [(self.ids[at], self._logprob(at)), *reversed(self._top(at))]
                top = {
                    tokens.text(before, index): value for index, value in found
                }  # the best of those with the same text
                top = dict(sorted(top.items(), key=lambda item: -item[1]))
            out["top_logprobs"].append(top)
        return out

    def chat(self, ends: Sequence[int]) -> dict[str, Any]:
        """`logprobs` of a chat, without the end's id, which is one of `ends`."""
        tokens = Tokens(self.tokenizer)
        content = []
        for at, _ in self._places(tokens):
            if self.ids[at] in ends:
                break
            entry = self._entry(tokens, at, self.ids[at], self._logprob(at))
            top = [self._entry(tokens, at, index, value) for index, value in self._top(at)]
            content.append({**entry, "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, tokens: Tokens, at: int, index: int, value: float) -> dict[str, Any]:
        before = self.ids[at - 1]
        raw = list(tokens.raw(before, index))
        return {"token": tokens.text(before, index), "logprob": value, "bytes": raw}

    def _places(self, tokens: Tokens) -> Iterator[tuple[int, int]]:
        """(place, characters of the text before it) of every id that is reported."""
        before = self.ids[self.first - 1] if self.first else None
        offsets = tokens.offsets(self.ids[self.first :], before)
        for at, offset in enumerate(offsets, self.first):
            if self.most_chars is None or offset < self.most_chars:
                yield at, offset

    def _logprob(self, at: int) -> float:
        assert self.scores is not None
        return float(self.scores.logprob[at - 1])

    def _top(self, at: int) -> list[tuple[int, float]]:
        assert self.scores is not None
        ids, values = self.scores.top_ids[at - 1], self.scores.top_logprobs[at - 1]
        return [(int(i), float(x)) for i, x in zip(ids[: self.top], values[: self.top], strict=True)]
