"""Chooses the run that a budget is best spent on: parameters, tokens, batch, mesh, remat and microbatches.

    python scripts/budget.py --config=configs/gpt.py:seq_len=1024 --target=v5e:16x16 --budget='$5000'
    python scripts/budget.py --config=configs/gpt.py --target=cpu --budget=30min --law=law.json

A scaling law (law.json of scripts/laws.py, or published coefficients by their name) predicts the loss of what
the budget buys of each size, priced by the target's compiler. Prints ranked choices and commands to paste.
Budgets: 2h, 512chip-hours, $50, 3kwh, 1e18flop. Targets are those of scripts/plan.py.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shlex
import sys

import cli

from bigmodel import config as config_lib
from bigmodel.config import InputError
from bigmodel.machines import accelerators


def main() -> int:
    flags = cli.parser(__doc__)
    cli.add_config(flags)
    flags.add_argument("--budget", required=True, help="2h, 512chip-hours, $50, 3kwh or 1e18flop")
    flags.add_argument("--target", default="", help="e.g. v5e:16x16; without it, the devices of this machine")
    flags.add_argument("--law", default="besiroglu2024", help="law.json, besiroglu2024 or hoffmann2022")
    flags.add_argument("--group", default="", help="of a law.json that has several laws, the one to use")
    flags.add_argument("--compile", type=int, default=4, metavar="N", help="sizes to compile, at most")
    flags.add_argument("--assume", action="append", default=[], metavar="KEY=VALUE", help="as plan.py's")
    flags.add_argument("--json", type=pathlib.Path, help="write the choices here too")
    args, items = cli.parse(flags)
    if args.target:
        accelerators.keep_to_cpu()
    cap, assume = cli.cap(args.budget, "--budget"), cli.assumptions(args.assume)
    from bigmodel.study import budget

    if cap is None or args.compile < 1:
        raise InputError("--budget and --compile must be above 0, such as --budget=2h --compile=4")
    law = budget.read_law(args.law, args.group)
    given = [item.partition("=")[0] for item in items]
    if chosen := [key for key in given if key in budget.CHOSEN or key.startswith("mesh.")]:
        raise InputError(f"--config.{chosen[0]}: scripts/budget.py chooses it; leave it out")

    def load(settings: dict[str, str]) -> config_lib.Config:
        return config_lib.load(args.config, [*items, *(f"{key}={value}" for key, value in settings.items())])

    say = functools.partial(print, file=sys.stderr, flush=True)
    market = budget.Market(load, args.target, assume, say)
    if "batch_size" in given:
        market.keys["batch_size"] = str(market.base.batch_size)
    with cli.patience("pricing"):
        choice = budget.choose(market, law, cap, args.compile)
    best = budget.settings(choice.best, market.base) | {"budget": args.budget}
    best |= {f"assume.{key}": f"{value:g}" for key, value in assume.items()}
    command = [f"--config={args.config}", *(f"--config.{item}" for item in items)]
    command += [f"--config.{key}={value}" for key, value in best.items()]
    train = shlex.join(["python", "scripts/train.py", *command, "--workdir=runs/budget"])
    plan = shlex.join(
        ["python", "scripts/plan.py", *command, *([f"--target={args.target}"] if args.target else [])]
    )
    print("\n".join(budget.table(choice, law, cap, args.target)))
    print(f"plan      {plan}\ntrain     {train}")
    if args.json:
        rows = [budget.plain(offer, market.base) for offer in (*choice.compiled, *choice.others)]
        args.json.write_text(json.dumps({"choices": rows, "plan": plan, "train": train}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
