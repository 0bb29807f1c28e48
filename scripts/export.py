"""Writes a trained model for others to read.

    python scripts/export.py --workdir=runs/124m --format=safetensors --out=DIR

safetensors: the parameters (their moving average, if the run has one) in Hugging Face's layout where there is
one, with a config.json that transformers loads; else under the names of this package.
"""

from __future__ import annotations

import cli

from bigmodel.config import InputError


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("--workdir", required=True, help="a run that scripts/train.py or import_hf.py made")
    flags.add_argument("--format", choices=("safetensors",), default="safetensors")
    flags.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    args, rest = cli.parse(flags)
    if rest:
        raise InputError(f"--config.{rest[0]}: the config comes from the workdir; leave it out")
    from bigmodel import transfer

    layout, *files = transfer.export_safetensors(args.workdir, args.out)
    print(f"exported  {layout}: {', '.join(files)} in {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
