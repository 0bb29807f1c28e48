"""Generates text from prompts, with a decoder and its tokenizer."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bigmodel import data
from bigmodel.config import InputError
from bigmodel.data.corpus import special_id
from bigmodel.data.pretrained import Pretrained
from bigmodel.data.tokenizers import Tokenizer
from bigmodel.infer import loading, stops
from bigmodel.infer.decode import CHUNK, context
from bigmodel.infer.decoder import Decoder
from bigmodel.infer.sampling import GREEDY, Sampling
from bigmodel.program import Program, State


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | np.ndarray],
    length: int | Sequence[int],
    settings: Sampling | Sequence[Sampling] = GREEDY,
    ended: Callable[[int, list[int]], bool] | None = None,
) -> list[np.ndarray]:
    """Continues every prompt (int ids, at least one) by up to `length` ids -> int32 arrays.

    An answer stops after one of the decoder's end ids, which it includes, or when `ended(row, ids)` is true,
    which is checked every CHUNK ids.

    Past `seq_len` the window slides by halves, so every id sees at least half a window. Raises InputError
    where a model of inputs and targets is asked for more than its targets hold.
    """
    config, rows = decoder.program.config, range(len(prompts))
    window = context(config)
    lengths = [length] * len(prompts) if isinstance(length, int) else list(length)
    each = [settings] * len(prompts) if isinstance(settings, Sampling) else list(settings)
    texts = [[int(i) for i in ids] for ids in prompts]
    answers: list[list[int]] = [[] for _ in rows]
    slides = decoder.lm.continues
    if not slides and max(lengths) > window:
        raise InputError(f"length is {max(lengths)}, but targets have {window} ids; set it to that or less")
    left, starts = list(lengths), [0] * len(prompts)
    while any(left):
        for row in rows:
            if slides and len(texts[row]) - starts[row] >= window:
                starts[row] = len(texts[row]) - window // 2
        tails = [ids[first:] for ids, first in zip(texts, starts, strict=True)]
        state = decoder.prefill(tails, left, each, [len(ids) for ids in answers])
        new_BN = np.where(np.asarray(left) > 0, np.asarray(state["token"]), -1)[:, None]
        filled = [len(ids) for ids in tails]
        while True:
            for row in rows:
                ids = [int(i) for i in new_BN[row] if i >= 0]
                answers[row] += ids
                texts[row] += ids if slides else []
                filled[row] += len(ids)
                left[row] -= len(ids)
                if ids and (ids[-1] in decoder.ends or (ended is not None and ended(row, answers[row]))):
                    left[row] = 0
            active = [filled[row] for row in rows if left[row]]
            room = window - max(active, default=window) if slides else CHUNK
            if not active or room <= 0:
                break
            state["left"] = jnp.asarray(np.array(left, np.int32))
            state, ids_BN = decoder.decode(state, min(CHUNK, room))
            new_BN = np.asarray(ids_BN)
    return [np.asarray(ids, np.int32) for ids in answers]


class Writer:
    """A decoder and its tokenizer: text in, text out."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.continues = decoder.lm.continues

    @classmethod
    def load(cls, directory: str | os.PathLike[str], step: int | None = None, **options: Any) -> Writer:
        """Loads the run in `directory`; `options` are `Decoder`'s. Raises InputError as `loading.load`."""
        return cls.of(*loading.load(directory, step), directory, **options)

    @classmethod
    def of(cls, built: Program, state: State, directory: str | os.PathLike[str], **options: Any) -> Writer:
        """Takes a run that is loaded already, with its directory's tokenizer."""
        tokenizer = data.get_tokenizer(built.config, pathlib.Path(directory))
        start = special_id(tokenizer, built.config.model.vocab_size, "start")
        decoder = Decoder(built, state, end=tokenizer.ends, start=start, **options)
        loading.check_decoding(decoder)
        return cls(decoder, tokenizer)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
        """Messages (dicts of `role`, `content`) -> the ids of the prompt that the model's own chat template
        makes of them; None without one. Raises InputError where the template refuses them."""
        if not isinstance(self.tokenizer, Pretrained) or self.tokenizer.chats is None:
            return None
        return self._checked(self.tokenizer.chat(messages))

    @property
    def drawing(self) -> dict[str, Any]:
        """Sampling settings of an imported model's authors: fields of `Sampling`, and `max_new_tokens`."""
        return self.tokenizer.drawing() if isinstance(self.tokenizer, Pretrained) else {}

    def encode(self, text: str, plain: bool = False) -> np.ndarray:
        """A prompt's ids, with what stands before a document or after an input: as in training, or as in
        transformers if the model came from there. `plain`: names of special tokens in it are text.
        Raises InputError for an id the model has no place for."""
        room = self.decoder.program.config.seq_len
        if self.continues:
            ids = self.tokenizer.prompt(text, plain)
        elif isinstance(self.tokenizer, Pretrained) and self.tokenizer.imported:
            ids = self.tokenizer.texts([text], room)[0]
        else:
            ids = np.append(self.tokenizer.encode(text)[: room - 1], self.tokenizer.separator).astype(
                np.int32
            )
        return self._checked(ids)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        most = self.decoder.program.config.model.vocab_size
        if len(ids) and ids.max() >= most:
            raise InputError(
                f"the prompt holds {self.tokenizer.decode([int(ids.max())])!r}, token {ids.max()}, but the "
                f"model has model.vocab_size={most}; leave it out"
            )
        return ids

    def decode(
        self,
        ids: Sequence[int] | np.ndarray,
        stop: Sequence[str] = (),
        before: Sequence[int] | np.ndarray = (),
    ) -> tuple[str, bool]:
        r"""-> (the answer's text up to its end or a stop string, whether either is there).

        A stop string with \n or \t as two characters, as shells give it, ends at a line feed or a tab too.

        Args:
            before: the prompt's ids, where the text is to go on after the prompt's.
        """
        ids = [int(i) for i in ids]
        ends = (self.decoder.end, *getattr(self.decoder, "ends", ()))  # ids that end an answer
        at = next((index for index, id in enumerate(ids) if id in ends), None)
        text = self.tokenizer.written(ids if at is None else ids[: at + 1], before)
        words = [*stop, *(word.replace("\\n", "\n").replace("\\t", "\t") for word in stop)]
        cut = stops.cut(text, words)
        return (text, at is not None) if cut is None else (cut, True)

    def write(
        self,
        prompts: Sequence[str],
        length: int,
        settings: Sampling | Sequence[Sampling] = GREEDY,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Writes the text that follows each prompt, or answers it.

        Args: settings: one for all prompts, or one for each.
        """
        encoded = [self.encode(text) for text in prompts]
        before = [ids if self.continues else ids[:0] for ids in encoded]

        def said(row: int, ids: Sequence[int] | np.ndarray) -> tuple[str, bool]:
            return self.decode(ids, stop, before[row])

        ended = (lambda row, ids: said(row, ids)[1]) if any(stop) else None
        answers = generate(self.decoder, encoded, length, settings, ended)
        return [said(row, ids)[0] for row, ids in enumerate(answers)]
