"""Checks before a run on several hosts: each failure is a line that names the host.

Every host calls `check` alike. A check runs in a thread with a time limit, so that a file system that hangs
is a failure of its host, and the hosts exchange what they found between the checks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

import bigmodel
from bigmodel import config as config_lib
from bigmodel import disk, mesh, tasks, units
from bigmodel.checkpoint import fingerprint
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import Config, InputError
from bigmodel.data import Pipeline
from bigmodel.plan import estimate, fits, planner
from bigmodel.program import Program
from bigmodel.training.ending import Ending

LIMIT_S = 20.0  # of one check
STEP_S = 40.0  # of the dry step, with its compilation
SKEW_S = 5.0  # between clocks


def names(host: int) -> str:
    """`host 1 (its name)`."""
    return f"host {host} ({socket.gethostname()})"


def call_together(directory: pathlib.Path, host: int, hosts: int, limit_s: float = 30.0) -> None:
    """Waits until all hosts have written to the workdir that they are here.

    Raises:
        InputError: it cannot be written; or hosts that did not come, or write somewhere else.
    """
    folder = directory / "fleet"
    with disk.writing(folder, "mend the path"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"here-{host}").write_text(socket.gethostname())
    began = time.monotonic()
    missing = list(range(hosts))
    while missing and time.monotonic() - began < limit_s:
        missing = [i for i in range(hosts) if not _is_new(folder / f"here-{i}", limit_s)]
        time.sleep(0.2)
    if missing:
        raise InputError(
            f"preflight on {names(host)}: host {', '.join(map(str, missing))} did not write to {folder} "
            f"within {limit_s:.0f} s; start this command on every host, with a --workdir that all of them see"
        )


def _is_new(path: pathlib.Path, limit_s: float) -> bool:
    with contextlib.suppress(OSError):
        return abs(time.time() - path.stat().st_mtime) < 2 * limit_s
    return False


def reach(address: str, host: int, limit_s: float = LIMIT_S) -> None:
    """Checks the port of JAX's coordinator: free on host 0, open to all others once that one listens.

    Raises:
        InputError: it is not.
    """
    name, _, port = address.rpartition(":")
    if not name or not port.isdigit():
        raise InputError(f"JAX_COORDINATOR_ADDRESS={address}: give HOST:PORT")
    problem, began = "", time.monotonic()
    while host and time.monotonic() - began < limit_s:
        try:
            socket.create_connection((name, int(port)), timeout=3).close()
            return
        except OSError as error:
            problem = disk.cause(error)
        time.sleep(0.3)
    if host == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
                return
            except OSError as error:
                problem = disk.cause(error)
    fix = "choose another port" if host == 0 else "open the port between the hosts, or mend the address"
    raise InputError(f"preflight on {names(host)}: JAX_COORDINATOR_ADDRESS={address}: {problem}; {fix}")


def check(config: Config, directory: pathlib.Path, *, thorough: bool) -> list[str]:
    """Checks that this job can run, on every host alike, once the hosts are connected.

    Args:
        thorough: also the config and the data, and one step; `train.run` itself does that otherwise.

    Returns: a line for each check that passed.

    Raises:
        InputError: on every host, with every failure and its host.
    """
    config_values = config_lib.flatten(config_lib.to_dict(config)) if thorough else {}
    done = [_alike("code", {"code": code_digest()}), _alike("versions", fingerprint.versions())]
    if thorough:
        done.append(_alike("config", config_values | fingerprint.own_files(config)))
    done += [_clocks(), _shared(directory)]
    if thorough:
        prepared = _Prepared(config)
        done.append(_every("data", prepared.read))
        _alike("data", prepared.data.fingerprint())
        done.append(_every("room", lambda: prepared.compare_room(directory)))
        done.append(_every("step", prepared.step, STEP_S))
    return done


def before_run(config: Config, directory: pathlib.Path, end: Ending) -> None:
    """Checks the hosts of a job of several before `train.run`. Raises InputError."""
    mesh.join_cluster()
    end.join()
    if jax.process_count() > 1:
        check(config, directory, thorough=False)


def code_digest() -> str:
    """A digest of the package's own files."""
    root = pathlib.Path(bigmodel.__file__).parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def _exchanged(value: Any) -> list[Any]:
    """This value of every host, on every host."""
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    return [json.loads(text) for text in fingerprint.gathered(json.dumps(value))]


def _every(about: str, action: Callable[[], str], limit_s: float = LIMIT_S) -> str:
    """Runs a check on every host. Raises InputError, on all of them, with the failures of each."""
    found = _exchanged({"host": names(jax.process_index()), **_limited(action, limit_s)})
    bad = [f"{each['host']}: {about}: {each['problem']}" for each in found if each["problem"]]
    if bad:
        raise InputError("preflight: " + "; ".join(bad))
    return f"{about:9} {found[0]['result']}"


def _limited(action: Callable[[], str], limit_s: float) -> dict[str, str]:
    """The result of a check, or its problem; one that takes too long is left behind in its thread."""
    out = {"result": "", "problem": f"no answer within {limit_s:.0f} s"}

    def work() -> None:
        try:
            result, problem = action(), ""
        except Exception as error:
            result, problem = "", " ".join(f"{error or type(error).__name__}".split())
        out.update(result=result, problem=problem)

    thread = threading.Thread(target=work, name="preflight", daemon=True)
    thread.start()
    thread.join(limit_s)
    return dict(out)


