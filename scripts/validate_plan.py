"""Compares what the planner predicts with what was measured.

    python scripts/validate_plan.py --local --json=local.json    # this machine's CPU: predicts, then runs
    python scripts/validate_plan.py --search --json=search.json  # the meshes it ranks, on 8 CPU devices
    python scripts/validate_plan.py --times --json=times.json    # how long planning takes, by size and chips
    python scripts/validate_plan.py TABLE.csv --json=rows.json   # published TPU runs, one a line

A table's columns: model, topology, chips, depth, width, heads, kv_heads, head_dim, mlp_width, vocab_size,
seq_len, examples_per_chip, param_dtype, remat, fsdp, tensor, step_s. The rows are MaxText's Llama-like
decoder with its compiler options; each compiles for one to several minutes, and needs
`pip install -e '.[plan]'`.

`--local` calibrates this CPU (under 30 s, kept in ~/.cache/bigmodel; --fresh measures again), predicts the
step of a dozen GPTs and CNNs, and only then runs them: one after another in each round, so that the machine's
drift hits all alike. Printed: the prediction, the quietest round's median step (calibrating, the shortest run
counts too; `rounds_s` in the rows has every round's), the error.

`--times` plans GPTs from 124 M to 1 T parameters on 8 to 2,048 chips, each in a process of its own and
without what is kept of plans before: seconds and peak memory.

`--search` plans every mesh of three models on 8 forced CPU devices, then runs them all: the planner's first
choice beside the fastest mesh there is.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import cli

from bigmodel import config as config_lib
from bigmodel import disk
from bigmodel.config import Config, InputError
from bigmodel.machines import accelerators

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
    flags.add_argument("table", nargs="?", type=pathlib.Path, help="published step times, as CSV")
    flags.add_argument("--local", action="store_true", help="this machine's CPU, measured now")
    flags.add_argument("--search", action="store_true", help="the ranking of meshes, on 8 CPU devices")
    flags.add_argument("--times", action="store_true", help="of planning, by size and chips; minutes")
    flags.add_argument("--fresh", action="store_true", help="calibrate again")
    flags.add_argument("--rounds", type=int, default=5, help="of every case in turn")
    flags.add_argument("--only", default="", help="of --local, --search, --times: names that hold this")
    flags.add_argument("--json", type=pathlib.Path, help="write the rows here too")
    args, rest = cli.parse(flags)
    if rest or args.local + args.search + args.times + bool(args.table) != 1:
        raise InputError("say what to validate: a table, --local, --search or --times; see --help")
    if args.table:
        accelerators.keep_to_cpu()
        rows = published(args.table)
    elif args.times:
        rows = times(args.only)
    elif args.search:
        rows = ranked(args.rounds, args.fresh, args.only)
    else:
        rows = local(args.rounds, args.fresh, args.only)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    return 0


# ------------------------------------------------------------------------------------- published runs on TPUs

INTEGERS = (
    "chips", "depth", "width", "heads", "kv_heads", "head_dim", "mlp_width", "vocab_size", "seq_len",
    "examples_per_chip", "fsdp", "tensor",
)  # fmt: skip
MAXTEXT = dict.fromkeys(  # compiler options of its published runs
    (
        "xla_tpu_enable_data_parallel_all_reduce_opt", "xla_tpu_data_parallel_opt_different_sized_ops",
        "xla_tpu_enable_async_collective_fusion", "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_tpu_enable_async_collective_fusion_multiple_steps", "xla_tpu_overlap_compute_collective_tc",
        "xla_enable_async_all_gather",
    ),
    "true",
)  # fmt: skip


def published(path: pathlib.Path) -> list[dict[str, Any]]:
    """Plans every row of the table; -> the rows with what was predicted, or `failed`."""
    table = read_table(path)
    from bigmodel.plan import planner

    rows: list[dict[str, Any]] = []
    for number, row in enumerate(table, 1):
        print(f"{number}/{len(table)} {row['model']} on {row['topology']} ...", flush=True)
        began = time.perf_counter()
        try:
            with cli.patience("    compiling"):
                plan = planner.plan(row_config(row), row["topology"]).receipt
        except InputError as error:
            row = {**row, "failed": str(error)}
            print(f"    failed: {error}", flush=True)
        else:
            error_share = plan["step_s"] / float(row["step_s"]) - 1
            row = {
                **row, "predicted_step_s": plan["step_s"], "error": error_share,
                "peak_memory_bytes": plan["peak_bytes"], "plan_time_s": time.perf_counter() - began,
            }  # fmt: skip
            print(
                f"    predicted {plan['step_s']:.3f} s, published {float(row['step_s']):.3f} s, error "
                f"{error_share:+.1%}; {plan['peak_bytes'] / 2**30:.1f} GiB a device; planned in "
                f"{row['plan_time_s']:.0f} s",
                flush=True,
            )
        rows.append(row)
    errors = [abs(row["error"]) for row in rows if "error" in row]
    if errors:
        print(f"error: median {statistics.median(errors):.1%}, at most {max(errors):.1%}")
    return rows


def read_table(path: pathlib.Path) -> list[dict[str, Any]]:
    """Raises InputError for a table that is missing, malformed or empty: the line and the column."""
    try:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"table {path}: cannot be read ({error}); give a CSV file") from error
    rows = list(csv.DictReader(lines))
    needed = {*INTEGERS, "model", "topology", "param_dtype", "remat", "step_s"}
    if not rows or needed - set(rows[0]):
        missing = ", ".join(sorted(needed - set(rows[0] if rows else ())))
        raise InputError(f"table {path}: it has no rows, or lacks the columns {missing}; see --help")
    for number, row in enumerate(rows, 1):
        for key in (*INTEGERS, "step_s"):
            try:
                float(row[key]) if key == "step_s" else int(row[key])
            except (TypeError, ValueError) as error:
                raise InputError(f"table {path}, row {number}: {key}={row[key]!r} is no number") from error
    return rows


def row_config(row: dict[str, Any]) -> Config:
    """The ordinary gpt model with the row's shape, mesh and remat."""
    n = {key: int(row[key]) for key in INTEGERS}
    v6e = row["topology"].startswith("v6e")
    options = MAXTEXT | ({"xla_tpu_scoped_vmem_limit_kib": "98304"} if v6e else {})
    keys = ("depth", "width", "heads", "kv_heads", "head_dim", "mlp_width", "vocab_size")
    model = {key: n[key] for key in keys} | {
        "name": "gpt", "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False,
        "tie_embeddings": False, "attention_block": 2048 if v6e else 512,
    }  # fmt: skip
    return config_lib.from_dict(
        {
            "batch_size": n["examples_per_chip"] * n["chips"], "seq_len": n["seq_len"], "microbatches": 1,
            "compute_dtype": "bfloat16", "param_dtype": row["param_dtype"], "remat": row["remat"],
            "compiler_options": options, "model": model, "mesh": {"fsdp": n["fsdp"], "tensor": n["tensor"]},
            "optim": {"name": "adamw", "weight_decay": 0.1},
        }
    )  # fmt: skip


