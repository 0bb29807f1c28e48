"""Makes a workdir of a model in Hugging Face's layout: config.json and safetensors.

    python scripts/import_hf.py --from=DIR --workdir=runs/gpt2
    python scripts/generate.py --workdir=runs/gpt2 --prompt="def main("

GPT-2, Llama, Mixtral, BERT, T5 (v1.0, v1.1), ViT and ResNet. Every tensor's name, shape and dtype is checked;
pickled weights are refused. A tokenizer.json beside them becomes the run's tokenizer. Keys of the config that
do not shape the model can be set: --config.data.name='text:*.txt'.
"""

from __future__ import annotations

import cli


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument(
        "--from", dest="source", required=True, metavar="DIR", help="config.json, *.safetensors"
    )
    flags.add_argument("--workdir", required=True, type=cli.directory, help="a new directory")
    args, overrides = cli.parse(flags)
    from bigmodel.checkpoint import transfer

    config = transfer.import_pretrained(args.source, args.workdir, overrides)
    print(f"imported  {args.source} as {config.model.name} into {args.workdir}")
    return 0


if __name__ == "__main__":
    cli.run(main)
