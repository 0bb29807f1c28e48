"""Evaluates a trained model on its held-out split and prints the metrics as JSON.

    python scripts/evaluate.py --workdir=runs/toy
    python scripts/evaluate.py --workdir=runs/toy --config.data.name=table:x.csv --config.data.eval_split=all

Other data are encoded and numbered as in training, from the workdir alone; the training data may be missing.
Keys that may be set: data.name, eval_split, data_dir, max_skipped, decimal, cache, prefetch; eval.batches.

If the task has metrics that need all examples at once (per class, curves, calibration, cuts of a score, gaps
between groups, the surest mistakes; a detector's precision; distances between real images and a GAN's), they
go to WORKDIR/evaluation.json and pictures to WORKDIR/evaluation/; stderr says it in short. Pairs of texts
also get BLEU and chrF of the greedy answers.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import cli

from bigmodel import config as config_lib
from bigmodel import tasks
from bigmodel.config import InputError
from bigmodel.infer import loading

MAY_SET = {"eval.batches", *(f"data.{key}" for key in (
    "name", "eval_split", "data_dir", "max_skipped", "decimal", "cache", "prefetch"))}  # fmt: skip


def main() -> int:
    flags = cli.workdir_parser(__doc__)
    flags.add_argument(
        "--features", metavar="DIR", help="for a GAN: a classifier's run, whose features give the distances"
    )
    flags.add_argument("--set", default="", metavar="NAME", help="one of the run's eval.sets")
    args, rest = cli.parse_workdir(flags, MAY_SET)
    from bigmodel import data, evaluate, mesh, pictures, workdir
    from bigmodel.tasks import rates
    from bigmodel.tasks.base import ReportTo

    program, state = loading.load(args.workdir, args.step)
    config = config_lib.override(program.config, rest)
    if args.set:
        sets = config_lib.eval_sets(config)
        if args.set not in sets:
            raise InputError(f"--set={args.set} is no set of this run; choose one of {', '.join(sets)}")
        config = sets[args.set]
    program = dataclasses.replace(program, config=config)
    rows = mesh.host_rows(program.mesh, program.config.batch_size)
    path = pathlib.Path(args.workdir)
    pipeline = tasks.make_pipeline(program.config, "eval", path, **rows)
    values = evaluate.run(program, state, pipeline)
    if program.config.task.generates == "answer":
        values |= evaluate.bleu(program, state, data.get_tokenizer(program.config, path))
    if program.task.reports:
        examples = evaluate.collect(program, state, pipeline)
        features = evaluate.classifier_features(args.features, program) if args.features else None
        d = program.config.data
        about = f"{path}, step {int(state['step']):,}: {d.name}, {d.eval_split}"
        groups = data.Facts(program.config, path).names(d.group) if "group" in examples else ()
        to = ReportTo(
            path / "evaluation", pipeline.class_names, groups, features,
            read=pipeline.read, where=pipeline.where, about=about,
        )  # fmt: skip
        report = evaluate.report(program, examples, to)
        drawn = pictures.save(path / "evaluation", evaluate.draw(program, state, pipeline))
        report["pictures"] = [*report.get("pictures", []), *drawn]
        workdir.write_json(
            path / "evaluation.json", {"data": d.name, "split": d.eval_split} | values | report
        )
        written = [f"wrote     {name}" for name in (path / "evaluation.json", *report["pictures"])]
        print(*rates.lines(report), *written, sep="\n", file=sys.stderr)
    print(json.dumps(workdir.without_nan(values), indent=2, allow_nan=False))
    return 0


if __name__ == "__main__":
    cli.run(main)
