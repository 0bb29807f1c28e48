"""Checks in under a minute that a job can run: start it on every host, as scripts/train.py would be.

    python scripts/preflight.py --config=configs/gpt.py:size=1.5b --workdir=/shared/run

The hosts' code, versions, config, clocks, coordinator, workdir (a tiny save and restore), data, free disk and
memory, and one step. A failure is one line that names the host; exit code 2.
"""

import os
import pathlib
import sys

import cli

from bigmodel import config as config_lib
from bigmodel.fleet import supervise
from bigmodel.training import ending


def main() -> int:
    end = ending.take_over()
    flags = cli.parser(__doc__)
    cli.add_config(flags)
    flags.add_argument("--workdir", required=True, type=cli.directory, help="the run's directory")
    args, overrides = cli.parse(flags)
    config = config_lib.load(args.config, overrides)
    from bigmodel import log, mesh
    from bigmodel.fleet import preflight

    log.show_libraries(False)
    host, hosts = supervise.place(os.environ)
    if hosts > 1:
        preflight.call_together(pathlib.Path(args.workdir), host, hosts)
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        preflight.reach(address, host)
    mesh.join_cluster()
    end.join()
    for line in preflight.check(config, pathlib.Path(args.workdir), thorough=True):
        cli.say(f"preflight {line}")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    cli.run(main)
