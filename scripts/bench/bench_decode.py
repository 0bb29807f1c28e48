"""Generation, as bench.py times it: a model of random weights, greedy, from prompts of 32 ids 64 new ones.

Reading the prompts counts. Rivals:
    ours     float32, as PyTorch's
    int8     weights of one byte, a scale for each output; float32 all else
    torch    PyTorch eager through transformers, float32, where both are installed
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import interleave

from bigmodel import tasks

GPT2 = "configs/gpt.py:size=124m,seq_len=1024"
CASES = {"decode-1": (GPT2, 1), "decode-8": (GPT2, 8)}  # the model, and prompts at once
PROMPT, NEW = 32, 64

Run = Callable[[], Any]  # generates once


def prompts(batch: int, vocabulary: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, vocabulary, (batch, PROMPT)).astype(np.int32)


def ours(path: str, batch: int, quantized: bool = False) -> Run:
    import jax

    from bigmodel import config as config_lib
    from bigmodel import mesh, program
    from bigmodel.infer import decoder as decoder_lib
    from bigmodel.infer import generate

    kind = {"quantize.weights": "int8"} if quantized else {}
    overrides = {"batch_size": 1, "compute_dtype": "float32", **kind}
    config = tasks.sized(config_lib.load(interleave.ROOT / path, overrides))
    built = program.build(config, mesh.make_mesh(config, jax.devices()[:1]), tasks.batch_spec(config))
    params, rest = jax.jit(built.model.init)(jax.random.key(0))
    decoder = decoder_lib.Decoder(built, {"params": params, "rest": rest})
    del params, rest
    model: Any = config.model
    ids = prompts(batch, model.vocab_size)
    return lambda: generate.generate(decoder, list(ids), NEW)


def int8(path: str, batch: int) -> Run:
    return ours(path, batch, quantized=True)


def torch(path: str, batch: int) -> Run:
    import torch as t
    import transformers

    from bigmodel import config as config_lib

    config = tasks.sized(config_lib.load(interleave.ROOT / path))
    c: Any = config.model
    t.set_num_threads(os.cpu_count() or 1)
    t.manual_seed(0)
    transformers.logging.set_verbosity_error()
    shape = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=config.seq_len, n_embd=c.width, n_layer=c.depth, n_head=c.heads
    )
    model = transformers.GPT2LMHeadModel(shape).eval()
    ids = t.from_numpy(prompts(batch, c.vocab_size)).long()
    keys = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}

    def run() -> Any:
        with t.inference_mode():
            return model.generate(ids, attention_mask=t.ones_like(ids), **keys)

    return run


MAKERS: dict[str, Callable[[str, int], Run]] = {"ours": ours, "int8": int8, "torch": torch}


def rival(case: str, name: str) -> interleave.Rival:
    return interleave.Rival(MAKERS[name](*CASES[case]), warm=1)
