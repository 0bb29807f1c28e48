"""A fleet: what a leader orders, and supervisors of trainers that need no JAX."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

import jax
import pytest
from conftest import ROOT, finish, script_env, tiny

from bigmodel import mesh
from bigmodel.checkpoint.checkpoints import MARKER
from bigmodel.config import InputError
from bigmodel.fleet import elastic, orders, supervise
from bigmodel.fleet.board import Order, Report
from bigmodel.fleet.orders import Leader, Policy
from bigmodel.training import events
from bigmodel.training.heartbeat import Beat

# ------------------------------------------------------------------------------------------ a leader's orders


class Clock:
    """A leader of some hosts whose reports and time a test sets."""

    def __init__(self, hosts: int, **policy: object) -> None:
        self.now, self.newest = 100.0, None
        self.leader = Leader(hosts, Policy(**policy), self.now)  # type: ignore[arg-type]
        self.reports: dict[int, Report | None] = dict.fromkeys(range(hosts))

    def after(self, seconds: float, reports: Mapping[int, Report | None] | None = None) -> Order:
        self.reports |= reports or {}
        self.now += seconds
        return self.leader.decide(self.reports, lambda: self.newest, self.now)

    def start(self, attempt: int = 0, wait_s: float = 0.0) -> Order:
        ready = dict.fromkeys(self.reports, Report(attempt, "ready"))
        order = self.after(wait_s, ready)
        assert order == Order("go", attempt, tuple(self.reports))
        self.after(0, dict.fromkeys(self.reports, Report(attempt, "running")))
        return order

    def fail(self, host: int, code: int, attempt: int) -> Order:
        self.after(0, {host: Report(attempt, "ended", code, f"code {code}")})
        order = self.after(orders.SETTLE_S)
        self.after(0, dict.fromkeys(self.reports, Report(attempt, "ended", -9, "")))
        return order


def test_all_hosts_start_together():
    clock = Clock(3)
    assert clock.after(1, {0: Report(0, "ready"), 1: Report(0, "ready")}).kind == "wait"
    assert clock.after(1, {2: Report(7, "ready")}).kind == "wait"  # of another attempt
    assert clock.after(1, {2: Report(0, "ready")}) == Order("go", 0, (0, 1, 2))


def test_hosts_that_do_not_come_end_the_job_or_an_elastic_one_starts_without_them():
    clock = Clock(2)
    assert clock.after(orders.WAIT_S, {0: Report(0, "ready")}).kind == "wait"
    order = clock.after(1)
    assert (order.kind, order.final, order.code, "host 1" in order.line) == ("end", True, 75, True)
    clock = Clock(3, elastic_s=30.0, address="here:1")
    assert clock.after(orders.FIRST_S - 1, {0: Report(0, "ready"), 2: Report(0, "ready")}).kind == "wait"
    assert clock.after(2) == Order("go", 0, (0, 2), address="here:1")
    clock.reports = {0: Report(0, "running"), 1: Report(0, "ready"), 2: Report(0, "running")}
    clock.fail(2, -9, 0)
    assert clock.after(29, {0: Report(1, "ready"), 1: Report(1, "ready"), 2: None}).kind == "wait"
    assert clock.after(3) == Order("go", 1, (0, 1), address="here:1")  # host 1 came late and takes part now
    alone = Clock(2, elastic_s=30.0)
    assert (
        alone.after(orders.FIRST_S + 1, {1: Report(0, "ready")}).kind == "wait"
    )  # without the leader's host


@pytest.mark.parametrize("code", [2, 3, 4, 75, 130])
def test_these_codes_end_the_job_on_all_hosts(code):
    clock = Clock(2)
    clock.start()
    order = clock.fail(1, code, 0)
    assert (order.kind, order.final, order.code, order.host) == ("end", True, code, 1)


@pytest.mark.parametrize("code", [1, -9, -6, -11, 134])
def test_any_other_code_restarts_all_with_backoff_until_no_checkpoint_is_newer(code):
    clock = Clock(2, restarts=3)

    def fails(attempt: int, backoff_s: float) -> None:
        clock.start(attempt, wait_s=60)
        order = clock.fail(0, code, attempt)
        assert (order.kind, order.final) == ("end", False)
        ready = dict.fromkeys((0, 1), Report(attempt + 1, "ready"))
        assert clock.after(0, ready) == Order("wait", attempt + 1)
        assert clock.after(backoff_s - 0.1).kind == "wait"

    for attempt, backoff_s in enumerate((1, 2, 4)):
        fails(attempt, backoff_s)
    clock.newest = 7
    for attempt, backoff_s in enumerate((1, 2, 4), 3):
        fails(attempt, backoff_s)
    clock.start(6, wait_s=60)
    order = clock.fail(0, code, 6)
    assert (order.final, order.code) == (True, 1)
    assert "3 restarts without a newer checkpoint (newest: step 7)" in order.line


def test_a_killed_host_is_the_cause_of_errors_on_others():
    clock = Clock(3)
    clock.start()
    clock.after(0, {0: Report(0, "ended", 2, "checkpoint not written")})
    order = clock.after(0.5, {1: Report(0, "ended", -6, "aborted"), 2: Report(0, "ended", -9, "killed")})
    assert (order.final, order.host, order.line) == (False, 2, "killed")
    clock = Clock(2)  # an error whose host left first, so that JAX aborted the other
    clock.start()
    clock.after(0, {0: Report(0, "ended", -6, "aborted")})
    order = clock.after(0.5, {1: Report(0, "ended", 2, "record 7 is damaged")})
    assert (order.final, order.code, order.line) == (True, 2, "record 7 is damaged")


def test_a_host_that_is_lost_or_came_anew_restarts_all_and_one_that_is_done_waits():
    for report in (None, Report(-1, "ready")):
        clock = Clock(2)
        clock.start()
        clock.after(0, {1: report})
        order = clock.after(orders.SETTLE_S)
        assert (order.kind, order.final, order.host, "lost" in order.line) == ("end", False, 1, True)
    clock = Clock(2)
    clock.start()
    assert clock.after(500, {1: Report(0, "ended", 0)}).kind == "go"
    assert clock.after(500, {0: Report(0, "ended", 0)}).code == 0


# -------------------------------------------------------------------------------------------- supervisors

# A trainer: its first argument is code, in which `beat` is its heartbeat and `attempt` counts from 0.
TRAINER = """
import os, pathlib, sys, time, signal
from bigmodel.training.heartbeat import Heartbeat
pipe, stacks, waited = sys.argv[-1 if "--resume" not in sys.argv[-1] else -2].partition("=")[2].split(",")
beat, path, host = Heartbeat(int(pipe), int(stacks), float(waited)), pathlib.Path(sys.argv[1]), sys.argv[2]
(path / "config.json").touch()
attempt = len(list(path.glob(f"began-{host}-*")))
(path / f"began-{host}-{attempt}").write_text(f"{os.getpid()} {waited} {' '.join(sys.argv[3:])}")
def save(step):
    (path / "checkpoints" / str(step)).mkdir(parents=True)
    (path / "checkpoints" / str(step) / "commit_success.txt").touch()
