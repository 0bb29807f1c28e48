"""Checkpoints under kill -9, flipped bits, cut and missing files, a full disk, and several processes."""

import gc
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bigmodel.checkpoint.checkpoints import Checkpoints, CorruptCheckpoint
from bigmodel.checkpoint.digests import digest
from bigmodel.config import InputError

# When Orbax fails to read a damaged step it abandons the coroutines of its other reads; Python warns of each
# when it is collected, so that must happen before the next test.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def abandoned_reads_are_collected():
    yield
    gc.collect()


ROOT = pathlib.Path(__file__).resolve().parents[2]

# A stand-in for a run: step k's state is a pure function of k, so any process knows what k must hold.
RUN = """
import os, resource, signal, sys, time
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.checkpoint.digests import digest

def make_state(step, rows=64, columns=64, devices=None):
    mesh = jax.make_mesh((len(devices or jax.devices()),), ("fsdp",), (AxisType.Auto,), devices=devices)
    kernel = np.random.default_rng(step).normal(size=(rows, columns)).astype(np.float32)
    def put(x, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return {"params": {"kernel": put(kernel, "fsdp"), "bias": put(kernel[0])}, "step": put(np.int32(step))}

def spec_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
"""
names: dict = {}
exec(RUN, names)
make_state, spec_of = names["make_state"], names["spec_of"]


def start(code: str, *args: object) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", RUN + code, *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=env)


def finish(process: subprocess.Popen, timeout: float = 120) -> str:
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """Steps 1 and 2, to be copied and damaged."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"step": step})
    return directory


@pytest.fixture
def two(saved, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "c"))


def files_of(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size)


def flip(root: pathlib.Path, values: bytes, chance: random.Random) -> None:
    """Flips one bit of these values, wherever they are stored."""
    offset, bit = chance.randrange(len(values)), 1 << chance.randrange(8)
    hits = [path for path in files_of(root) if values in path.read_bytes()]
    assert hits
    for path in hits:
        data = bytearray(path.read_bytes())
        data[data.index(values) + offset] ^= bit
        path.write_bytes(data)


def check_falls_back_or_is_unharmed(directory: pathlib.Path) -> bool:
    """Never silently wrong: step 2 bit for bit, or a typed error, and then step 1. True if detected."""
    right = {step: digest(make_state(step)) for step in (1, 2)}
    spec = spec_of(make_state(0))
    with Checkpoints(directory, read_only=True) as checkpoints:
        try:
            got, meta, _ = checkpoints.restore(spec, 2)
            assert (digest(got), meta) == (right[2], {"step": 2})
            problem = ""
        except CorruptCheckpoint as error:
            problem = str(error)
        assert not problem or (str(directory / "2") in problem and "\n" not in problem)
        got, meta, step = checkpoints.restore(spec)
        assert (digest(got), meta, step) == (right[step], {"step": step}, 1 if problem else 2)
    return bool(problem)


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_is_detected_or_harmless(two, seed):
    """Drawn over all bytes of the step. Some bytes are dead: Orbax leaves what it merged, and old nodes."""
    chance = random.Random(seed)
    files = files_of(two / "2")
    path = chance.choices(files, [p.stat().st_size for p in files])[0]
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    check_falls_back_or_is_unharmed(two)


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_array_data_is_always_detected(two, seed):
    chance = random.Random(seed)
    row = chance.randrange(0, 64, 8)  # each device has eight rows
    flip(two / "2", np.asarray(make_state(2)["params"]["kernel"])[row : row + 8].tobytes(), chance)
    assert check_falls_back_or_is_unharmed(two)


def test_a_flipped_bit_in_each_small_file_is_detected_or_harmless(two, saved):
    """The large data files take nearly all random offsets; this visits manifests and metadata."""
    chance = random.Random(0)
    for source in files_of(saved / "2"):
        path = two / source.relative_to(saved)
        for _ in range(4):
            data = bytearray(source.read_bytes())
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
            check_falls_back_or_is_unharmed(two)
        shutil.copy(source, path)


@pytest.mark.parametrize("damage", ["cut", "empty", "remove"])
def test_cut_and_missing_files_are_detected_or_harmless(two, saved, damage):
    detected = set()
    for source in files_of(saved / "2"):
        if source == saved / "2" / "commit_success.txt":
            continue  # without it there is no step 2: see test_checkpoint.py
        path = two / source.relative_to(saved)
        if damage == "remove":
            path.unlink()
        else:
            os.truncate(path, source.stat().st_size // 2 if damage == "cut" else 0)
        if check_falls_back_or_is_unharmed(two):
            detected.add(str(path.relative_to(two / "2")))
        shutil.copy(source, path)
    assert "manifest/process_0.json" in detected
    assert "state/manifest.ocdbt" in detected
    assert any("/d/" in name for name in detected)


def test_when_every_step_is_damaged_the_error_says_so(two):
    for step in (1, 2):
        shutil.rmtree(two / str(step) / "state")
    with Checkpoints(two) as checkpoints, pytest.raises(CorruptCheckpoint, match="no good checkpoint"):
        checkpoints.restore(spec_of(make_state(0)))
    assert len(list(two.glob("*.corrupt-*"))) == 2


FILL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails, as on a full disk
from bigmodel.config import InputError
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, make_state(1), {})
checkpoints.save(2, make_state(2, rows=1024, columns=256), {})  # 1 MB
for attempt in (lambda: checkpoints.save(3, make_state(3), {}), lambda: checkpoints.close()):
    try:
        attempt()
    except InputError as error:
        print(f"\\nERROR: {error}", flush=True)  # one write: Orbax's threads write to the same pipe
print("STEPS:", checkpoints.steps())
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(2, make_state(2), {})
    got, _, step = checkpoints.restore(spec_of(make_state(0)))
    assert (step, digest(got)) == (2, digest(make_state(2)))
    print("OK", sorted(os.listdir(sys.argv[1])))
"""


