"""Times generation beside transformers' `generate` in PyTorch: one process each, run in turn.

    python scripts/bench_decode.py --json=decode.json
    python scripts/bench_decode.py --cases=gpt2-124m --batches=1 --rivals=ours,int8

A model of random weights, greedy, prompts of 32 ids, 64 new ones; reading the prompt counts. Rivals:
    ours     float32, as PyTorch's
    int8     weights of one byte, a scale for each output; float32 all else
    torch    PyTorch eager through transformers, float32, where both are installed

Printed as scripts/bench.py does: a generation's time, and of new tokens a second.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import cli
import turns

CASES = {"gpt2-124m": "configs/gpt.py:size=124m,seq_len=1024", "toy": "configs/gpt.py:size=toy,seq_len=128"}
PROMPT, NEW = 32, 64

Run = Callable[[], Any]  # generates once


def prompts(batch: int, vocabulary: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, vocabulary, (batch, PROMPT)).astype(np.int32)


def ours(case: str, batch: int, quantized: bool = False) -> Run:
    import jax

    from bigmodel import config as config_lib
    from bigmodel import data, infer, mesh, program
    from bigmodel import decoder as decoder_lib

    more = {"quantize.weights": "int8"} if quantized else {}
    config = config_lib.load(turns.ROOT / CASES[case], {"batch_size": 1, "compute_dtype": "float32", **more})
    built = program.build(config, mesh.make_mesh(config, jax.devices()[:1]), data.batch_spec(config))
    params, rest = jax.jit(built.model.init)(jax.random.key(0))
    decoder = decoder_lib.Decoder(built, {"params": params, "rest": rest})
    del params, rest
    model: Any = config.model
    ids = prompts(batch, model.vocab_size)
    return lambda: infer.generate(decoder, list(ids), NEW)


def int8(case: str, batch: int) -> Run:
    return ours(case, batch, quantized=True)


def torch(case: str, batch: int) -> Run:
    import torch as t
    import transformers

    from bigmodel import config as config_lib

    config = config_lib.load(turns.ROOT / CASES[case])
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


def rival(case: str, name: str) -> turns.Rival:
    """Of a case such as toy@8: the model's name and the batch."""
    if name != "torch":
        cli.keep_memory()
        cli.no_accelerator_needed()
    model, _, batch = case.partition("@")
    return turns.Rival(MAKERS[name](model, int(batch)), warm=1)


def main() -> int:
    flags = cli.parser(__doc__)
    turns.add_flags(flags, ["gpt2-124m"], list(MAKERS), rounds=5)
    flags.add_argument("--batches", default="1,8", help="comma-separated")
    args, _ = cli.parse(flags)
    cases, rivals = turns.chosen(args, CASES, MAKERS, needs=("torch", "transformers"))
    results: dict[str, Any] = {}
    for case in cases:
        for batch in map(int, args.batches.split(",")):
            title = f"{case}, batch {batch}"
            results[title] = turns.compare(__file__, f"{case}@{batch}", rivals, args.rounds, 1)
            turns.show(title, results[title], ("tokens", batch * NEW))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    if (mine := turns.worker_of(sys.argv)) is None:
        cli.run(main)
    else:
        turns.work(*mine, rival)