"""
SUPERVISOR = """
import os, pathlib, sys, time
began = time.perf_counter()
from bigmodel.fleet import supervise
from bigmodel.fleet.orders import Policy
from bigmodel.training.heartbeat import LIMITS
assert "jax" not in sys.modules and "numpy" not in sys.modules
path, host, trainer, restarts, limit, elastic = sys.argv[1:]
policy = Policy(int(restarts), float(elastic) if elastic else None)
options = supervise.Options(policy, {**LIMITS, "least": float(limit), "start": float(limit)})
command = [sys.executable, "-c", trainer, path, host]
sys.exit(supervise.run(command, pathlib.Path(path), options, os.environ))
"""


def supervised(
    path: pathlib.Path,
    code: str,
    *,
    host: str = "0",
    hosts: int = 1,
    restarts: int = 2,
    limit: float = 60,
    elastic: float | str = "",
) -> subprocess.Popen[str]:
    env = {"JAX_PROCESS_ID": host, "JAX_NUM_PROCESSES": str(hosts)}
    path.mkdir(exist_ok=True)
    numbers = [str(restarts), str(limit), str(elastic)]
    args = [sys.executable, "-c", SUPERVISOR, str(path), host, TRAINER + code, *numbers]
    return subprocess.Popen(
        args, cwd=ROOT, env=script_env(**env), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def await_file(path: pathlib.Path, limit_s: float = 20) -> pathlib.Path:
    end = time.monotonic() + limit_s
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)
    return path


def kinds(path: pathlib.Path, host: int = 0) -> list[str]:
    return [event["event"] for event in events.read(path) if event["host"] == host]


def test_a_killed_trainer_is_started_again_and_done_is_done(tmp_path):
    code = "save(attempt + 1)\nif attempt < 1: os.kill(os.getpid(), signal.SIGKILL)"
    ended, _, err = finish(supervised(tmp_path, code))
    assert ended == 0
    assert "killed by SIGKILL; again from step 1 in 1 s (1 of 2)" in err
    assert kinds(tmp_path) == ["started", "ended", "restarting", "started", "ended", "finished"]
    waited, *rest = (tmp_path / "began-0-1").read_text().split()[1:]
    assert 1 <= float(waited) < 5
    assert "--resume=auto" in rest  # what --resume=never meant is over
    assert [each["code"] for each in events.read(tmp_path) if each["event"] == "ended"] == [-9, 0]


@pytest.mark.parametrize("code", [2, 3, 4, 75, 130])
def test_these_codes_are_passed_on_at_once(tmp_path, code):
    ended, _, err = finish(supervised(tmp_path, f"sys.exit({code})"))
    assert (ended, err) == (code, "")
    assert kinds(tmp_path) == ["started", "ended", "finished"]


def test_without_a_newer_checkpoint_it_gives_up_and_says_why(tmp_path):
    ended, _, err = finish(supervised(tmp_path, "sys.exit(7)", restarts=1))
    assert ended == 1
    assert err.splitlines()[-1] == (
        "error: gave up after 1 restarts without a newer checkpoint (newest: none); "
        "the last failure: exit code 7"
    )
    assert kinds(tmp_path)[-2:] == ["gave_up", "finished"]


def test_a_trainer_that_hangs_leaves_its_stacks_and_is_started_again(tmp_path):
    code = "def a_read_that_hangs(): time.sleep(99)\nif attempt == 0: a_read_that_hangs()"
    ended, _, err = finish(supervised(tmp_path, code, limit=1))
    assert (ended, "no progress in 1 s of start (limit 1 s)" in err) == (0, True)
    event = next(each for each in events.read(tmp_path) if each["event"] == "stalled")
    assert event["waited_s"] >= 1
    assert "a_read_that_hangs" in (tmp_path / event["stacks"]).read_text()


@pytest.mark.fault
def test_an_error_line_of_a_trainer_that_does_not_end_counts(tmp_path):
    began = time.monotonic()
    ended, _, _ = finish(supervised(tmp_path, "beat.error('record 7 is damaged', 2); time.sleep(99)"))
    assert (ended, time.monotonic() - began < 10) == (2, True)
    assert events.read(tmp_path)[-1]["line"] == "record 7 is damaged"


SAVES = """
def save_and_leave(*_):
    save(5)
    sys.exit(75)
