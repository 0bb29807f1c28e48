"""Trains a config, or resumes from the newest checkpoint in the workdir.

    python scripts/train.py --config=configs/gpt.py:size=124m,seq_len=1024 --config.optim.lr=3e-4 \\
        --workdir=DIR

Exit codes: 0 done; 2 bad input, no memory or no room; 3 the loss is not finite; 4 the program compiled for
this mesh is wrong (see config.check.gradient); 75 stopped by SIGTERM, run again to resume; 130 stopped by
Ctrl-C, likewise.

Before the first step a signal ends the run at once. Later the step is finished and saved, an evaluation is
abandoned, and a read gets 5 s more. A step that takes longer than a minute plus twice the longest one is not
saved. A second signal ends the run at once. If one host of a job fails, the others end with its exit code and
its line.

--supervise starts it as a child, on every host of a job: it is watched, and started again where it hangs or
dies (docs/GUIDE.md, "Fleets").
"""

import argparse
import os
import pathlib
import signal
import sys

if __name__ == "__main__":  # until bigmodel/training/ending.py listens
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


import cli

from bigmodel import config as config_lib
from bigmodel.training import ending
from bigmodel.training.heartbeat import LIMITS, Heartbeat


def main() -> int:
    flags = cli.parser(__doc__)
    cli.add_config(flags)
    flags.add_argument("--workdir", required=True, type=cli.directory, help="the run's directory")
    flags.add_argument(
        "--resume", choices=("auto", "never", "must"), default="auto", help="auto: if there is a checkpoint"
    )
    flags.add_argument("--force", action="store_true", help="start even if it takes more memory than is free")
    flags.add_argument("--verbose", action="store_true", help="show the libraries' own messages too")
    flags.add_argument("--supervise", action="store_true", help="watch the run, and restart it if it dies")
    flags.add_argument(
        "--restarts", type=int, default=5, help="of --supervise: at most so many without a newer checkpoint"
    )
    flags.add_argument(
        "--limits", type=cli.limits(LIMITS), default={}, metavar="PHASE=SECONDS,...",
        help="of --supervise: seconds without progress; "
        + " ".join(f"{key}={value:g}" for key, value in LIMITS.items()),
    )  # fmt: skip
    flags.add_argument(
        "--elastic", type=float, nargs="?", const=60.0, metavar="SECONDS",
        help="of --supervise: after so many seconds (60) without a host go on without it, on another mesh",
    )  # fmt: skip
    flags.add_argument("--supervised", type=cli.numbers, default=(), help=argparse.SUPPRESS)
    args, overrides = cli.parse(flags)
    if args.supervise and not args.supervised:
        return supervise(args)
    end = ending.take_over(Heartbeat(*map(int, args.supervised[:2]), *args.supervised[2:]))
    config = config_lib.load(args.config, overrides)
    cli.say(f"start     {config.model.name} on {config.data.name} in {args.workdir}")
    from bigmodel import log, selfcheck, train  # JAX, Flax and Orbax: only for a config that is sound
    from bigmodel.fleet import elastic, preflight

    log.show_libraries(args.verbose)
    preflight.before_run(config, pathlib.Path(args.workdir), end)
    try:
        if args.elastic is not None:
            config = elastic.refit(config, pathlib.Path(args.workdir))
        return train.run(config, args.workdir, args.resume, force=args.force, end=end, at_end=_page).exit_code
    except train.NotFinite as error:
        return cli.fail(error, train.NOT_FINITE)
    except selfcheck.WrongProgram as error:
        return cli.fail(error, train.WRONG_PROGRAM)


def _page(directory: pathlib.Path) -> None:
    from bigmodel.study import report  # SciPy, Plotly: not before the run has ended

    report.write_at_end(directory)


def supervise(args: argparse.Namespace) -> int:
    """Runs this command again as a child."""
    from bigmodel.fleet import supervise
    from bigmodel.fleet.orders import Policy

    for flag in ("restarts", "elastic"):
        if (value := getattr(args, flag) or 0) < 0:
            raise config_lib.InputError(f"--{flag}={value:g}: give 0 or more")
    options = supervise.Options(Policy(args.restarts, args.elastic), {**LIMITS, **args.limits})
    command = [sys.executable, *sys.orig_argv[1:]]
    return supervise.run(command, pathlib.Path(args.workdir), options, os.environ)


if __name__ == "__main__":
    cli.run(main)
