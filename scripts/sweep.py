"""Runs a config many times: a study, whose price is known before it starts and capped.

    python scripts/sweep.py --config=configs/gpt.py:size=toy --study=DIR \\
        --over=optim.lr=5e-3,1e-2,2e-2 --over=seed=0:3 --cap=2h
    python scripts/sweep.py --config=configs/gpt.py:size=toy --study=DIR \\
        --search=tpe:40 --over=optim.lr=1e-4..1e-1 --prune=median

    python scripts/sweep.py ... --on=slurm --jobs=8 --sbatch='--gpus-per-node=8 --time=4:00:00'

Without --over the trials are those of the config's own sweep(). Each is an ordinary workdir, DIR/<name>. The
same command goes on after it was stopped or killed, runs nothing twice and loses nothing.

Exit codes: 0 all trials are done; 1 a trial failed; 2 bad input; 5 the cap was reached before the last trial;
75 stopped by SIGTERM, 130 by Ctrl-C: run it again to go on.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import signal
import sys
from typing import Any

import cli

from bigmodel import disk
from bigmodel.config import InputError

TRAIN = (sys.executable, str(pathlib.Path(__file__).with_name("train.py")))
FAILED, CAPPED = 1, 5


def main() -> int:
    flags = cli.parser(__doc__)
    cli.add_config(flags)
    flags.add_argument("--study", required=True, type=cli.directory, help="the study's directory")
    flags.add_argument(
        "--over", action="append", default=[], metavar="KEY=VALUES",
        help="a,b,c; FROM:TO of whole numbers; LOW..HIGH for --search; may be repeated",
    )  # fmt: skip
    flags.add_argument("--search", default="", metavar="tpe|random:N", help="N trials by a sampler of Optuna")
    flags.add_argument("--prune", default="none", help="stop bad trials at an evaluation: median or halving")
    flags.add_argument(
        "--metric", default="", help="of an evaluation; a leading - : the lowest is best. Default: the loss"
    )
    flags.add_argument(
        "--cap", default="", help="start no trial beyond 2h, 90min, $50, 3kwh or 1e18flop in all"
    )
    flags.add_argument("--jobs", type=int, default=1, help="trials at a time on this host, or of the array")
    flags.add_argument(
        "--storage", default="",
        help="a database that hosts share: postgresql://...; journal: a file in the directory, for NFS",
    )  # fmt: skip
    flags.add_argument("--on", default="local", choices=("local", "slurm"), help="slurm: as a job array")
    flags.add_argument("--sbatch", default="", metavar="FLAGS", help="for sbatch: '--gpus=1 --time=2:00:00'")
    flags.add_argument(
        "--target", default="", help="with --dry_run: price it for these chips, as plan.py does"
    )
    flags.add_argument("--assume", action="append", default=[], metavar="KEY=VALUE", help="as plan.py's")
    flags.add_argument("--task", action="store_true", help="run one trial, as a task of --on=slurm does")
    flags.add_argument("--steps_alone", action="store_true", help="price training steps, measure nothing")
    flags.add_argument("--dry_run", action="store_true", help="print the trials and their prices, and stop")
    flags.add_argument("--json", default="", metavar="FILE", help="write the plan or the results here too")
    args, overrides = cli.parse(flags)
    _check(args)
    return _sweep(args, overrides)


def _check(args: argparse.Namespace) -> None:
    if args.jobs < 1:
        raise InputError(f"--jobs={args.jobs}: give 1 or more")
    if args.target and args.on == "local" and not (args.dry_run or args.task):
        raise InputError(
            "--target goes with --dry_run or --on=slurm: trials run on this machine and are priced for it"
        )
    if args.sbatch and args.on != "slurm":
        raise InputError("--sbatch goes with --on=slurm")


def _sweep(args: argparse.Namespace, overrides: list[str]) -> int:
    from bigmodel.study import order, price, quote, report, results, runner, sweep

    asked = order.read(
        args.config, overrides, over=args.over, search=args.search, metric=args.metric, prune=args.prune
    )
    if args.storage not in ("", "journal"):
        sweep.reach(args.storage)
    cap, pricer = cli.cap(args.cap, "--cap"), price.Pricer(args.target, cli.assumptions(args.assume))
    measured = not (args.target or args.steps_alone or args.task or args.on == "slurm")
    prices = quote.Prices(asked, pricer, cap, TRAIN if measured else ())
    if not args.task:
        with cli.patience("planning"):
            quoted = quote.make(asked, prices)
        print("\n".join(quoted.lines), flush=True)
    if args.dry_run:
        _write(args.json, {"trials": quoted.rows, "total": quoted.total})
        return 0
    storage = args.storage or ("journal" if args.on == "slurm" else "")
    study = sweep.Study(pathlib.Path(args.study), asked.definition, asked.space, storage)
    study.enqueue(asked.grid)
    if args.on == "slurm" and study.left(asked.count):
        return _submit(args, study, study.left(asked.count))
    running = runner.Runner(
        study,
        lambda settings: asked.command(TRAIN, settings),
        prices,
        count=asked.count,
        jobs=args.jobs,
        cap=cap,
        limit=1 if args.task else None,
        pue=pricer.assume.get("pue", price.PUE),
    )
    code = _run(running) if args.on == "local" else 0
    failed = "failed" in running.ended.values()
    if not args.task:
        found = results.of(study, running.spent(), quoted.total)
        print("\n".join(found.lines))
        _write(args.json, found.values)
        report.write_at_end(study.directory, study.study)
        failed = bool(found.failed)
    if running.unpaid:
        print(f"cap       {args.cap} does not pay for {running.unpaid}: a larger --cap goes on")
    return code or (FAILED if failed else CAPPED if running.unpaid else 0)


def _run(running: Any) -> int:
    """Runs trials until all are done or a signal comes; returns the signal's exit code, or 0."""
    code = [0]

    def stop(number: int, _: Any) -> None:
        code[0] = {signal.SIGTERM: 75, signal.SIGINT: 130}[signal.Signals(number)]
        running.stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    running.run()
    return code[0] or (75 if running.stopping.is_set() else 0)


def _submit(args: argparse.Namespace, study: Any, count: int) -> int:
    from bigmodel.study import slurm

    task = [sys.executable, *sys.argv, "--on=local", "--task", "--jobs=1", "--sbatch=", "--json="]
    task.append(f"--storage={args.storage or 'journal'}")
    script = pathlib.Path(__file__).with_name("launch") / "slurm_trial.sh"
    job = slurm.submit(study, script, task, count, args.jobs, args.sbatch)
    print(
        f"slurm     job {job}, {count} trials left, {args.jobs} at a time; their output: {args.study}/slurm/"
    )
    print("          the same command shows the results when they are done, and queues what was lost")
    return 0


def _write(file: str, value: dict[str, Any]) -> None:
    if file:
        text = json.dumps(disk.without_nan(value), indent=2) + "\n"
        with disk.writing(pathlib.Path(file)):
            pathlib.Path(file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
