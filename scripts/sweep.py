"""Runs a config many times: a study, whose price is known before it starts and capped.

    python scripts/sweep.py --config=configs/gpt.py:size=toy --study=DIR \\
        --over=optim.lr=5e-3,1e-2,2e-2 --over=seed=0:3 --cap=2h
    python scripts/sweep.py --config=configs/gpt.py:size=toy --study=DIR \\
        --search=tpe:40 --over=optim.lr=1e-4..1e-1 --prune=median

Without --over the trials are those of the config's own sweep(). Each is an ordinary workdir, DIR/<name>. The
same command goes on after it was stopped or killed, runs nothing twice and loses nothing.

Exit codes: 0 all trials are done; 1 a trial failed; 2 bad input; 5 the cap was reached before the last trial;
75 stopped by SIGTERM, 130 by Ctrl-C: run it again to go on.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
import signal
import sys
from typing import Any

import cli

from bigmodel import config as config_lib
from bigmodel.config import InputError

LOWER = re.compile(r"(loss|nll|perplexity|bits_per_byte|mse|rmse|mae|frechet\w*|gap\w*)$")
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
    flags.add_argument("--jobs", type=int, default=1, help="trials at a time on this host")
    flags.add_argument("--storage", default="", help="a database that hosts share: postgresql://...")
    flags.add_argument(
        "--target", default="", help="with --dry_run: price it for these chips, as plan.py does"
    )
    flags.add_argument("--assume", action="append", default=[], metavar="KEY=VALUE", help="as plan.py's")
    flags.add_argument("--dry_run", action="store_true", help="print the trials and their prices, and stop")
    flags.add_argument("--json", type=pathlib.Path, help="write the plan or the results here too")
    args, overrides = cli.parse(flags)
    return _Sweep(args, overrides).run()


class _Sweep:
    """One command: parsed, priced, run and told."""

    def __init__(self, args: Any, overrides: list[str]) -> None:
        from bigmodel.study import price, sweep, trials

        self.args, self.overrides = args, overrides
        if args.jobs < 1:
            raise InputError(f"--jobs={args.jobs}: give 1 or more")
        if args.target and not args.dry_run:
            raise InputError("--target goes with --dry_run: trials run on this machine and are priced for it")
        base = config_lib.load(args.config, overrides)
        self.sampler, self.count = _search(args.search)
        self.space = trials.parse(args.over)
        if self.space.ranges and not self.sampler:
            key = next(iter(self.space.ranges))
            raise InputError(f"--over={key}=LOW..HIGH is for --search=tpe:40; without it, give {key}=a,b,c")
        own = trials.of_config(config_lib.sweep(args.config)) if not args.over else []
        if self.sampler and not args.over:
            raise InputError("--search needs --over=KEY=LOW..HIGH or KEY=a,b,c, once or more")
        if not self.sampler and not args.over and not own:
            raise InputError(f"{args.config} has no sweep(); give --over=KEY=a,b,c")
        self.grid = [] if self.sampler else (own or self.space.grid())
        name = args.metric or f"eval/{next(iter(config_lib.eval_sets(base)))}/loss"
        self.metric = name.lstrip("-")
        sets = [f"eval/{each}/" for each in config_lib.eval_sets(base)]
        if not self.metric.startswith(tuple(sets)):
            raise InputError(f"--metric={args.metric}: name one of an evaluation, such as {sets[0]}loss")
        self.maximize = not name.startswith("-") and not LOWER.search(self.metric)
        self.cap = cli.cap(args.cap, "--cap")
        self.pricer = price.Pricer(args.target, cli.assumptions(args.assume))
        self.definition = sweep.Definition(
            args.config,
            tuple(overrides),
            self.metric,
            self.maximize,
            self.sampler,
            tuple(args.over) if self.sampler else (),
            args.prune,
        )
        for settings in [*self.grid, *self._probes()]:
            self._config(settings)  # all are sound before the first starts

    def run(self) -> int:
        from bigmodel.study import price, sweep

        with cli.patience("planning"):
            plan = self._plan()
        print("\n".join(plan["table"]), flush=True)
        if self.args.dry_run:
            self._write({"trials": plan["rows"], "total": plan["total"]})
            return 0
        study = sweep.Study(pathlib.Path(self.args.study), self.definition, self.space, self.args.storage)
        study.enqueue(self.grid)
        train = pathlib.Path(__file__).with_name("train.py")
        command = [sys.executable, str(train), f"--config={self.args.config}"]
        command += [f"--config.{item}" for item in self.overrides]
        runner = sweep.Runner(
            study,
            command,
            self._price,
            count=self.count,
            jobs=self.args.jobs,
            cap=self.cap,
            pue=self.pricer.assume.get("pue", price.PUE),
        )
        code = [0]

        def stop(number: int, _: Any) -> None:
            code[0] = {signal.SIGTERM: 75, signal.SIGINT: 130}[signal.Signals(number)]
            runner.stopping.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        runner.run()
        return self._results(study, runner, code[0] or (75 if runner.stopping.is_set() else 0))

    def _config(self, settings: dict[str, str]) -> config_lib.Config:
        items = [*self.overrides, *(f"{key}={value}" for key, value in settings.items())]
        try:
            return config_lib.load(self.args.config, items)
        except InputError as error:
            raise InputError(f"trial {_named(settings)}: {error}") from error

    def _price(self, settings: dict[str, str]) -> dict[str, float]:
        return self._priced(tuple(settings.items()))

    @functools.cache  # noqa: B019
    def _priced(self, items: tuple[tuple[str, str], ...]) -> dict[str, float]:
        from bigmodel import tasks
        from bigmodel.study import price

        try:
            config = tasks.sized(self._config(dict(items)))
            found = price.of_receipt(self.pricer.receipt(config))
        except InputError as error:
            raise InputError(f"trial {_named(dict(items))}: {error}") from error
        if self.cap and self.cap.key not in found:
            raise InputError(
                f"--cap={self.args.cap}: the price of this machine is not known; give "
                "--assume=dollars_per_chip_hour=2 or --assume=watts=200"
            )
        return found

    def _probes(self) -> list[dict[str, str]]:
        """Settings by which a search is priced: each value in turn, ranges at both ends."""
        if not self.sampler:
            return []
        ends = [
            {key: values[0] for key, values in self.space.values.items()}
            | {key: _text(r, high) for key, r in self.space.ranges.items()}
            for high in (False, True)
        ]
        others = [
            {**ends[0], key: value} for key, values in self.space.values.items() for value in values[1:]
        ]
        return [*ends, *others]

    def _plan(self) -> dict[str, Any]:
        from bigmodel.study import price, trials

        if self.sampler:
            probes = [self._price(settings) for settings in self._probes()]
            dearest = {key: max(each[key] for each in probes) for key in probes[0]}
            each = {key: value * self.count for key, value in dearest.items()}
            lines = [f"study     {self.count} trials by {self.sampler} over {self._space()}"]
            lines.append(
                f"          at most {price.line(dearest)} a trial, {price.line(each)} in all, in steps"
            )
            rows: list[dict[str, Any]] = [{"trials": self.count, **dearest}]
        else:
            rows, sums = [], []
            lines = [f"study     {len(self.grid)} trials"]
            for settings in self.grid:
                sums.append(self._price(settings))
                paid = self.cap is None or price.total(sums)[self.cap.key] <= self.cap.amount
                note = "" if paid else "   the cap does not pay for it"
                lines.append(f"  {trials.name(settings)}: {price.line(sums[-1])}{note}")
                rows.append({"name": trials.name(settings), "settings": settings, "paid": paid, **sums[-1]})
            each = price.total(sums)
            lines.append(f"sum       {price.line(each)}, in steps alone; {self.pricer.compilations} compiled")
        best = "highest" if self.maximize else "lowest"
        lines.append(f"metric    {self.metric}, the {best} is best")
        if self.cap and each[self.cap.key] > self.cap.amount:
            lines.append(
                f"cap       {self.args.cap} is less than the sum: the study will end before its last trial"
            )
        return {"table": lines, "rows": rows, "total": each}

    def _space(self) -> str:
        values = [f"{key} {', '.join(v)}" for key, v in self.space.values.items()]
        return "; ".join([*(f"{key} {r}" for key, r in self.space.ranges.items()), *values])

    def _results(self, study: Any, runner: Any, code: int) -> int:
        from bigmodel.study import compare, price

        rows = study.rows()
        groups = compare.groups(study.results(), self.maximize)
        print("\n".join(compare.table(groups, self.metric)))
        states = {
            state: sum(row.state == state for row in rows) for state in dict.fromkeys(r.state for r in rows)
        }
        spent = runner.spent()
        print(f"trials    {', '.join(f'{n} {state}' for state, n in states.items())}")
        print(f"spent     {price.line(spent)}")
        if runner.unpaid:
            print(f"cap       {self.args.cap} does not pay for {runner.unpaid}: a larger --cap goes on")
        self._write({
            "trials": [{**vars(row), "directory": str(row.directory)} for row in rows],
            "groups": [vars(group) for group in groups], "spent": spent, "metric": self.metric,
        })  # fmt: skip
        return code or (FAILED if states.get("failed") else CAPPED if runner.unpaid else 0)

    def _write(self, value: dict[str, Any]) -> None:
        if self.args.json:
            from bigmodel import disk

            self.args.json.write_text(json.dumps(disk.without_nan(value), indent=2) + "\n", encoding="utf-8")


def _search(text: str) -> tuple[str, int]:
    if not text:
        return "", 0
    found = re.fullmatch(r"(tpe|random):(\d+)", text)
    if not found or int(found[2]) < 1:
        raise InputError(f"--search={text}: give tpe:N or random:N, with N trials, 1 or more")
    return found[1], int(found[2])


def _text(each: Any, high: bool) -> str:
    value = each.high if high else each.low
    return str(int(value)) if each.integer else f"{value:.6g}"


def _named(settings: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


if __name__ == "__main__":
    cli.run(main)