def _alike(about: str, values: Mapping[str, Any]) -> str:
    """Compares values of all hosts with the first one's."""
    hosts = _exchanged({"host": names(jax.process_index()), "values": dict(values)})
    bad = []
    for each in hosts[1:]:
        was, now = hosts[0]["values"], each["values"]
        keys = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
        pairs = [f"{key} is {now.get(key)!r:.100}, not {was.get(key)!r:.100}" for key in keys[:5]]
        bad += [f"{each['host']}: {about}: {', '.join(pairs)} as on {hosts[0]['host']}"] if pairs else []
    if bad:
        raise InputError("preflight: " + "; ".join(bad) + "; start all hosts alike")
    return f"{about:9} the same on {len(hosts)} host{'s' if len(hosts) > 1 else ''}"


def _clocks() -> str:
    _exchanged(None)  # so that all read the clock at about the same time
    found = _exchanged({"host": names(jax.process_index()), "time": time.time()})
    middle = statistics.median(each["time"] for each in found)
    bad = [
        f"{each['host']}: clock: {each['time'] - middle:+.0f} s from the others'"
        for each in found
        if abs(each["time"] - middle) > SKEW_S
    ]
    if bad:
        raise InputError("preflight: " + "; ".join(bad) + "; synchronize them (chrony, ntpd)")
    return f"clocks    within {max(abs(each['time'] - middle) for each in found):.1f} s"


def _shared(directory: pathlib.Path) -> str:
    """Checks that all hosts write to one workdir, read each other's files, and save and restore together."""
    host, hosts = jax.process_index(), jax.process_count()
    nonces = _exchanged(os.urandom(4).hex())
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    folder = directory / f".preflight-{nonces[0]}"
    try:
        _every("workdir", lambda: _written(folder, host, nonces[host]))
        _every("workdir", lambda: _read(folder, nonces))
        return _every("workdir", lambda: _saved(folder, hosts))
    finally:
        if host == 0:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # a workdir that is used stays
                for path in made:
                    path.rmdir()


def _written(folder: pathlib.Path, host: int, nonce: str) -> str:
    with disk.writing(folder, "mend the path"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{host}").write_text(nonce)
    return ""


def _read(folder: pathlib.Path, nonces: list[str]) -> str:
    began = time.monotonic()
    others = dict(enumerate(nonces))
    while others and time.monotonic() - began < LIMIT_S / 2:  # NFS may show a new file late
        for host, nonce in list(others.items()):
            with contextlib.suppress(OSError):
                if (folder / f"{host}").read_text() == nonce:
                    del others[host]
        time.sleep(0.05)
    if others:
        missing = ", ".join(map(str, others))
        raise InputError(
            f"{folder.parent} does not show what host {missing} wrote there; give one that all see"
        )
    return ""


def _saved(folder: pathlib.Path, hosts: int) -> str:
    one = mesh.make_mesh(Config(mesh=config_lib.Mesh(data=-1), batch_size=jax.device_count()))
    state = {"x": jax.jit(lambda: jax.numpy.arange(8.0), out_shardings=mesh.replicated(one))()}
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        checkpoints.restore(spec, 1)
    free = shutil.disk_usage(folder).free
    return f"written, saved and restored by {hosts} host{'s' if hosts > 1 else ''}, {units.size(free)} free"


class _Prepared:
    """The parts of a run that its checks share, made when they are first needed."""

    def __init__(self, config: Config) -> None:
        self._given = config

    @functools.cached_property
    def config(self) -> Config:
        return tasks.sized(self._given)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return mesh.make_mesh(self.config)

    @functools.cached_property
    def data(self) -> Pipeline:
        rows = mesh.host_rows(self.mesh, self.config.batch_size)
        return tasks.make_pipeline(self.config, "train", None, **rows)

    @functools.cached_property
    def program(self) -> Program:
        return planner.build_within_budget(self.config, self.mesh)

    def read(self) -> str:
        self.data[0]
        return f"{self.config.data.name} can be read: {self.data.amount}"

    def compare_room(self, directory: pathlib.Path) -> str:
        """Compares the state's bytes with the free disk and memory."""
        fits.check_state(self.program)
        state = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.program.state_spec))
        count, there = self.config.checkpoint.keep + 1, directory
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if count * state > free:
            raise InputError(
                f"{count} checkpoints take {units.size(count * state)}, but {units.size(free)} are free in "
                f"{there}; make room, or lower checkpoint.keep"
            )
        resident = units.size(estimate.tree_bytes(self.program.state_spec))
        return f"checkpoints {units.size(count * state)} of {units.size(free)}; state {resident} a device"

    def step(self) -> str:
        """Trains one step of a state that is thrown away."""
        began, program = time.perf_counter(), self.program
        compiled = planner.compile_to_run(program)
        fits.check_step(program, compiled)
        batch = program.put(self.data[0])
        total, weight = compiled(program.init(jax.random.key(self.config.seed)), batch)[1]["loss"]
        if not math.isfinite(loss := float(total) / max(float(weight), 1e-9)):
            raise InputError(f"the loss of a first step is {loss}; lower optim.lr or mend the data")
        return f"one in {time.perf_counter() - began:.0f} s with its compilation, loss {loss:.4f}"
