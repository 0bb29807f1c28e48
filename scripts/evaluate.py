"""Evaluates a trained model on its held-out split and prints the metrics as JSON.

    python scripts/evaluate.py --workdir=runs/toy
    python scripts/evaluate.py --workdir=runs/toy --config.data.name=table:x.csv --config.data.eval_split=all

Other data are encoded and numbered as in training, from the workdir alone; the training data may be missing.
Keys that may be set: data.name, eval_split, data_dir, max_skipped, decimal, cache, prefetch; eval.batches.

If the task has metrics that need all examples at once (per class, curves, calibration, gaps between groups;
a detector's precision; distances between real images and a GAN's), they go to WORKDIR/evaluation.json and
pictures to WORKDIR/evaluation/. Pairs of texts also get BLEU and chrF of the greedy answers.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

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
    from bigmodel import data, evaluate, mesh, metrics, pictures, workdir

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
    if tasks.make(program.config).reports:
        examples = evaluate.collect(program, state, pipeline)
        features = evaluate.classifier_features(args.features, program) if args.features else None
        whole = evaluate.report(program, examples, path / "evaluation", pipeline.class_names, features)
        if group := "gaps" in whole and program.config.data.group:
            names = data.Facts(program.config, path).names(group)
            whole["gaps"]["groups"] = metrics.named(whole["gaps"]["groups"], names)
        shown = pictures.save(path / "evaluation", evaluate.draw(program, state, pipeline))
        whole["pictures"] = [*whole.get("pictures", []), *shown]
        read = {"data": program.config.data.name, "split": program.config.data.eval_split}
        workdir.write_json(path / "evaluation.json", read | values | whole)
    print(json.dumps(workdir.without_nan(values), indent=2, allow_nan=False))
    return 0


if __name__ == "__main__":
    cli.run(main)
