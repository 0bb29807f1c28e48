"""Exports a trained model as safetensors or StableHLO.

    python scripts/export.py --workdir=runs/124m --format=safetensors --out=DIR
    python scripts/export.py --workdir=runs/124m --format=stablehlo --out=DIR

safetensors: the parameters (their moving average, if the run has one) in Hugging Face's layout if there is
one, with a config.json that transformers loads; else under the names of this package.
stablehlo: the forward pass, and a language model's prefill and decode with a cache, for batches of any size
on CPU, GPU and TPU; the weights; and saved_model.py, which loads them and needs only jax and flatbuffers.
"""

from __future__ import annotations

import cli


def main() -> int:
    flags = cli.workdir_parser(__doc__, step=False)
    flags.add_argument("--format", choices=("safetensors", "stablehlo"), default="safetensors")
    flags.add_argument("--out", required=True, type=cli.directory, metavar="DIR", help="a new directory")
    args, _ = cli.parse_workdir(flags)
    if args.format == "stablehlo":
        from bigmodel.infer import export

        print(f"exported  {', '.join(export.stablehlo(args.workdir, args.out))} in {args.out}")
        return 0
    from bigmodel.checkpoint import transfer

    layout, *files = transfer.export_safetensors(args.workdir, args.out)
    print(f"exported  {layout}: {', '.join(files)} in {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