def test_a_write_that_fails_surfaces_at_the_next_call_and_spoils_nothing(tmp_path):
    out = finish(start(FILL, tmp_path / "c"))
    errors = [line for line in out.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1, out
    assert f"{tmp_path / 'c' / '2'}: checkpoint not written" in errors[0]
    assert "STEPS: [1]\n" in out
    assert "OK ['1', '2']" in out


FULL = """
from bigmodel.config import InputError
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, make_state(1), {})
for step in (2, 3, 4, 5):
    try:
        checkpoints.save(step, make_state(step, rows=1024, columns=1024), {})
        checkpoints.wait()
    except InputError as error:
        print(f"\\nERROR: {error}", flush=True)  # one write: Orbax's threads write to the same pipe
        break
checkpoints.close()
got, _, _ = Checkpoints(sys.argv[1], read_only=True).restore(spec_of(make_state(1)), 1)
assert digest(got) == digest(make_state(1))
print("OK", checkpoints.steps())
"""


@pytest.mark.fault
def test_a_full_disk_is_named_and_earlier_steps_stay_valid(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        out = finish(start(FULL, disk / "c"))
    finally:
        subprocess.run(["umount", disk], check=False)
    assert f"ERROR: {disk}/c/2: checkpoint not written: the disk is full" in out
    assert "OK [1]" in out


KILLED = """
checkpoints = Checkpoints(sys.argv[1])
for step in (1, 2):
    checkpoints.save(step, make_state(step, 4096, 1024), {"step": step})
    print("SAVE_RETURNED", step, flush=True)
time.sleep(60)
"""


@pytest.mark.fault
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.2, 0.5])
def test_kill_9_during_a_save_loses_at_most_that_save(tmp_path, delay_s):
    with start(KILLED, tmp_path) as process:
        for line in process.stdout:
            if line.startswith("SAVE_RETURNED 2"):
                break
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    with Checkpoints(tmp_path) as checkpoints:
        assert not list(tmp_path.glob("*tmp*"))
        assert checkpoints.steps() in ([1], [1, 2])
        got, meta, step = checkpoints.restore(spec_of(make_state(0, 4096, 1024)))
        assert digest(got) == digest(make_state(step, 4096, 1024))
        assert meta == {"step": step}
        checkpoints.save(step + 1, make_state(step + 1, 4096, 1024), {})
    assert Checkpoints(tmp_path, read_only=True).latest() == step + 1


