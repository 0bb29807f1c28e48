"""Rivals timed in turn: each a process of its own, so that the machine's drift hits all alike.

A script's `rival(case, name)` makes what is run; `work` serves it to the script that started the process, and
`compare` runs some rivals of a case round by round, in their order and then in the reverse.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bigmodel.config import InputError

Rivals = Mapping[str, Sequence[str]]  # of each case
WORKER = "--worker="  # the flag of a process that serves one rival: --worker=CASE:RIVAL
ROOT = pathlib.Path(__file__).resolve().parents[2]


class Rival(NamedTuple):
    run: Callable[[], Any]  # does the work once, or starts it
    parameters: int = 0  # how many are trained; 0: not to be compared
    wait: Callable[[Any], Any] = lambda last: last  # for what `run` gave last
    warm: int = 3  # runs before the first that counts


def names_of(rivals: Rivals) -> list[str]:
    return list(dict.fromkeys(name for of_case in rivals.values() for name in of_case))


def add_flags(flags: argparse.ArgumentParser, rivals: Rivals, rounds: int) -> None:
    flags.add_argument("--cases", default=",".join(rivals), help="comma-separated")
    flags.add_argument(
        "--rivals", default=",".join(names_of(rivals)), help="comma-separated; the first is the measure"
    )
    flags.add_argument("--rounds", type=int, default=rounds)
    flags.add_argument("--json", type=pathlib.Path, help="write the figures here too")


def chosen(args: argparse.Namespace, rivals: Rivals, needs: Mapping[str, Sequence[str]]) -> Rivals:
    """-> {case: its rivals} as the flags say; without PyTorch's, where a package it needs is missing.

    Raises:
        InputError: an unknown name, or a case without a rival.
    """
    known = {"cases": list(rivals), "rivals": names_of(rivals)}
    for flag, names in known.items():
        for name in getattr(args, flag).split(","):
            if name not in names:
                raise InputError(f"--{flag}={name!r} is unknown; choose from {', '.join(names)}")
    if args.rounds < 1:
        raise InputError(f"--rounds={args.rounds}: set it to 1 or more")
    found: dict[str, list[str]] = {}
    for case in args.cases.split(","):
        found[case] = [name for name in args.rivals.split(",") if name in rivals[case]]
        missing = [name for name in needs[case] if importlib.util.find_spec(name) is None]
        if missing and any(name.startswith("torch") for name in found[case]):
            print(f"{case}: not installed, so PyTorch is left out: pip install {' '.join(missing)}")
            found[case] = [name for name in found[case] if not name.startswith("torch")]
        if not found[case]:
            known_there = ", ".join(rivals[case])
            raise InputError(f"--rivals={args.rivals}: none is of {case}; choose from {known_there}")
    return found


def work(case: str, name: str, make: Callable[[str, str], Rival]) -> None:
    """A worker: for each number read, runs the rival so many times and answers what that took, in JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the rival prints must not mix with the answers
    began = time.perf_counter()
    rival = make(case, name)
    for _ in range(rival.warm):
        rival.wait(rival.run())
    start_s = time.perf_counter() - began
    answers.write(json.dumps({"start_s": start_s, "parameters": rival.parameters}) + "\n")
    for line in sys.stdin:
        count, before, began = int(line), resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(count):
            last = rival.run()
        rival.wait(last)  # work is dispatched ahead; none may run on into another's turn
        time_s = (time.perf_counter() - began) / count
        after = resource.getrusage(resource.RUSAGE_SELF)
        faults = (after.ru_minflt - before.ru_minflt) / count
        row = {"time_s": time_s, "faults": faults, "peak_mib": after.ru_maxrss / 1024}
        answers.write(json.dumps(row) + "\n")


def compare(script: str, case: str, rivals: Sequence[str], rounds: int, count: int) -> dict[str, Any]:
    """Runs the rivals of a case in turn, `count` times a round -> {rival: medians over the rounds}.

    Raises:
        InputError: a rival failed, or trains another number of parameters than the first.
    """
    workers: dict[str, subprocess.Popen[str]] = {}
    starts: dict[str, dict[str, Any]] = {}
    rows: dict[str, list[dict[str, float]]] = {rival: [] for rival in rivals}
    with tempfile.TemporaryFile("w+") as said:
        try:
            for rival in rivals:
                command = [sys.executable, script, f"{WORKER}{case}:{rival}"]
                pipe = subprocess.PIPE
                workers[rival] = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True)
                starts[rival] = _answer(workers[rival], rival, case, said)
                a, b = (starts[name]["parameters"] for name in (rival, rivals[0]))
                if a and b and a != b:
                    raise InputError(f"{case}: {rival} has {a:,} parameters, {rivals[0]} {b:,}")
            for index in range(rounds):
                for rival in rivals if index % 2 == 0 else reversed(rivals):
                    workers[rival].stdin.write(f"{count}\n")  # type: ignore[union-attr]
                    workers[rival].stdin.flush()  # type: ignore[union-attr]
                    rows[rival].append(_answer(workers[rival], rival, case, said))
        finally:
            for worker in workers.values():
                worker.communicate()
    return {rival: _medians(rows[rival], rows[rivals[0]]) | starts[rival] for rival in rivals}


def _answer(worker: subprocess.Popen[str], rival: str, case: str, said: Any) -> dict[str, Any]:
    line = worker.stdout.readline()  # type: ignore[union-attr]
    if not line:
        said.seek(0)
        sys.stderr.write(said.read())
        raise InputError(f"--rivals: {rival} failed on {case}, as shown above; leave it out")
    return json.loads(line)


def _medians(rows: list[dict[str, float]], measure: list[dict[str, float]]) -> dict[str, Any]:
    ratios = [a["time_s"] / b["time_s"] for a, b in zip(rows, measure, strict=True)]
    return {
        "time_s": statistics.median(row["time_s"] for row in rows),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "faults": statistics.median(row["faults"] for row in rows),
        "peak_mib": max(row["peak_mib"] for row in rows),
    }


def show(title: str, results: dict[str, Any], per_s: tuple[str, int] | None = None) -> None:
    """Prints the figures of a case; `per_s`: what one run makes, and how many of them."""
    first, rate = next(iter(results)), f"{per_s[0] + '/s':>12}" if per_s else ""
    print(f"\n{title:<20}{'ms':>10}{'x ' + first:>10}{'range':>14}{'faults':>10}{'peak MiB':>10}{rate}")
    for rival, r in results.items():
        low, high = r["ratio_range"]
        rate = f"{per_s[1] / r['time_s']:>12.1f}" if per_s else ""
        print(
            f"  {rival:<18}{1e3 * r['time_s']:>10.1f}{r['ratio']:>10.3f}{f'{low:.2f}-{high:.2f}':>14}"
            f"{r['faults']:>10.0f}{r['peak_mib']:>10.0f}{rate}",
            flush=True,
        )


def worker_of(argv: Sequence[str]) -> tuple[str, str] | None:
    """(case, rival) of a process that `compare` started; None: it is the script itself."""
    if not argv[-1].startswith(WORKER):
        return None
    case, _, rival = argv[-1].removeprefix(WORKER).rpartition(":")
    return case, rival
