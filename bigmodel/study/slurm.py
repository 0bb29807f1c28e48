"""A study as a job array of SLURM: a task of the array runs one trial, on the node that it gets.

The tasks work on one study as any hosts do: each takes the next trial from the study's storage.
"""

from __future__ import annotations

import pathlib
import shlex
import subprocess
from collections.abc import Sequence

from bigmodel.config import InputError
from bigmodel.study.sweep import Study

KEY = "slurm_job"  # of the study's attributes


def submit(
    study: Study, script: pathlib.Path, command: Sequence[str], count: int, at_once: int, flags: str = ""
) -> str:
    """Submits `count` tasks and returns the array's id. One that is queued or runs still is not repeated.

    Args:
        script: runs the command it is given as one task, and queues itself again where that exits with 75.
        command: runs one trial of the study.
        at_once: tasks that run at a time, at most.
        flags: for sbatch, as on a command line.

    Raises:
        InputError: SLURM is not here, or refuses the job.
    """
    job = study.study.user_attrs.get(KEY, "")
    if job and is_active(job):
        return str(job)
    logs = study.directory / "slurm"
    logs.mkdir(exist_ok=True)
    array = [f"--array=0-{count - 1}%{at_once}", f"--job-name={study.directory.name}"]
    job = _run(
        "sbatch",
        "--parsable",
        *array,
        f"--output={logs}/%A_%a.txt",
        *shlex.split(flags),
        str(script),
        *command,
    ).partition(";")[0]
    study.study.set_user_attr(KEY, job)
    return job


def is_active(job: str) -> bool:
    """True if a task of the array is queued or runs. Raises InputError: SLURM does not answer."""
    try:
        return bool(_run("squeue", "--noheader", f"--jobs={job}"))
    except InputError as error:
        if "Invalid job id" in str(error):  # ended long ago
            return False
        raise


def _run(*command: str) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise InputError(f"--on=slurm: {command[0]} is not installed on this host") from error
    if ran.returncode:
        raise InputError(f"--on=slurm: {command[0]} failed: {' '.join(ran.stderr.split())[:300]}")
    return ran.stdout.strip()
