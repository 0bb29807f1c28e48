"""Checks before a run, on one host and on two of which one differs."""

from __future__ import annotations

import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, config_flag, script_env, tiny
from test_multihost import config_of, finish_both

from bigmodel import config as config_lib
from bigmodel.config import InputError
from bigmodel.fleet import preflight


def digits(**keys: object) -> config_lib.Config:
    return tiny("cnn", data__name="digits", mesh__data=-1, **keys)


def test_a_sound_run_passes_each_check_and_leaves_nothing_behind(tmp_path):
    lines = preflight.check(digits(), tmp_path / "a" / "run", thorough=True)
    checks = ["code", "versions", "config", "clocks", "workdir", "data", "room", "step"]
    assert [line.split()[0] for line in lines] == checks
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data__name": "table:nothing.csv", "data__label": "x"}, "data: .*nothing.csv"),
        (
            {"optim__lr": 1e38, "optim__clip_norm": 0.0, "batch_size": 12},
            r"data: batch_size=12 is not a multiple",
        ),
    ],
)
def test_a_failure_names_the_host_and_the_check(tmp_path, keys, words):
    config = tiny("mlp" if "data__label" in keys else "cnn", mesh__data=-1, **keys)
    with pytest.raises(InputError, match=rf"preflight: host 0 \({socket.gethostname()}\): {words}"):
        preflight.check(config, tmp_path, thorough=True)


def test_a_host_that_does_not_come_is_named(tmp_path):
    with pytest.raises(InputError, match="host 1, 2 did not write to"):
        preflight.call_together(tmp_path, 0, 3, limit_s=0.3)
    for host in (1, 2):
        (tmp_path / "fleet" / f"here-{host}").touch()
    preflight.call_together(tmp_path, 0, 3, limit_s=0.3)
    os.utime(tmp_path / "fleet" / "here-2", (1, 1))  # of another launch
    with pytest.raises(InputError, match="host 2 did not write to"):
        preflight.call_together(tmp_path, 0, 3, limit_s=0.3)


def test_a_port_has_to_be_free_on_host_0_and_open_to_the_others():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"host 1 .*{address}: Connection refused"):
            preflight.reach(address, 1, limit_s=0.2)
        taken.listen()
        preflight.reach(address, 1, limit_s=0.2)
        with pytest.raises(InputError, match=rf"host 0 .*{address}: Address already in use"):
            preflight.reach(address, 0)
    preflight.reach(address, 0)


def test_the_code_s_digest_is_that_of_its_files():
    root = pathlib.Path(preflight.__file__).parent.parent
    assert preflight.code_digest() == preflight.code_digest()
    assert len(preflight.code_digest()) == 16
    assert root.name == "bigmodel"


# Runs scripts/preflight.py on a host that differs as `change` says.
HOST = """
import importlib.metadata, os, runpy, sys, time
sys.path.insert(0, "scripts")
version, now, host = importlib.metadata.version, time.time, os.environ["JAX_PROCESS_ID"]
if host == "1":
    {change}
sys.argv = ["scripts/preflight.py", *sys.argv[1:]]
runpy.run_path("scripts/preflight.py", run_name="__main__")
"""
CHANGES = {
    "nothing": ("pass", ""),
    "version": (
        "importlib.metadata.version = lambda name: '0.0.1' if name == 'optax' else version(name)",
        r"host 1 \(.*\): versions: optax is '0\.0\.1', not '.*' as on host 0",
    ),
    "clock": ("time.time = lambda: now() + 40", r"host 1 \(.*\): clock: \+20 s from the others'"),
    "data": ("os.environ['HOME'] = '/nowhere'", r"host 1 \(.*\): data: .*matches no file"),
}


@pytest.mark.fault
@pytest.mark.parametrize("change", CHANGES)
def test_two_hosts(corpus, tmp_path, change):
    (tmp_path / "home").mkdir()
    for file in pathlib.Path(corpus.removeprefix("text:")).parent.iterdir():
        (tmp_path / "home" / file.name).write_bytes(file.read_bytes())
    code, words = CHANGES[change]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    devices = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": devices}
    env["HOME"] = str(tmp_path / "home")
    flags = [config_flag(config_of("text:~/*.txt"), tmp_path), f"--workdir={tmp_path / 'run'}"]
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOST.format(change=code), *flags], cwd=ROOT, text=True,
            env=script_env(**env, JAX_PROCESS_ID=host), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for host in ("0", "1")
    ]  # fmt: skip
    results = finish_both(processes, 100)
    assert [code for code, _, _ in results] == [2 * bool(words)] * 2, results
    if words:
        assert all(re.search(words, err.splitlines()[-1]) for _, _, err in results), results
    else:
        lines = [line for line in results[0][1].splitlines() if line.startswith("preflight ")]
        assert len(lines) == 8, results
    assert time.monotonic() - began < 60
