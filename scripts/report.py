"""Writes a page about a run, several runs, or a study: one HTML file that needs no network.

    python scripts/report.py runs/124m --out=report.html
    python scripts/report.py runs/a runs/b runs/study --metric=eval/test/accuracy --out=report.html

A source is a workdir of train.py, or a directory of them, such as a study of sweep.py. train.py and sweep.py
write report.html into their directories themselves.
"""

from __future__ import annotations

import pathlib

import cli

from bigmodel.config import InputError


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("sources", nargs="+", type=cli.directory, metavar="RUN_OR_STUDY")
    flags.add_argument("--out", default="report.html", metavar="FILE", help="default: report.html")
    flags.add_argument(
        "--metric", default="", help="ranks the runs; a leading - : the lowest is best. Default: the loss"
    )
    flags.add_argument(
        "--assume", action="append", default=[], metavar="dollars_per_chip_hour=2", help="a price of your own"
    )
    args, rest = cli.parse(flags)
    if rest:
        raise InputError(f"--config.{rest[0]}: runs are reported as they were; leave it out")
    assumed = cli.assumptions(args.assume)
    if other := assumed.keys() - {"dollars_per_chip_hour"}:
        raise InputError(f"--assume={min(other)}: a page takes dollars_per_chip_hour alone; leave it out")
    out = pathlib.Path(args.out)
    if out.is_dir():
        raise InputError(f"--out={out} is a directory; name a file, such as {out / 'report.html'}")
    from bigmodel.study import report

    options = report.Options(args.metric, dollars_per_chip_hour=assumed.get("dollars_per_chip_hour"))
    page = report.collect([pathlib.Path(source) for source in args.sources], options)
    report.save(page, out)
    print(f"wrote {out}: {len(page.records)} {'run' if len(page.records) == 1 else 'runs'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
