"""Fits scaling laws to runs, and predicts the loss of larger ones.

    python scripts/laws.py fit RUNS... --out=law.json
    python scripts/laws.py fit TABLE.csv --loss=loss_c4 --by=train_data --below=1e20 --out=law.json
    python scripts/laws.py predict law.json TABLE.csv --json=predicted.json

RUNS are workdirs of train.py, or directories of them. A table has the columns params, tokens and a loss, and
may have flops (otherwise 6 x params x tokens) and model, a run's name. The law is L(N, D) = E + A N^-alpha +
B D^-beta. Its form, its intervals and what was left out are printed and written to law.json; a picture of
each law is drawn next to it. `predict` also takes published coefficients: hoffmann2022, besiroglu2024.
"""

from __future__ import annotations

import argparse
import pathlib
import re

import cli

from bigmodel import disk, pictures
from bigmodel.config import InputError
from bigmodel.study import curves, laws, points
from bigmodel.study.fitting import FORMS
from bigmodel.study.points import Columns


def main() -> int:
    flags = cli.parser(__doc__)
    commands = flags.add_subparsers(dest="command", required=True, metavar="fit|predict")
    fit = commands.add_parser("fit", help="fit a law to runs")
    fit.add_argument("runs", nargs="+", help="workdirs, directories of workdirs, or tables")
    fit.add_argument("--out", required=True, metavar="law.json")
    fit.add_argument("--form", choices=["auto", *FORMS], default="auto", help="default: as the runs say")
    fit.add_argument("--below", type=float, default=float("inf"), metavar="FLOPS", help="predict larger runs")
    fit.add_argument("--level", type=float, default=0.9, help="of the intervals; default: 0.9")
    fit.add_argument("--resamples", type=int, default=1000, help="for the intervals; default: 1000")
    predict = commands.add_parser("predict", help="predict the losses of a table's rows")
    predict.add_argument("law", help="law.json, or hoffmann2022 or besiroglu2024")
    predict.add_argument("runs", nargs="+", help="a table, or workdirs", metavar="TABLE.csv")
    predict.add_argument("--json", required=True, metavar="FILE")
    for command in (fit, predict):
        command.add_argument(
            "--loss", default="", help="column of the loss; of workdirs, e.g. eval/test/loss"
        )
        command.add_argument(
            "--by", default="", help="one law for each value of a column, or of a key of the config"
        )
        command.add_argument("--params", default="", help="column of the parameters; default: params")
    args, rest = cli.parse(flags)
    if rest:
        raise InputError(f"--config.{rest[0]}: laws are fitted to runs as they are; leave it out")
    return _fit(args) if args.command == "fit" else _predict(args)


def _fit(args: argparse.Namespace) -> int:
    if not 0 < args.level < 1 or args.resamples < 100:
        raise InputError(f"--level={args.level} --resamples={args.resamples}: give 0 to 1, and 100 or more")
    if not args.below > 0:
        raise InputError(f"--below={args.below}: give FLOPs above 0, such as 1e20")
    out, found = pathlib.Path(args.out), {}
    if out.is_dir():
        raise InputError(f"--out={out} is a directory; name a file, such as {out / 'law.json'}")
    with disk.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    columns = Columns(args.loss, args.by, args.params or "params")
    runs, loss = points.read(args.runs, columns)
    chosen, left_out = points.usable(runs)
    settings = laws.Settings(args.form, args.below, args.level, args.resamples)
    for group in dict.fromkeys(run.group for run in runs):
        mine = [run for run in chosen if run.group == group]
        found[group] = laws.fit(mine, [each for each in left_out if each["group"] == group], settings)
        title = f"{loss}{f' of {group}' if group else ''}: {found[group].about['form']} law"
        name = re.sub(r"[^\w.-]+", "_", f"{out.stem}-{group}") if group else out.stem
        figure = curves.draw(title, found[group], mine, args.below)
        print("\n".join(laws.lines(group, found[group])))
        with disk.writing(out.parent / f"{name}.png"):
            print(f"  picture {pictures.write(out.parent, {name: figure})[0]}", flush=True)
    about = {"loss": loss, "by": args.by, "params": columns.params, "from": args.runs}
    laws.write(out, found, about)
    print(f"wrote {out}")
    return 0


def _predict(args: argparse.Namespace) -> int:
    known, about = laws.read(args.law)
    columns = Columns(args.loss or about["loss"], args.by or about["by"], args.params or about["params"])
    runs, loss = points.read(args.runs, columns, with_loss=False)
    rows = laws.predict_rows(known, runs)
    disk.write_json(pathlib.Path(args.json), disk.without_nan(rows))
    errors = [
        row["predicted_loss"] / run.loss - 1 for row, run in zip(rows, runs, strict=True) if run.loss > 0
    ]
    mean = f", mean error of {loss} {sum(map(abs, errors)) / len(errors):.2%}" if errors else ""
    print(f"wrote {args.json}: {len(rows)} rows{mean}")
    return 0


if __name__ == "__main__":
    cli.run(main)
