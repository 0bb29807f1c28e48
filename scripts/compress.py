"""Makes a trained model smaller in stages and prices each: accuracy, bytes, FLOPs, latency, joules.

    python scripts/compress.py --workdir=runs/mnist --recipe=prune:0.5+finetune:200,quantize:int8 \\
        --out=runs/small

A recipe has stages with commas between them, the steps of a stage are joined by +, and a step's settings
follow it after colons; or it is a YAML file (bigmodel/compress/recipe.py). OUT becomes an ordinary workdir
with report.json and report.png, which evaluate.py, generate.py, train.py and compress.py read.

--seeds=5 runs the recipe five times, into OUT/1 to OUT/5, and prints the spread of each stage's metrics and
whether they differ from those of the stage before.
"""

from __future__ import annotations

import sys

import cli

from bigmodel.config import InputError


def main() -> int:
    flags = cli.workdir_parser(__doc__, step=False)
    flags.add_argument(
        "--recipe", required=True, help="e.g. prune:0.5+finetune:200,quantize:int8, or FILE.yaml"
    )
    flags.add_argument("--out", required=True, type=cli.directory, help="a new directory")
    flags.add_argument(
        "--seeds", type=int, default=1, help="runs of the recipe, to see what differs by chance"
    )
    args, _ = cli.parse_workdir(flags)
    from bigmodel import train
    from bigmodel.compress import recipe, stages

    try:
        steps = recipe.parse(args.recipe)
        if args.seeds < 1:
            raise InputError(f"--seeds={args.seeds}: give 1 or more")
        if args.seeds > 1:
            stages.repeat(args.workdir, steps, args.out, args.seeds)
        else:
            stages.run(args.workdir, steps, args.out)
    except train.NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return train.NOT_FINITE
    return 0


if __name__ == "__main__":
    cli.run(main)
