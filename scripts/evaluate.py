"""Evaluates a trained model on its held-out split and prints the metrics as JSON.

python scripts/evaluate.py --workdir=runs/toy

For a model with one output an example, WORKDIR/evaluation.json also gets what needs all examples at once (per
class, curves, calibration, gaps between groups), and a classifier's pictures go to WORKDIR/evaluation/.
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
    from bigmodel import data, evaluate, infer, mesh, workdir
    from bigmodel.families import IMAGE_TASKS

    program, state = infer.load(args.workdir, args.step)
    rows = mesh.host_rows(program.mesh, program.config.batch_size)
    path = pathlib.Path(args.workdir)
    pipeline = data.make_pipeline(program.config, "eval", path, **rows)
    values = evaluate.run(program, state, pipeline)
    if program.config.task.name in IMAGE_TASKS:
        examples = evaluate.collect(program, state, pipeline)
        names = data.class_names(program.config)
        whole = evaluate.report(program, examples, path / "evaluation", names)
        workdir.write_json(path / "evaluation.json", values | whole)
    print(json.dumps(values, indent=2))
    return 0


if __name__ == "__main__":
    cli.run(main)
