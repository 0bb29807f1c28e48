"""Continues a prompt with a trained language model.

python scripts/generate.py --workdir=runs/toy --prompt="def main(" --length=200
"""

from __future__ import annotations

import pathlib

import cli
import numpy as np

from bigmodel.config import InputError


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("--workdir", required=True, help="a run that scripts/train.py made")
    flags.add_argument("--prompt", default="import ")
    flags.add_argument("--length", type=int, default=200, help="how many tokens to add")
    flags.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token, always")
    flags.add_argument("--top_k", type=int, default=40, help="draw from the k likeliest tokens only; 0: all")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    args, rest = cli.parse(flags)
    if rest:
        raise InputError(f"--config.{rest[0]}: the config comes from the workdir; leave it out")
    if args.length < 1 or args.temperature < 0 or args.top_k < 0:
        raise InputError("--length must be 1 or more, --temperature and --top_k 0 or more")
    from bigmodel import data, infer

    program, state = infer.load(args.workdir, args.step)
    if program.config.task.name != "lm":
        raise InputError(
            f"--workdir={args.workdir} holds a {program.config.model.name}, not a language model"
        )
    tokenizer = data.get_tokenizer(program.config, pathlib.Path(args.workdir))
    prompt = np.concatenate([[tokenizer.separator], tokenizer.encode(args.prompt)])
    ids = infer.sample(
        program, state, prompt, args.length, temperature=args.temperature, top_k=args.top_k, seed=args.seed
    )
    print(args.prompt + tokenizer.decode(ids))
    return 0


if __name__ == "__main__":
    cli.run(main)
