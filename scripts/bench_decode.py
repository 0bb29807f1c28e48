"""Times generation beside transformers' `generate` in PyTorch: one process each, run in turn.

    python scripts/bench_decode.py --json=decode.json
    python scripts/bench_decode.py --cases=gpt2-124m --batches=1 --rivals=ours,int8

A model of random weights, greedy, prompts of 32 ids, 64 new ones; reading the prompt counts. Rivals:
    ours     float32, as PyTorch's
    int8     weights of one byte, a scale for each output; float32 all else
    torch    PyTorch eager through transformers, float32, where both are installed

Every round runs each rival once, in this order and then in the reverse. Printed: the median over rounds of
the time, of new tokens a second, and of the time's ratio to `ours` in the same round.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import cli

from bigmodel.config import InputError

ROOT = pathlib.Path(__file__).resolve().parents[1]
CASES = {"gpt2-124m": "configs/gpt.py:size=124m,seq_len=1024", "toy": "configs/gpt.py:size=toy,seq_len=128"}
RIVALS = ("ours", "int8", "torch")
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
    config = config_lib.load(ROOT / CASES[case], {"batch_size": 1, "compute_dtype": "float32", **more})
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

    config = config_lib.load(ROOT / CASES[case])
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


def work(case: str, batch: str, rival: str) -> None:
    """A worker: for each line read, generates once and answers with its time, as JSON lines."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if rival != "torch":
        cli.keep_memory()
        cli.no_accelerator_needed()
    run = MAKERS[rival](case, int(batch))
    run()
    answers.write(json.dumps({"ready": True}) + "\n")
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        answers.write(json.dumps({"time_s": time.perf_counter() - began}) + "\n")


def compare(case: str, batch: int, rivals: list[str], rounds: int) -> dict[str, Any]:
    workers = {}
    for rival in rivals:
        command = [sys.executable, __file__, f"--worker={case}:{batch}:{rival}"]
        workers[rival] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if not workers[rival].stdout.readline():  # type: ignore[union-attr]
            raise InputError(f"--rivals: {rival} failed on {case}; run `{' '.join(command)}` to see why")
    times: dict[str, list[float]] = {rival: [] for rival in rivals}
    for index in range(rounds):
        for rival in rivals if index % 2 == 0 else reversed(rivals):
            worker: Any = workers[rival]
            worker.stdin.write("\n")
            worker.stdin.flush()
            times[rival].append(json.loads(worker.stdout.readline())["time_s"])
    for worker in workers.values():
        worker.communicate()
    return {
        rival: {
            "time_s": statistics.median(times[rival]),
            "tokens_per_s": batch * NEW / statistics.median(times[rival]),
            "ratio": statistics.median(
                a / b for a, b in zip(times[rival], times[rivals[0]], strict=True)
            ),
        }
        for rival in rivals
    }  # fmt: skip


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("--cases", default="gpt2-124m", help="comma-separated")
    flags.add_argument("--batches", default="1,8", help="comma-separated")
    flags.add_argument("--rivals", default=",".join(RIVALS), help="comma-separated; the first is the measure")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    args, _ = cli.parse(flags)
    rivals = args.rivals.split(",")
    import importlib.util

    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    if "torch" in rivals and missing:
        rivals.remove("torch")
        print(f"{' and '.join(missing)} not installed: left out (pip install torch==2.13.0 transformers)")
    for name, known, flag in [(c, CASES, "cases") for c in args.cases.split(",")] + [
        (r, MAKERS, "rivals") for r in rivals
    ]:
        if name not in known:
            raise InputError(f"--{flag}={name!r} is unknown; choose from {', '.join(known)}")
    results: dict[str, Any] = {}
    for case in args.cases.split(","):
        for batch in map(int, args.batches.split(",")):
            rows = results[f"{case}, batch {batch}"] = compare(case, batch, rivals, args.rounds)
            print(f"\n{case}, batch {batch:<6}{'s':>8}{'tokens/s':>10}{'x ' + rivals[0]:>8}")
            for rival, r in rows.items():
                print(
                    f"  {rival:<14}{r['time_s']:>12.2f}{r['tokens_per_s']:>10.1f}{r['ratio']:>8.2f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    if not sys.argv[-1].startswith("--worker="):
        cli.run(main)
    work(*sys.argv[-1].removeprefix("--worker=").split(":"))
