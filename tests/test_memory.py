"""A run's memory is compared with what is free before its first array; the system's limits are read."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import resource
import subprocess
import sys
import types

import jax
import pytest
from conftest import ROOT, build, script_env, tiny

from bigmodel import config as config_lib
from bigmodel import train
from bigmodel.config import InputError
from bigmodel.machines import memory
from bigmodel.machines.memory import Room
from bigmodel.plan import estimate, fits

GIB = 2**30


def peak(config: config_lib.Config) -> float:
    """Sum of XLA's own figures over all devices of this host."""
    built = build(config)
    a = built.compile().memory_analysis()
    one = a.argument_size_in_bytes + a.output_size_in_bytes - a.alias_size_in_bytes + a.temp_size_in_bytes
    return one * built.mesh.size


def have(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(memory, "room", lambda: Room(size, 2 * size, "the host's memory"))


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_that_does_not_fit_is_refused_before_the_state_is_made(tmp_path, monkeypatch, devices):
    mesh = {"mesh__data": devices} if devices > 1 else {}
    config = tiny("cnn", batch_size=64, microbatches=1, steps=2, log__tensorboard=False, **mesh)
    here = jax.devices()[:devices]
    monkeypatch.setattr(jax, "devices", lambda *a: here)
    needed = peak(config)
    have(monkeypatch, 0.99 * needed)
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train.start, "initial_state", lambda *a: pytest.fail("the state was made"))
        with pytest.raises(InputError) as caught:
            train.run(config, path)
    said = str(caught.value)
    assert "free here (the host's memory" in said
    assert said.endswith("or start it all the same with --force")
    assert not path.exists()
    flags = [way.split() for way in re.findall(r"--config\.[^;]*?(?=, or --config|; or start)", said)]
    assert flags
    for way in flags:  # what it advises does fit
        overrides = [flag.removeprefix("--config.") for flag in way]
        assert peak(config_lib.override(config, overrides)) < 0.99 * needed
    assert train.run(config, path, force=True).exit_code == 0
    have(monkeypatch, 1.01 * needed)
    assert train.run(config, tmp_path / "fits").exit_code == 0


def test_a_state_that_does_not_fit_is_refused_before_it_is_compiled(tmp_path, monkeypatch):
    config = tiny("cnn", steps=2)
    devices = len(jax.devices())  # each holds all of it, and all share the host's memory
    state = estimate.tree_bytes(build(config).state_spec)
    have(monkeypatch, 0.8 * state * devices)
    monkeypatch.setattr(train.planner, "compile_to_run", lambda *a: pytest.fail("it was compiled"))
    match = r"the state alone takes .*--config\.optim\.name=adafactor"
    with pytest.raises(InputError, match=match) as caught:
        train.run(config, tmp_path)
    for way in re.findall(r"--config\.([\w.]+=\w+)(?=,|;)", str(caught.value)):
        smaller = config_lib.override(config, [way])
        assert estimate.tree_bytes(build(smaller).state_spec) < 0.8 * state


def test_the_step_is_compiled_once(tmp_path, monkeypatch):
    compiled = []
    whole = train.planner.compile_to_run
    monkeypatch.setattr(train.planner, "compile_to_run", lambda b: compiled.append(b) or whole(b))
    for steps in (2, 3, 3):
        train.run(tiny("cnn", steps=steps, log__tensorboard=False), tmp_path)
    assert len(compiled) == 2  # not for the third, which is done


def test_running_out_of_memory_is_one_line():
    match = r"memory: it ran out \(RESOURCE_EXHAUSTED: .*lower batch_size"
    with pytest.raises(InputError, match=match), fits.reporting():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n at x")
    with pytest.raises(InputError, match="ran out"), fits.reporting():
        raise MemoryError
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), fits.reporting():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_state_that_the_system_refuses_is_an_error_even_if_forced(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "is_granted", lambda size: False)
    with pytest.raises(InputError, match=r"the system refuses .* for the state"):
        train.run(tiny("cnn", steps=2), tmp_path, force=True)


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator, as far as `fits` asks."""

    id: int
    in_use: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 80 * GIB, "bytes_in_use": self.in_use}


def test_an_accelerator_s_own_memory_counts_for_each_device(monkeypatch):
    have(monkeypatch, 1.0)  # the host's does not
    built = build(tiny("cnn"))
    state = estimate.tree_bytes(built.state_spec)
    for room, refused in ((state + 1, False), (state - 1, True)):
        devices = [Device(0, 0), Device(1, 80 * GIB - room)]
        mesh = types.SimpleNamespace(local_devices=devices)
        there = dataclasses.replace(built, mesh=mesh)
        # No mesh of such devices can be made here, so no other settings are tried on one.
        monkeypatch.setattr(fits, "_state_bytes", lambda *a: float("inf"))
        match = r"NVIDIA H100 1, 80 GiB in all"
        with pytest.raises(InputError, match=match) if refused else contextlib.nullcontext():
            fits.check_state(there)


# ------------------------------------------------------------------------------------------------- limits


def test_the_host_s_memory_is_read(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  2000 kB\nMemFree: 10 kB\nMemAvailable:   1500 kB\n")
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert memory.room() == (1500 * 1024, 2000 * 1024, "the host's memory")
    (tmp_path / "meminfo").unlink()
    assert memory.room() is None


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/a/b", "a", ("memory.max", "memory.current", "inactive_file")),
        ("0::/", "", ("memory.max", "memory.current", "inactive_file")),
        ("9:memory:/job", "memory/job",
         ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)  # fmt: skip
def test_a_cgroup_s_limit_is_read_wherever_it_is_set(tmp_path, monkeypatch, line, folder, names):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(f"1:cpu:/x\n{line}\n")
    for inner in ("a/b", "memory/job"):
        (cgroup / inner).mkdir(parents=True)
    (cgroup / "a/b/memory.max").write_text("max\n")
    limit, used, cached = names
    (cgroup / folder / limit).write_text("5000\n")
    (cgroup / folder / used).write_text("3000\n")
    (cgroup / folder / "memory.stat").write_text(f"anon 7\n{cached} 1000\n")
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUP", cgroup)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert memory.room() == (3000, 5000, "the cgroup's memory.max")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v")
def test_ulimit_is_read_and_what_it_refuses_is_not_granted():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31));"
        "from bigmodel.machines import memory; r = memory.room(); print(r.free_bytes, r.total_bytes, r.of);"
        "print(memory.is_granted(0.9 * r.free_bytes), memory.is_granted(1.1 * r.free_bytes))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=script_env(), capture_output=True, text=True, check=True
    ).stdout.split()
    assert 0 < float(out[0]) < 2**31 == float(out[1])
    assert " ".join(out[2:4]) == "ulimit -v"
    assert out[4:] == ["True", "False"]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 2**31


KEEPS = """
import cli
cli.keep_memory()
import numpy as np
from bigmodel.machines import memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before = resident()
arrays = [np.ones(2**17) for _ in range(200)]
arrays = None
kept = resident() - before
memory.give_back()
print(kept, resident() - before)
"""


def test_an_idle_server_gives_memory_back():
    env = {**script_env(), "PYTHONPATH": f"{ROOT}:{ROOT}/scripts"}
    done = subprocess.run([sys.executable, "-c", KEEPS], env=env, capture_output=True, text=True, check=True)
    kept, left = map(float, done.stdout.split())
    assert kept > 150
    assert left < 50
