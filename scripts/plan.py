"""Prints the cost of a run before it starts, on devices that need not be there: parameters, FLOPs, memory,
collectives, the step's time, and the run's hours, energy, emissions and dollars. Trains nothing.

    python scripts/plan.py --config=configs/gpt.py:size=llama-7b --target=v5e:16x16 --config.mesh.fsdp=256 \\
        --json=plan.json

With --mode=serve, the cost of serving the model: the largest batch that fits, the latency of a prompt,
and over batch sizes the latency of a token, tokens a second and dollars a million tokens.

Targets: TPU slices (v4, v5e, v5p, v6e, tpu7x, as v5e:16x16 or 2*v5e:16x16), NVIDIA hosts x GPUs (a100-80,
h100, h200, b200, as h100:8x8), and this machine (cpu, cpu:8). TPUs and GPUs are planned with their own
compilers after `pip install -e '.[plan]'`.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from typing import Any

import cli

from bigmodel import config as config_lib
from bigmodel.config import InputError
from bigmodel.machines import accelerators


def main() -> int:
    flags = cli.parser(__doc__)
    cli.add_config(flags)
    flags.add_argument("--target", default="", help="e.g. v5e:16x16; without it, the devices of this machine")
    flags.add_argument("--json", type=pathlib.Path, help="write the receipt here too")
    flags.add_argument(
        "--assume", action="append", default=[], metavar="KEY=VALUE|FILE.yaml",
        help="e.g. watts=250, pue=1.2, or a YAML file of such lines",
    )  # fmt: skip
    flags.add_argument(
        "--search", type=int, nargs="?", const=4, default=0, metavar="N",
        help="compile the N (4) likeliest of all meshes x remat x microbatches, and rank them",
    )  # fmt: skip
    flags.add_argument(
        "--search_over", "--search-over", default="remat,microbatches", metavar="KEYS",
        help="keys that --search may change with the mesh: any of remat,microbatches,batch_size",
    )  # fmt: skip
    flags.add_argument(
        "--show-sharding", action="store_true",
        help="print each parameter's shape, mesh axes and bytes a device, and compile nothing",
    )  # fmt: skip
    flags.add_argument(
        "--timeline",
        type=pathlib.Path,
        metavar="DIR",
        help="a step's trace and picture go here; with --mode=serve the picture of the curve",
    )
    flags.add_argument(
        "--mode", choices=("train", "serve"), default="train", help="serve: batch, latency, dollars a token"
    )
    flags.add_argument("--prompt", type=int, default=0, help="--mode=serve: its tokens; 0: half of seq_len")
    args, overrides = cli.parse(flags)
    if args.target:
        accelerators.keep_to_cpu()  # before a family of one's own imports JAX
    from bigmodel import tasks

    config = tasks.sized(config_lib.load(args.config, overrides), say=print)
    assume = cli.assumptions(args.assume)
    if args.search < 0:
        raise InputError(f"--search={args.search}: give how many ways to compile, 1 or more")
    if args.show_sharding:
        return _show_sharding(config, args.target)
    if args.mode == "serve":
        return _serve(config, args, assume)
    from bigmodel.plan import planner, receipt

    ranking: list[dict[str, Any]] = []
    if args.search:
        from bigmodel.plan import search

        over = tuple(filter(None, args.search_over.split(",")))
        for key in over:
            if key not in search.OVER:
                raise InputError(f"--search_over={key!r} is unknown; choose of {', '.join(search.OVER)}")
        say = functools.partial(print, file=sys.stderr, flush=True)
        found = search.search(
            config, args.target, compile_best=args.search, over=over, assume=assume, say=say
        )
        print("\n".join(search.table(found)))
        config, ranking = found.best.candidate.config, search.ranking(found)
    with cli.patience("planning"):
        plan = planner.plan(config, args.target, assume=assume)
    print("\n".join(receipt.table(plan.receipt)))
    if args.timeline:
        from bigmodel.plan import candidates, timeline

        r, mesh = plan.receipt, candidates.mesh_name(config)
        title = f"{args.config} on {r['devices']} x {r['device_kind']}, {mesh}, remat {r['remat']}"
        written = timeline.write(plan.schedule, args.timeline, title)
        print("\n".join(f"wrote     {path}" for path in written))
    if args.json:
        found_too = {"search": ranking} if ranking else {}
        args.json.write_text(json.dumps(plan.receipt | found_too, indent=2) + "\n")
    return 0


def _show_sharding(config: config_lib.Config, spec: str) -> int:
    from bigmodel.plan import layout, planner, target

    print("\n".join(layout.table(planner.build(config, target.of(config, spec)))))
    return 0


def _serve(config: config_lib.Config, args: argparse.Namespace, assume: dict[str, float]) -> int:
    from bigmodel.infer import serving_plan

    with cli.patience("planning"):
        plan = serving_plan.plan(config, args.target, prompt=args.prompt, assume=assume)
    print("\n".join(serving_plan.table(plan)))
    if args.timeline:
        title = f"{args.config} on {plan['target'] or 'this machine'}"
        print(f"wrote     {serving_plan.draw(plan, args.timeline, title)}")
    if args.json:
        args.json.write_text(json.dumps(plan, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
