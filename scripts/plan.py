"""Prints what a run will cost on the devices at hand: parameters, FLOPs, memory, time. Trains nothing.

python scripts/plan.py --config=configs/gpt.py:size=124m,seq_len=1024 --json=plan.json
"""

from __future__ import annotations

import json
import pathlib

import cli

from bigmodel import config as config_lib


def main() -> int:
    flags = cli.parser(__doc__)
    cli.add_config(flags)
    flags.add_argument("--json", type=pathlib.Path, help="write the receipt here too")
    args, overrides = cli.parse(flags)
    config = config_lib.load(args.config, overrides)
    from bigmodel import data, mesh, program
    from bigmodel.plan import estimate

    built = program.build(config, mesh.make_mesh(config), data.batch_spec(config))
    receipt = estimate.receipt(built, built.compile())
    print("\n".join(estimate.table(receipt)))
    if args.json:
        args.json.write_text(json.dumps(receipt, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
