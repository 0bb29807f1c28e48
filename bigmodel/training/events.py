"""Events of a run, one JSON object a line in WORKDIR/events.jsonl, appended by every host of a job.

Every line has `time` (seconds since 1970), `host` (the process's number in the job) and `event`:

    started     attempt, hosts (numbers of those that train), pid
    ended       attempt, code (exit code; minus the signal's number), line (why, for people), step
    stalled     attempt, phase, waited_s, limit_s, stacks (a file in the workdir: of all threads)
    signal      name, step
    restarting  attempt (the next one), in_s, checkpoint (newest step), failures (since a newer checkpoint),
                line (why), failed (the host where it began, also one that is lost)
    gave_up     line
    finished    code, line
    skipped     step, loss, grad_norm: training.on_divergence left this batch out
    rewound     step, to_step, why, skip (the first and the last step whose data are left out)

`step` counts the training steps done. Fields may be added; none changes its meaning.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from typing import Any

FILE = "events.jsonl"


def append(workdir: pathlib.Path, host: int, event: str, **fields: Any) -> None:
    """Appends one event. Does nothing where there is no workdir, or it cannot be written."""
    line = json.dumps({"time": round(time.time(), 3), "host": host, "event": event, **fields}) + "\n"
    with contextlib.suppress(OSError):
        file = os.open(workdir / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the events in the order of the file, without a line that a kill cut short."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (workdir / FILE).read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    found.append(event)
    return found
