"""Prints what a run will cost, on devices that need not be there: parameters, FLOPs, memory, collectives, the
step's time, and the whole run's hours, energy, emissions and dollars. Trains nothing.

    python scripts/plan.py --config=configs/gpt.py:size=llama-7b --target=v5e:16x16 --config.mesh.fsdp=256 \\
        --json=plan.json

Targets: TPU slices (v4, v5e, v5p, v6e, tpu7x, as v5e:16x16 or 2*v5e:16x16), NVIDIA hosts x GPUs (a100-80,
h100, h200, b200, as h100:8x8), and this machine (cpu, cpu:8). TPUs and GPUs are planned with their own
compilers after `pip install 'bigmodel[plan]'`.
"""

from __future__ import annotations

import json
import pathlib

import cli

from bigmodel import config as config_lib
from bigmodel.config import InputError


def main() -> int:
    flags = cli.parser(__doc__)
    cli.add_config(flags)
    flags.add_argument("--target", default="", help="e.g. v5e:16x16; without it, the devices of this machine")
    flags.add_argument("--json", type=pathlib.Path, help="write the receipt here too")
    flags.add_argument(
        "--assume", action="append", default=[], metavar="KEY=VALUE", help="e.g. watts=250, pue=1.2"
    )
    flags.add_argument(
        "--timeline", type=pathlib.Path, metavar="DIR", help="a step's trace and picture go here"
    )
    args, overrides = cli.parse(flags)
    config = config_lib.load(args.config, overrides)
    assume = dict(map(_assumption, args.assume))
    cli.no_accelerator_needed(bool(args.target))
    from bigmodel.plan import planner, receipt

    plan = planner.plan(config, args.target, assume=assume)
    print("\n".join(receipt.table(plan.receipt)))
    if args.timeline:
        from bigmodel.plan import timeline

        print("\n".join(f"wrote     {path}" for path in timeline.write(plan.schedule, args.timeline)))
    if args.json:
        args.json.write_text(json.dumps(plan.receipt, indent=2) + "\n")
    return 0


def _assumption(text: str) -> tuple[str, float]:
    key, _, value = text.partition("=")
    keys = ("watts", "pue", "kg_co2e_per_kwh", "dollars_per_chip_hour")
    try:
        if key not in keys:
            raise ValueError
        return key, float(value)
    except ValueError as error:
        raise InputError(f"--assume={text!r}: give KEY=NUMBER with a KEY of {', '.join(keys)}") from error


if __name__ == "__main__":
    cli.run(main)
