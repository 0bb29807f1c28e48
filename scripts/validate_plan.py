"""Compares what the planner predicts with what was measured.

    python scripts/validate_plan.py --local --json=local.json    # this machine's CPU: predicts, then runs

`--local` calibrates this CPU (under 30 s, kept in ~/.cache/bigmodel; --fresh measures again), predicts the
step of a dozen GPTs and CNNs, and only then runs them: one after another in each round, so that the machine's
drift hits all alike. Printed: the median step over all rounds, the prediction, its error.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import cli

from bigmodel import config as config_lib
from bigmodel.config import Config

ROOT = pathlib.Path(__file__).resolve().parents[1]
GPT, CNN = "configs/gpt.py:size=toy", "configs/cnn.py:data=mnist"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt 4x128, 12x64": (GPT, {"seq_len": 64, "batch_size": 12}),
    "gpt 2x64, 16x128": (GPT, {"model.depth": 2, "model.width": 64, "seq_len": 128, "batch_size": 16}),
    "gpt 2x256, 8x128": (GPT, {"model.depth": 2, "model.width": 256, "seq_len": 128, "batch_size": 8}),
    "gpt 8x128, 4x256": (GPT, {"model.depth": 8, "seq_len": 256, "batch_size": 4}),
    "gpt 4x128, 16x256, 4 microbatches": (GPT, {"seq_len": 256, "batch_size": 16, "microbatches": 4}),
    "gpt 4x128, 16x128, 1 microbatch": (GPT, {"seq_len": 128, "batch_size": 16, "microbatches": 1}),
    "gpt 4x128, 8x128, remat full": (GPT, {"seq_len": 128, "batch_size": 8, "remat": "full"}),
    "gpt 4x256, 8x128, remat dots": (
        GPT, {"model.width": 256, "seq_len": 128, "batch_size": 8, "remat": "dots"},
    ),
    "gpt 3x384, 4x256": (
        GPT, {"model.depth": 3, "model.width": 384, "model.heads": 6, "seq_len": 256, "batch_size": 4},
    ),
    "cnn 64-128, 32": (CNN, {"batch_size": 32}),
    "cnn 64-128, 128": (CNN, {"batch_size": 128}),
    "cnn 32-64, 64": (CNN, {"batch_size": 64, "model.channels": (32, 64)}),
    "cnn 16-32-64, 64": (CNN, {"batch_size": 64, "model.channels": (16, 32, 64)}),
}  # fmt: skip


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("--local", action="store_true", help="this machine's CPU, measured now")
    flags.add_argument("--fresh", action="store_true", help="calibrate again")
    flags.add_argument("--rounds", type=int, default=5, help="of every case in turn")
    flags.add_argument("--json", type=pathlib.Path, help="write the rows here too")
    args, rest = cli.parse(flags)
    if rest or not args.local:
        raise config_lib.InputError("say what to validate: --local; see --help")
    rows = local(args.rounds, args.fresh)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    return 0


# ----------------------------------------------------------------------------------------- this machine's CPU


def local(rounds: int, fresh: bool) -> list[dict[str, Any]]:
    """Predicts every case, then measures them. -> rows of name, predicted_step_s, measured_step_s, error."""
    from bigmodel.data import text
    from bigmodel.plan import calibrate

    calibration = calibrate.load(text.cache_dir(), fresh)
    print(f"calibrated for {calibration.key} in {calibration.took_s:.0f} s", flush=True)
    print(f"load average {os.getloadavg()[0]:.1f}: other work on these cores makes every figure wrong")
    rows: list[dict[str, Any]] = []
    steps: list[Callable[[], Any]] = []
    for name, (path, overrides) in CASES.items():
        predicted_s, plan_s, step = _prepare(_load(path, overrides), calibration)
        rows.append({"name": name, "predicted_step_s": predicted_s, "plan_time_s": plan_s})
        steps.append(step)
        print(f"{name:36} {1e3 * predicted_s:8.1f} ms predicted", flush=True)
    for row, times in zip(rows, _interleave(steps, rounds), strict=True):
        row["measured_step_s"] = measured_s = statistics.median(times)
        row["error"] = row["predicted_step_s"] / measured_s - 1
    _print_errors(rows)
    return rows


def _load(path: str, overrides: dict[str, Any]) -> Config:
    fixed = {"optim.name": "adamw", "optim.lr": 3e-4, "steps": 10**6}
    return config_lib.load(ROOT / path, {**fixed, **overrides})


def _prepare(config: Config, calibration: Any) -> tuple[float, float, Callable[[], Any]]:
    """-> (predicted seconds a step, seconds that planning took, a function that runs a step)."""
    import jax

    from bigmodel import mesh
    from bigmodel import program as program_lib
    from bigmodel.plan import cpu_costs, hlo, schedule

    batch = _random_batch(config)
    began = time.perf_counter()
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    program = program_lib.build(config, mesh.make_mesh(config, jax.devices("cpu")[:1]), spec)
    compiled = program.compile()
    plan = schedule.walk(hlo.parse(compiled.as_text()), cpu_costs.CpuCosts(calibration))
    predicted_s, plan_s = plan.total_s + calibration.call_s, time.perf_counter() - began
    state, fed = program.init(jax.random.key(0)), program.put(batch)

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, fed)
        return metrics

    return predicted_s, plan_s, step


def _random_batch(config: Config) -> dict[str, Any]:
    """A batch of the case's shapes, numpy; images are 28 x 28."""
    import numpy as np

    rng, b, length = np.random.default_rng(0), config.batch_size, config.seq_len
    mask = np.ones(b, np.float32)
    if config.task.name == "classify":
        image = rng.normal(size=(b, 28, 28, 1)).astype(np.float32)
        return {"image": image, "label": rng.integers(0, 10, b, np.int32), "mask": mask}
    ids = rng.integers(0, 256, (b, length + 1), np.int32)
    return {
        "tokens": ids[:, :-1], "targets": ids[:, 1:], "segments": np.ones((b, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (b, 1)),
        "mask": mask, "target_bytes": np.ones((b, length), np.uint8),
    }  # fmt: skip


def _interleave(steps: list[Callable[[], Any]], rounds: int, least_s: float = 1.0) -> list[list[float]]:
    """Seconds of single steps: each case runs `least_s` in a round, its first two steps uncounted."""
    import jax

    found: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, times in zip(steps, found, strict=True):
            for _ in range(2):
                jax.block_until_ready(step())
            until = time.perf_counter() + least_s
            while time.perf_counter() < until:
                start = time.perf_counter()
                jax.block_until_ready(step())
                times.append(time.perf_counter() - start)
    return found


def _print_errors(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'case':36} {'predicted':>10} {'measured':>10} {'error':>7}")
    for row in rows:
        predicted_ms, measured_ms = 1e3 * row["predicted_step_s"], 1e3 * row["measured_step_s"]
        print(f"{row['name']:36} {predicted_ms:7.1f} ms {measured_ms:7.1f} ms {row['error']:+7.1%}")
    errors = [abs(row["error"]) for row in rows]
    print(f"error: median {statistics.median(errors):.1%}, at most {max(errors):.1%}")


if __name__ == "__main__":
    cli.run(main)