# ------------------------------------------------------------------------------- how long planning takes

SIZES = {  # size -> target and what makes the model fit there
    "124m": ("v5e:2x4", ["mesh.data=8", "batch_size=128", "microbatches=2"]),
    "1.5b": ("v5e:4x8", ["mesh.fsdp=32", "batch_size=256", "remat=full"]),
    "llama-7b": ("v5e:16x16", ["mesh.fsdp=256", "batch_size=1024", "remat=full"]),
    "llama-70b": ("v5p:8x8x8", ["mesh.fsdp=512", "batch_size=1024", "remat=full"]),
    "175b": ("v5p:8x8x16", ["mesh.fsdp=256", "mesh.tensor=4", "batch_size=1024", "remat=full"]),
    "1t": ("v5p:8x16x16", ["mesh.fsdp=512", "mesh.tensor=4", "batch_size=2048", "remat=full"]),
}


def times(only: str) -> list[dict[str, Any]]:
    """Plans each of SIZES by scripts/plan.py. -> rows of size, target, parameters, chips, plan_time_s (of the
    whole command), process_bytes (its peak), predicted_step_s and peak_memory_bytes of a chip."""
    rows: list[dict[str, Any]] = []
    for size, (target, settings) in _chosen(SIZES, only).items():
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "plan.json"
            command = [sys.executable, str(ROOT / "scripts/plan.py"), f"--target={target}", f"--json={out}"]
            command += [f"--config=configs/gpt.py:size={size},seq_len=2048"]
            command += [f"--config.{setting}" for setting in settings]
            began, log = time.perf_counter(), pathlib.Path(folder) / "log"
            environment = os.environ | {"BIGMODEL_CACHE": folder}
            with log.open("w") as said:
                child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
                _, status, used = os.wait4(child.pid, 0)
            if os.waitstatus_to_exitcode(status):
                last = log.read_text().strip().splitlines()[-1]
                raise InputError(f"--times: {size} on {target}: {last.removeprefix('error: ')}")
            plan = json.loads(out.read_text())
        rows.append({
            "size": size, "target": target, "parameters": plan["parameters"], "chips": plan["chips"],
            "plan_time_s": time.perf_counter() - began, "cpu_s": used.ru_utime + used.ru_stime,
            "process_bytes": 1024 * used.ru_maxrss, "predicted_step_s": plan["step_s"],
            "peak_memory_bytes": plan["peak_bytes"],
        })  # fmt: skip
        row = rows[-1]
        print(
            f"{size:10} {row['parameters']:>18,} parameters {row['chips']:>6,} chips  planned in "
            f"{row['plan_time_s']:5.0f} s ({row['cpu_s']:.0f} s of CPU time, "
            f"{row['process_bytes'] / 2**30:.1f} GiB)",
            flush=True,
        )
    return rows


