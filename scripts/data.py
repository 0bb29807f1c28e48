"""Shows what a config would be trained on, and trains nothing: how much there is and how it was divided,
lengths and padding, classes, examples as people read them, and a batch of images as training sees it.

    python scripts/data.py --config=configs/mlp.py:data=table:people.csv --config.data.label=income
    python scripts/data.py --config=configs/cnn.py --out=runs/look
"""

from __future__ import annotations

import pathlib

import cli

from bigmodel import config as config_lib


def main() -> int:
    flags = cli.parser(__doc__)
    cli.add_config(flags)
    flags.add_argument("--out", type=pathlib.Path, metavar="DIR", help="the picture of a batch goes here")
    args, overrides = cli.parse(flags)
    config = config_lib.load(args.config, overrides)
    from bigmodel import log, preview

    log.show_logging()
    preview.show(config, args.out, log.say)
    return 0


if __name__ == "__main__":
    cli.run(main)