JOB = """
port, index, count, directory, action = sys.argv[1:]
if int(count) > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
with Checkpoints(directory) as checkpoints:
    if action == "save":
        checkpoints.save(1, make_state(1), {"step": 1})
        checkpoints.save(2, make_state(2), {"step": 2})
        checkpoints.wait()
    target = make_state(0)
    if action == "transposed":  # columns split over processes: no process holds any saved row block
        mesh = target["step"].sharding.mesh
        spec = spec_of(target)
        kernel = spec["params"]["kernel"]
        sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
        spec["params"]["kernel"] = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=sharding)
    else:
        spec = spec_of(target)
    got, meta, step = checkpoints.restore(spec)
    print("RESTORED", step, meta["step"], digest(got), flush=True)
"""


def run_job(count: int, devices: int, directory: pathlib.Path, action: str, monkeypatch) -> set[str]:
    """The set of lines that the processes of a job print: one line if all agree."""
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start(JOB, port, i, count, directory, action) for i in range(count)]
    outs = [finish(p) for p in processes]
    lines = [line for out in outs for line in out.splitlines() if line.startswith("RESTORED")]
    assert len(lines) == count, "\n".join(outs)
    return set(lines)


@pytest.mark.fault
def test_two_processes_save_and_any_process_count_restores_verified(tmp_path, monkeypatch):
    jobs = tmp_path / "c"
    right = {f"RESTORED 2 2 {digest(make_state(2))}"}
    assert run_job(2, 4, jobs, "save", monkeypatch) == right
    assert run_job(2, 4, jobs, "restore", monkeypatch) == right
    assert run_job(2, 2, jobs, "transposed", monkeypatch) == right
    assert run_job(1, 8, jobs, "restore", monkeypatch) == right
    assert run_job(1, 1, jobs, "restore", monkeypatch) == right
    rows = np.asarray(make_state(2)["params"]["kernel"])[40:48]  # written by process 1
    flip(jobs / "2", rows.tobytes(), random.Random(0))
    for count, devices, action in [(1, 8, "restore"), (2, 4, "transposed"), (2, 4, "restore")]:
        copy = shutil.copytree(jobs, tmp_path / f"{count}{action}")
        fallen = run_job(count, devices, copy, action, monkeypatch)
        assert fallen == {f"RESTORED 1 1 {digest(make_state(1))}"}


@pytest.mark.fault
def test_a_missing_manifest_of_one_process_is_detected(tmp_path, monkeypatch):
    run_job(2, 4, tmp_path, "save", monkeypatch)
    (tmp_path / "2" / "manifest" / "process_1.json").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CorruptCheckpoint, match=r"process_1\.json is unreadable"):
            checkpoints.restore(spec_of(make_state(0)), 2)
        assert checkpoints.restore(spec_of(make_state(0)))[2] == 1


def test_restoring_into_another_width_is_an_input_error_not_damage(two):
    mesh = jax.make_mesh((8,), ("fsdp",), (AxisType.Auto,))
    spec = spec_of(make_state(0, columns=128))
    assert spec["params"]["kernel"].sharding == NamedSharding(mesh, PartitionSpec("fsdp"))
    with Checkpoints(two) as checkpoints:
        with pytest.raises(InputError, match=r"float32\[64, 64\] in the checkpoint"):
            checkpoints.restore(spec)
        assert checkpoints.steps() == [1, 2]
