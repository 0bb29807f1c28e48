"""Continues prompts with a trained language model, or answers them with a trained T5.

python scripts/generate.py --workdir=runs/toy --prompt="def main(" --length=200 --stop="\n\n"

Settings without a flag come from an imported model's generation_config.json, else 200 tokens at temperature
0.8 among the 40 most likely.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

import cli

from bigmodel.config import InputError

if TYPE_CHECKING:
    import numpy as np

    from bigmodel.infer import generate, sampling


USUAL = {"temperature": 0.8, "top_k": 40}  # where neither a flag nor an imported model says it


def main() -> int:
    flags = cli.workdir_parser(__doc__)
    flags.add_argument("--prompt", action="append", help="may be given several times; default: 'import '")
    flags.add_argument("--length", type=int, help="how many tokens to add, at most")
    flags.add_argument("--temperature", type=float, help="0: always the most likely token")
    flags.add_argument("--top_k", type=int, help="draw from the k most likely tokens only; 0: all")
    flags.add_argument(
        "--top_p", type=float, help="draw from the most likely tokens that together have this probability"
    )
    flags.add_argument(
        "--min_p",
        type=float,
        help="draw from tokens with at least this share of the most likely one's probability",
    )
    flags.add_argument(
        "--repetition_penalty", type=float, help="above 1: tokens that occurred become less likely"
    )
    flags.add_argument(
        "--stop", action="append", default=[], help="ends the answer, and is left out of it; \\n: a line feed"
    )
    flags.add_argument("--beams", type=int, default=0, help="above 0: beam search for the most likely answer")
    flags.add_argument("--draft", help="a small model's run, of the same vocabulary, that proposes tokens")
    flags.add_argument(
        "--cache_dtype", default="", choices=["", "int8"], help="dtype of cached keys and values"
    )
    flags.add_argument("--seed", type=int, help="gives the same text each time; default: a new one")
    args, _ = cli.parse_workdir(flags)
    if args.length is not None and args.length < 1:
        raise InputError(f"--length={args.length}: set it to 1 or more")
    if args.beams < 0 or (args.beams and args.draft):
        raise InputError(f"--beams={args.beams}: set it to 0 or more, and to 0 with --draft")
    from bigmodel.infer import generate, sampling

    keys = [field.name for field in dataclasses.fields(sampling.Sampling)]
    asked = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    sampling.Sampling(**asked).check()
    prompts = args.prompt or ["import "]
    writer = generate.Writer.load(args.workdir, args.step, cache_dtype=args.cache_dtype)
    theirs = writer.drawing
    args.length = args.length or theirs.pop("max_new_tokens", 200)
    settings = sampling.Sampling(**((theirs or USUAL) | asked)).check()
    if args.beams or args.draft:
        before = [writer.encode(prompt) if writer.continues else () for prompt in prompts]
        made = zip(answers(writer, prompts, settings, args), before, strict=True)
        texts = [writer.decode(ids, args.stop, prompt)[0] for ids, prompt in made]
    else:
        each = [sampling.of_answer(settings, index) for index in range(len(prompts))]
        texts = writer.write(prompts, args.length, each, args.stop)
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text if writer.continues else text)
    return 0


def answers(
    writer: generate.Writer, prompts: list[str], settings: sampling.Sampling, args: argparse.Namespace
) -> list[np.ndarray]:
    """Ids by beam search, or with a draft's proposals."""
    from bigmodel.infer import generate
    from bigmodel.infer.beam import BeamSearch
    from bigmodel.infer.speculative import Speculative

    ids = [writer.encode(prompt).tolist() for prompt in prompts]
    if args.beams:
        return [beams[0] for beams in BeamSearch(writer.decoder, args.beams).generate(ids, args.length)[0]]
    draft = generate.Writer.load(args.draft)
    if draft.tokenizer.fingerprint != writer.tokenizer.fingerprint:
        raise InputError(
            f"--draft={args.draft} reads and writes by {draft.tokenizer.fingerprint}, --workdir by "
            f"{writer.tokenizer.fingerprint}; give a run with the same tokenizer"
        )
    answer = Speculative(writer.decoder, draft.decoder).generate(ids, args.length, settings)
    print(f"{answer.passes} passes, {answer.accepted:.0%} of the draft's tokens accepted", file=sys.stderr)
    return answer.ids


if __name__ == "__main__":
    cli.run(main)
