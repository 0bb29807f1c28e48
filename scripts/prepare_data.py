"""Downloads a TFDS dataset and writes it as array_record, the format that training reads.

python scripts/prepare_data.py --name=mnist --data_dir=$HOME/tensorflow_datasets

Most datasets need TensorFlow for this one step (pip install tensorflow); training never does. Bundled ones
(python_source, digits) need neither it nor the network.
"""

from __future__ import annotations

import logging

import cli

from bigmodel.config import InputError


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("--name", required=True, help="a TFDS name such as mnist or glue/cola:2.0.0")
    flags.add_argument("--data_dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    args, rest = cli.parse(flags)
    if rest:
        raise InputError(f"--config.{rest[0]}: this script reads no config; see --help")
    from bigmodel.data.builders.prepare import prepare

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it tells of every retry; the last error is enough
    print(prepare(args.name, args.data_dir))
    return 0


if __name__ == "__main__":
    cli.run(main)