# ----------------------------------------------------------------------------------------- this machine's CPU


def local(rounds: int, fresh: bool, only: str) -> list[dict[str, Any]]:
    """Predicts every case, then measures them. -> rows of name, predicted_step_s, measured_step_s, error."""
    from bigmodel.plan import calibrate

    calibration = calibrate.load(disk.cache_dir(), fresh)
    print(f"calibrated for {calibration.key} in {calibration.took_s:.0f} s", flush=True)
    print(f"load average {os.getloadavg()[0]:.1f}: other work on these cores makes every figure wrong")
    rows: list[dict[str, Any]] = []
    steps: list[Callable[[], Any]] = []
    for name, (path, overrides) in _chosen(CASES, only).items():
        predicted_s, plan_s, step = _prepare(_load(path, overrides), calibration)
        rows.append({"name": name, "predicted_step_s": predicted_s, "plan_time_s": plan_s})
        steps.append(step)
        print(f"{name:36} {1e3 * predicted_s:8.1f} ms predicted", flush=True)
    for row, times in zip(rows, _interleave(steps, rounds), strict=True):
        row["rounds_s"] = [statistics.median(part) for part in times]
        row["measured_step_s"] = measured_s = min(row["rounds_s"])
        row["error"] = float(row["predicted_step_s"]) / measured_s - 1
    _print_errors(rows)
    return rows


RANKED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt 4x128, 16x128": (GPT, {"seq_len": 128, "batch_size": 16, "microbatches": 1}),
    "gpt 2x256, 32x64": (
        GPT, {"model.depth": 2, "model.width": 256, "seq_len": 64, "batch_size": 32, "microbatches": 1},
    ),
    "cnn 64-128, 128": (CNN, {"batch_size": 128, "microbatches": 1}),
}  # fmt: skip


