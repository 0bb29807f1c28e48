"""Continues prompts with a trained language model, or answers them with a trained T5.

python scripts/generate.py --workdir=runs/toy --prompt="def main(" --length=200 --stop="\n\n"
"""

from __future__ import annotations

import dataclasses

import cli

from bigmodel.config import InputError


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("--workdir", required=True, help="a run that scripts/train.py made")
    flags.add_argument("--prompt", action="append", help="may be given several times; default: 'import '")
    flags.add_argument("--length", type=int, default=200, help="how many tokens to add, at most")
    flags.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token, always")
    flags.add_argument("--top_k", type=int, default=40, help="draw from the k likeliest tokens only; 0: all")
    flags.add_argument("--top_p", type=float, default=1.0, help="from the likeliest that have this share")
    flags.add_argument("--min_p", type=float, default=0.0, help="from those this likely beside the likeliest")
    flags.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1: what occurred is rarer"
    )
    flags.add_argument(
        "--stop", action="append", default=[], help="text that ends the answer, left out of it"
    )
    flags.add_argument("--cache_dtype", default="", choices=["", "int8"], help="of keys and values")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    args, rest = cli.parse(flags)
    if rest:
        raise InputError(f"--config.{rest[0]}: the config comes from the workdir; leave it out")
    if args.length < 1:
        raise InputError(f"--length={args.length}: set it to 1 or more")
    from bigmodel import infer, sampling

    keys = [field.name for field in dataclasses.fields(sampling.Sampling)]
    settings = sampling.Sampling(**{key: getattr(args, key) for key in keys}).check()
    prompts = args.prompt or ["import "]
    writer = infer.Writer.load(args.workdir, args.step, cache_dtype=args.cache_dtype)
    for prompt, text in zip(prompts, writer.write(prompts, args.length, settings, args.stop), strict=True):
        print(prompt + text if writer.continues else text)
    return 0


if __name__ == "__main__":
    cli.run(main)
