"""Evaluates a trained model on its held-out split and prints the metrics as JSON.

python scripts/evaluate.py --workdir=runs/toy
"""

from __future__ import annotations

import json
import pathlib

import cli

from bigmodel.config import InputError


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("--workdir", required=True, help="a run that scripts/train.py made")
    flags.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    args, rest = cli.parse(flags)
    if rest:
        raise InputError(f"--config.{rest[0]}: the config comes from the workdir; leave it out")
    from bigmodel import data, evaluate, infer, mesh

    program, state = infer.load(args.workdir, args.step)
    rows = mesh.host_rows(program.mesh, program.config.batch_size)
    pipeline = data.make_pipeline(program.config, "eval", pathlib.Path(args.workdir), **rows)
    print(json.dumps(evaluate.run(program, state, pipeline), indent=2))
    return 0


if __name__ == "__main__":
    cli.run(main)
