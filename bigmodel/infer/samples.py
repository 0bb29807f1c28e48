"""Texts that a run writes while it trains, from held-out prompts."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import jax
import numpy as np

from bigmodel.config import InputError
from bigmodel.data import Pipeline
from bigmodel.infer.decode import context
from bigmodel.infer.generate import Writer, generate
from bigmodel.infer.sampling import Sampling
from bigmodel.program import Program, State

PROMPT_TOKENS, ANSWER_TOKENS = 32, 64  # at most
DRAWN = Sampling(temperature=0.8, top_p=0.95, seed=0)  # one seed, so that the steps of a run compare


class Sample(NamedTuple):
    prompt: str
    answer: str


class Samples:
    """Writes texts with one state after another; compiles once.

    Args:
        pipeline: held-out data; the first `count` examples give the prompts.
        path: the run's directory, which holds the tokenizer.

    Raises:
        InputError: the job has several hosts.
    """

    def __init__(self, program: Program, pipeline: Pipeline, count: int, path: pathlib.Path) -> None:
        if jax.process_count() > 1:
            raise InputError(f"eval.samples={count} works on one host; set it to 0")
        self._program, self._path = program, path
        self._texts: list[np.ndarray] = []
        for batch in pipeline:
            rows = zip(batch["tokens"], batch["segments"], batch["mask"], strict=True)
            self._texts += [ids_L[part_L == part_L[0]] for ids_L, part_L, real in rows if real]
            if len(self._texts) >= count:
                break
        self._texts = self._texts[:count]
        self._writer: Writer | None = None

    def draw(self, state: State) -> list[Sample]:
        """Answers to the examples' inputs, or continuations of their beginnings."""
        if self._writer is None:
            self._writer = Writer.of(self._program, state, self._path)
        writer = self._writer
        decoder, continues = writer.decoder, writer.continues
        decoder.load(state)
        most = [max(min(len(ids) // 2, PROMPT_TOKENS), 1) if continues else len(ids) for ids in self._texts]
        prompts = [ids[:length] for ids, length in zip(self._texts, most, strict=True)]
        answers = generate(decoder, prompts, min(ANSWER_TOKENS, context(self._program.config)), DRAWN)
        decoder.unload()  # training needs the memory
        return [
            Sample(writer.tokenizer.decode(ids), writer.decode(answer, before=ids if continues else ())[0])
            for ids, answer in zip(prompts, answers, strict=True)
        ]
