"""Studies that hosts share: a real PostgreSQL and a real SLURM (Debian's postgresql, slurm-wlm and munge)."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from conftest import ROOT, run_script
from test_sweep import HOST, TOY, fake, starts

from bigmodel.study import trials
from bigmodel.study.order import Definition
from bigmodel.study.sweep import Study

pytestmark = pytest.mark.slow

SLURM = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
SlurmdPort={second}
AuthType=auth/munge
AuthInfo=socket={path}/munge/socket
CredType=cred/munge
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/slurmd.pid
SlurmctldLogFile={path}/slurmctld.log
SlurmdLogFile={path}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MinJobAge=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _until(condition, limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory) -> Iterator[str]:
    """The URL of an empty database."""
    found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="needs psycopg: pip install -e '.[study]'")
    folder, port = tmp_path_factory.mktemp("postgres"), _port()
    user = []
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        user = ["runuser", "-u", "postgres", "--"]
        for each in (folder, *folder.parents[:2]):
            each.chmod(0o755)
        shutil.chown(folder, "postgres")
    server = [*user, str(found[-1].with_name("pg_ctl")), "-D", str(folder / "data"), "-w"]
    make = [*user, str(found[-1]), "-D", str(folder / "data"), "-A", "trust", "-U", "me"]
    subprocess.run(make, check=True, capture_output=True, cwd="/")
    options = f"-p {port} -k {folder} -h 127.0.0.1"
    start = [*server, "-l", str(folder / "log"), "-o", options, "start"]
    subprocess.run(start, check=True, stdout=subprocess.DEVNULL, cwd="/")
    yield f"postgresql://me@127.0.0.1:{port}/postgres"
    subprocess.run([*server, "-m", "immediate", "stop"], check=True, capture_output=True, cwd="/")


def test_hosts_share_a_study_in_postgresql_and_one_is_killed(tmp_path, postgres):
    command = fake(tmp_path, "--config.evaluations=6", "--config.sleep=0.15")
    host = [sys.executable, "-c", HOST, str(tmp_path / "study"), postgres, *command({})]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    first, second = (subprocess.Popen(host, env=env, stdout=subprocess.DEVNULL) for _ in range(2))
    _until(lambda: len(list((tmp_path / "study").glob("x=*/metrics.jsonl"))) >= 2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=120) == 0
    for i in range(5):
        lines = (tmp_path / "study" / f"x={i}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]  # each evaluation once
    definition = Definition("configs/mlp.py", (), "eval/test/loss", False)
    made = Study(tmp_path / "study", definition, trials.parse(["x=0:5"]), postgres)
    assert [row.state for row in made.rows()] == ["complete"] * 5
    assert len(starts(tmp_path)) == 6  # and one that was killed


def test_a_storage_that_does_not_answer_is_named(tmp_path):
    flags = [f"--study={tmp_path / 's'}", "--over=seed=0:2", "--steps_alone"]
    ran = run_script("sweep.py", *TOY, *flags, f"--storage=postgresql://me@127.0.0.1:{_port()}/none")
    assert ran.code == 2
    assert "--storage=postgresql://" in ran.err
    assert len(ran.err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Environment of a cluster of one node: this machine."""
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))) or os.getuid() != 0:
        pytest.skip("needs SLURM, and root to start it: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(os.urandom(64))
    (folder / "munge" / "key").chmod(0o400)
    host, conf = socket.gethostname().partition(".")[0], folder / "slurm.conf"
    conf.write_text(
        SLURM.format(host=host, path=folder, port=_port(), second=_port(), cpus=len(os.sched_getaffinity(0)))
    )
    files = {"key": "key-file", "socket": "socket", "pid": "pid-file", "log": "log-file", "seed": "seed-file"}
    munge = [f"--{flag}={folder}/munge/{name}" for name, flag in files.items()]
    env = {**os.environ, "SLURM_CONF": str(conf)}
    daemons = [
        subprocess.Popen(command, env=env)
        for command in (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"])
    ]
    _until(lambda: b"idle" in subprocess.run(["sinfo"], env=env, capture_output=True, check=False).stdout)
    yield {"SLURM_CONF": str(conf)}
    subprocess.run(["scancel", "--partition=main"], env=env, check=True)
    _until(lambda: not _queue({"SLURM_CONF": str(conf)}))
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait()


def _queue(env: dict[str, str]) -> str:
    command = ["squeue", "--noheader", "--format=%i %T"]
    return subprocess.run(
        command, env={**os.environ, **env}, check=True, capture_output=True, text=True
    ).stdout


def test_a_study_is_a_job_array_and_a_trial_that_is_preempted_goes_on(tmp_path, slurm):
    args = ["sweep.py", *TOY, f"--study={tmp_path / 's'}", "--over=seed=0:3", f"--json={tmp_path / 'r.json'}"]
    args += ["--config.steps=20000", "--on=slurm", "--jobs=1", "--target=v5e:1x1"]
    ran = run_script(*args, env=slurm, limit_s=400)
    assert ran.code == 0, ran.err
    assert "3 trials left" in ran.out
    job = ran.out.split("job ")[1].partition(",")[0]
    _until(lambda: any(path.stat().st_size for path in (tmp_path / "s").glob("seed=0/metrics.jsonl")))
    kill = ["scancel", "--signal=TERM", "--batch", f"{job}_0"]
    signaller = subprocess.Popen(kill, env={**os.environ, **slurm}, stderr=subprocess.DEVNULL)
    _until(lambda: "was stopped" in (tmp_path / "s" / "slurm" / f"{job}_0.txt").read_text())
    signaller.kill()  # scancel tries again and again to signal a task that is queued again
    signaller.wait()
    again = run_script(*args, env=slurm, limit_s=400)  # while it runs: nothing is submitted twice
    assert f"job {job}," in again.out
    _until(lambda: not _queue(slurm), 500)
    done = run_script(*args, env=slurm, limit_s=400)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["state"] for row in found["trials"]] == ["complete"] * 3
    for seed in range(3):
        ledger = json.loads((tmp_path / "s" / f"seed={seed}" / "ledger.json").read_text())
        assert ledger["steps"] == 20000
        assert len(ledger["sessions"]) == (2 if seed == 0 else 1)


@pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="needs the .venv of scripts/test.sh")
def test_a_job_of_slurm_trains_under_supervision(tmp_path, slurm):
    script = str(ROOT / "scripts/launch/slurm.sh")
    job = [
        "sbatch",
        "--wait",
        f"--output={tmp_path / 'out.txt'}",
        script,
        *TOY,
        f"--workdir={tmp_path / 'run'}",
    ]
    ran = subprocess.run(job, env={**os.environ, **slurm}, cwd=ROOT, check=False, timeout=400)
    assert ran.returncode == 0, (tmp_path / "out.txt").read_text()
    assert json.loads((tmp_path / "run" / "ledger.json").read_text())["steps"] == 4
    assert (tmp_path / "run" / "events.jsonl").exists()


def test_without_slurm_the_flag_is_named(tmp_path):
    flags = [f"--study={tmp_path / 's'}", "--over=seed=0:2", "--on=slurm"]
    ran = run_script("sweep.py", *TOY, *flags, env={"PATH": str(pathlib.Path(sys.executable).parent)})
    assert ran.code == 2
    assert "--on=slurm: sbatch is not installed" in ran.err
