"""Downloads a TFDS dataset and writes it as array_record, the format that training reads.

    python scripts/prepare_data.py --name=mnist --data_dir=~/tensorflow_datasets

Most datasets need TensorFlow for this one step (pip install tensorflow); training never does. Bundled ones
(python_source, digits) need neither it nor the network.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from bigmodel.config import InputError
from bigmodel.data.builders.prepare import prepare


def main() -> int:
    """Exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="a TFDS name such as mnist or glue/cola:2.0.0")
    parser.add_argument("--data_dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(prepare(args.name, os.path.expanduser(args.data_dir) if args.data_dir else None))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
