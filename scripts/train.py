"""Trains a config, or goes on from the newest checkpoint in the workdir.

    python scripts/train.py --config=configs/gpt.py:size=124m,seq_len=1024 --config.optim.lr=3e-4 \\
        --workdir=DIR

Exit codes: 0 done; 2 bad input; 3 the loss is not finite; 75 stopped by SIGTERM, run again to resume.
"""

from __future__ import annotations

import sys

import cli

from bigmodel import config as config_lib


def main() -> int:
    flags = cli.parser(__doc__)
    cli.add_config(flags)
    flags.add_argument("--workdir", required=True, help="where the run is kept")
    flags.add_argument("--resume", choices=("auto", "never", "must"), default="auto")
    args, overrides = cli.parse(flags)
    config = config_lib.load(args.config, overrides)
    from bigmodel import train  # JAX, Flax and Orbax: only for a config that is sound

    try:
        return train.run(config, args.workdir, args.resume).exit_code
    except train.NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return train.NOT_FINITE


if __name__ == "__main__":
    cli.run(main)