signal.signal(signal.SIGTERM, save_and_leave)
(path / "waits").touch()
time.sleep(99)
"""


def test_sigterm_is_passed_on_and_a_killed_supervisor_does_not_leave_its_trainer_behind(tmp_path):
    process = supervised(tmp_path / "a", SAVES)
    await_file(tmp_path / "a" / "waits")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75
    assert supervise.newest_step(tmp_path / "a") == 5
    assert kinds(tmp_path / "a") == ["started", "signal", "ended", "finished"]
    process = supervised(tmp_path / "b", SAVES)
    await_file(tmp_path / "b" / "waits")
    process.kill()
    await_file(tmp_path / "b" / "checkpoints" / "5" / MARKER)
    finish(process)


@pytest.mark.fault
def test_a_second_signal_ends_a_trainer_that_takes_none(tmp_path):
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(path / 'waits').touch()\ntime.sleep(99)"
    process = supervised(tmp_path, code)
    await_file(tmp_path / "waits")
    began = time.monotonic()
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert finish(process)[0] == 75
    assert time.monotonic() - began < supervise.LEAVE_S + supervise.STACKS_S + 3


@pytest.mark.fault
def test_sigterm_between_two_attempts_ends_it(tmp_path):
    process = supervised(tmp_path, "sys.exit(7)", restarts=9)
    await_file(tmp_path / "began-0-2")
    time.sleep(0.5)  # it waits 4 s before the next one
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75


def both(path: pathlib.Path, code: str, **keys: int) -> list[tuple[int, str, str]]:
    processes = [supervised(path, code, host=host, hosts=2, **keys) for host in ("1", "0")]
    return [finish(process) for process in reversed(processes)]


def test_an_error_on_one_host_ends_the_other_that_can_only_be_killed(tmp_path):
    code = (
        "if host == '1': time.sleep(1); beat.error('record 7 is damaged', 2); sys.exit(2)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"
    )
    began = time.monotonic()
    assert [each[0] for each in both(tmp_path, code)] == [2, 2]
    assert time.monotonic() - began < 12
    assert "record 7" in next(each["line"] for each in events.read(tmp_path) if each["event"] == "finished")


@pytest.mark.fault
def test_two_hosts_come_back_together_and_find_each_other_anew(tmp_path):
    """Host 1 is killed once; host 0 waits for it until it is ended. Files of this launch do not mislead the
    next."""
    code = (
        "save(2 * attempt + int(host) + 1)\n"
        "if attempt == 0 and host == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if attempt == 0: time.sleep(99)"
    )
    for count in (2, 3):
        assert [each[0] for each in both(tmp_path, code)] == [0, 0]
        assert {path.name for path in tmp_path.glob("began-*")} == {
            f"began-{host}-{attempt}" for host in (0, 1) for attempt in range(count)
        }
    first = [each for each in events.read(tmp_path) if each["event"] == "ended"][:2]
    assert [(each["host"], each["code"]) for each in first] == [(1, -9), (0, -9)]
    assert "ended with host 1" in first[1]["line"]


@pytest.mark.fault
def test_a_supervisor_that_is_launched_anew_joins_the_next_attempt(tmp_path):
    code = "if attempt == 0: time.sleep(99)"
    leader, other = (supervised(tmp_path, code, host=host, hosts=2) for host in ("0", "1"))
    for host in (0, 1):
        await_file(tmp_path / f"began-{host}-0")
    os.killpg(other.pid, signal.SIGKILL)
    os.kill(int((tmp_path / "began-1-0").read_text().split()[0]), signal.SIGKILL)
    other.communicate()
    again = supervised(tmp_path, code, host="1", hosts=2)
    assert [finish(process)[0] for process in (leader, again)] == [0, 0]


# -------------------------------------------------------------------------------------------------- parts


def test_a_step_may_take_a_multiple_of_the_plan_or_of_the_longest_one():
    limits = {"start": 5.0, "first": 7.0, "eval": 9.0, "times": 10.0, "least": 2.0}
    assert Beat("start").limit_s(limits) == 5
    assert Beat("eval", 50, 1.0, 1.0).limit_s(limits) == 9
    assert Beat("step", 1, 1.0, 1.0).limit_s(limits) == 7
    assert Beat("step", 9, 1.5, 1.0).limit_s(limits) == 15
    assert Beat("step", 9, 1.0, 2.5).limit_s(limits) == 25
    assert Beat("step", 9, 0.1, 0.1).limit_s(limits) == 2


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1)),
        ({"JAX_PROCESS_ID": "3", "JAX_NUM_PROCESSES": "4"}, (3, 4)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
        ({"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c"}, (2, 3)),
    ],
)
def test_a_host_knows_its_place(env, expected):
    assert supervise.place(env) == expected


def test_a_supervisor_imports_no_jax():
    code = "import sys; from bigmodel.fleet import supervise; print({'jax', 'numpy'} & set(sys.modules))"
    args = [sys.executable, "-c", code]
    ran = subprocess.run(args, cwd=ROOT, env=script_env(), capture_output=True, text=True)
    assert ran.stdout == "set()\n"


@pytest.mark.fault
def test_missing_hosts_leave_a_numbering_without_holes(tmp_path):
    code = (
        "(path / f'env-{host}').write_text(os.environ['JAX_PROCESS_ID'] + os.environ['JAX_NUM_PROCESSES'])\n"
        "if attempt == 0: time.sleep(99)"
    )
    processes = [supervised(tmp_path, code, host=host, hosts=3, elastic=2.0) for host in ("0", "1", "2")]
    for host in range(3):
        await_file(tmp_path / f"env-{host}")
    for process in (int((tmp_path / "began-1-0").read_text().split()[0]), processes[1].pid):
        os.kill(process, signal.SIGKILL)
    assert [finish(process)[0] for process in processes] == [0, -9, 0]
    assert [(tmp_path / f"env-{host}").read_text() for host in (0, 1, 2)] == ["02", "13", "12"]


CALIBRATES = pytest.mark.slow  # the planner measures this CPU, once


@pytest.mark.parametrize(
    ("keys", "devices", "axes"),
    [
        pytest.param({"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, 4, None, marks=CALIBRATES),
        pytest.param({"mesh__data": 4, "mesh__tensor": 2, "batch_size": 12}, 6, None, marks=CALIBRATES),
        pytest.param({"mesh__data": 8, "microbatches": 1}, 4, None, marks=CALIBRATES),
        ({"mesh__data": -1, "mesh__tensor": 2}, 4, {"data": -1, "tensor": 2}),  # fits as it is
        ({"mesh__data": 8}, 8, {"data": 8}),
    ],
)
def test_a_mesh_of_fewer_devices_divides_the_same_batch(keys, devices, axes):
    config = tiny("gpt", **{"mesh__data": 1, **keys})
    fitted = elastic.refit(config, devices=jax.devices()[:devices])
    assert mesh.make_mesh(fitted, jax.devices()[:devices]).size == devices
    assert fitted.replace(mesh=config.mesh) == config  # nothing else has changed
    if axes is not None:
        assert fitted == config


@pytest.mark.slow
def test_devices_that_divide_nothing_are_refused():
    config = tiny("gpt", mesh__data=8)
    with pytest.raises(InputError, match=r"no mesh of the 7 devices .* batch_size that more numbers divide"):
        elastic.refit(config, devices=jax.devices()[:7])