def ranked(rounds: int, fresh: bool, only: str) -> list[dict[str, Any]]:
    """Plans every mesh of each model on cpu:8, then runs them. -> rows of name, mesh, predicted_step_s,
    measured_step_s, and `slower`: the first choice's time over the fastest's, less one."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    from bigmodel.plan import calibrate, candidates, target

    calibration = calibrate.load(disk.cache_dir(), fresh)
    print(f"calibrated for {calibration.key} in {calibration.took_s:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for name, (path, overrides) in _chosen(RANKED, only).items():
        config = _load(path, overrides)
        found = list(candidates.candidates(config, target.make("cpu:8"), over=()))
        print(f"{name}: {len(found)} meshes", flush=True)
        prepared = [_prepare(c.config, calibration) for c in found]
        times = _interleave([step for _, _, step in prepared], rounds, least_s=0.5)
        tried: list[dict[str, Any]] = [
            {
                "name": name, "mesh": candidates.mesh_name(c.config), "predicted_step_s": predicted_s,
                "measured_step_s": statistics.median(itertools.chain(*measured)),
            }
            for c, (predicted_s, _, _), measured in zip(found, prepared, times, strict=True)
        ]  # fmt: skip
        tried.sort(key=lambda row: row["predicted_step_s"])
        fastest_s = min(row["measured_step_s"] for row in tried)
        for row in tried:
            row["slower"] = row["measured_step_s"] / fastest_s - 1
            print(
                f"  {row['mesh']:32} {1e3 * row['predicted_step_s']:8.1f} ms predicted "
                f"{1e3 * row['measured_step_s']:8.1f} ms measured",
                flush=True,
            )
        print(f"  the first choice is {tried[0]['slower']:.1%} slower than the fastest mesh", flush=True)
        rows += tried
    return rows


def _chosen(cases: dict[str, Any], only: str) -> dict[str, Any]:
    """Raises InputError where no name holds the text."""
    chosen = {name: case for name, case in cases.items() if only in name}
    if not chosen:
        raise InputError(f"--only={only!r} is in no name; choose of {'; '.join(cases)}")
    return chosen


def _load(path: str, overrides: dict[str, Any]) -> Config:
    fixed = {"optim.name": "adamw", "optim.lr": 3e-4, "steps": 10**6}
    from bigmodel import tasks

    return tasks.sized(config_lib.load(ROOT / path, {**fixed, **overrides}))


def _prepare(config: Config, calibration: Any) -> tuple[float, float, Callable[[], Any]]:
    """-> (predicted seconds a step, seconds that planning took, a function that runs a step)."""
    import jax

    from bigmodel import mesh
    from bigmodel import program as program_lib
    from bigmodel.plan import machine, target

    batch = _random_batch(config)
    began = time.perf_counter()
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    program = program_lib.build(config, mesh.make_mesh(config), spec)
    compiled = program.compile()
    here = machine.Cpu(target.here(tuple(program.mesh.devices.flat)))
    predicted_s = here.walk(compiled.as_text(), program.mesh, calibration).total_s
    plan_s = time.perf_counter() - began
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
    if config.task.one_output:
        image = rng.normal(size=(b, 28, 28, 1)).astype(np.float32)
        return {"image": image, "label": rng.integers(0, 10, b, np.int32), "mask": mask}
    ids = rng.integers(0, 256, (b, length + 1), np.int32)
    return {
        "tokens": ids[:, :-1], "targets": ids[:, 1:], "segments": np.ones((b, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (b, 1)),
        "mask": mask, "target_bytes": np.ones((b, length), np.uint8),
    }  # fmt: skip


def _interleave(steps: list[Callable[[], Any]], rounds: int, least_s: float = 1.0) -> list[list[list[float]]]:
    """-> seconds of single steps, by case and round: a case runs `least_s` in each, two steps uncounted."""
    import jax

    found: list[list[list[float]]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, times in zip(steps, found, strict=True):
            for _ in range(2):
                jax.block_until_ready(step())
            times.append([])
            until = time.perf_counter() + least_s
            while time.perf_counter() < until:
                start = time.perf_counter()
                jax.block_until_ready(step())
                times[-1].append(time.perf_counter() - start)
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
