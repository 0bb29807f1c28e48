"""Supervises a trainer: starts it as a child, watches its heartbeat, restarts it on all hosts together.

One supervisor runs on each host. It imports no JAX, owns the signals, and passes them on. A trainer without
progress for as long as its phase allows (`heartbeat.LIMITS`) is asked for the stacks of all its threads
and then killed. After a first signal it has STOP_S to finish and save its step, or SAVE_S while it saves;
after a second one LEAVE_S. When the supervisor itself is killed, Linux sends the trainer SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from bigmodel.fleet import orders
from bigmodel.fleet.board import DEAD_S, Alone, Follower, Leader, Order, Report
from bigmodel.fleet.orders import Policy
from bigmodel.machines.processes import die_with_parent
from bigmodel.training import events, heartbeat
from bigmodel.training.ending import INTERRUPTED, STOPPED
from bigmodel.training.heartbeat import Beat

POLL_S = 0.1
POST_S = 0.4  # from one look at the other hosts to the next
STOP_S, SAVE_S, LEAVE_S = 120.0, 600.0, 3.0
STACKS_S = 3.0  # for writing the stacks
REPEATED_S = 0.2  # the same signal, sent to a process and to its group
HANGS = "no progress"
MARKER = "commit_success.txt"  # of a complete checkpoint


@dataclass(frozen=True)
class Options:
    """The flags of a supervised run."""

    policy: Policy = field(default_factory=Policy)
    limits: Mapping[str, float] = field(default_factory=lambda: heartbeat.LIMITS)


def place(env: Mapping[str, str]) -> tuple[int, int]:
    """Returns this host's number in the job and the number of hosts, as `mesh.join_cluster` finds them."""
    for index, count in (
        ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ):
        if env.get(index, "").isdigit() and env.get(count, "").isdigit():
            return int(env[index]), int(env[count])
    names = env.get("TPU_WORKER_HOSTNAMES", "")
    return int(env.get("TPU_WORKER_ID") or 0), len(names.split(",")) if names else 1


def newest_step(workdir: pathlib.Path) -> int | None:
    """Returns the step of the newest complete checkpoint."""
    names = [path.parent.name for path in workdir.glob(f"checkpoints/*/{MARKER}")]
    return max((int(name) for name in names if name.isdigit()), default=None)


def run(command: Sequence[str], workdir: pathlib.Path, options: Options, env: Mapping[str, str]) -> int:
    """Runs `command` until it is done, and returns the job's exit code.

    Args:
        command: trains; `--supervised=PIPE,STACKS,WAITED_S` is added.
        env: of the trainer.
    """
    return _Supervisor(command, workdir, options, env).run()


class _Trainer:
    """The child, and the last that is known of it."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], waited_s: float) -> None:
        self._pipe, theirs = os.pipe()
        os.set_blocking(self._pipe, False)
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the pipe
        fds = (theirs, self.stacks.fileno())
        flag = f"--supervised={fds[0]},{fds[1]},{waited_s:.3f}"
        # In a session of its own: the terminal sends Ctrl-C to this process alone.
        self.process = subprocess.Popen(
            die_with_parent([*command, flag]), env=dict(env), pass_fds=fds, start_new_session=True
        )
        os.close(theirs)
        self.beat, self.at = Beat(), time.monotonic()
        self.looked = self.began = self.at
        self.error: tuple[int, str] | None = None
        self.error_at = 0.0
        self._rest = b""

    def listen(self, seconds: float) -> None:
        """Reads the heartbeats that come within `seconds`."""
        ready, _, _ = select.select([self._pipe], [], [], seconds)
        now = time.monotonic()
        if now - self.looked > 10 * seconds + 5:  # this process was stopped: it does not know for how long
            self.at = now
        self.looked = now
        data = b""
        if ready:
            with contextlib.suppress(BlockingIOError):
                data = os.read(self._pipe, 1 << 16)
            if not data:  # closed: the trainer is ending
                time.sleep(seconds)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                beat = Beat(**json.loads(line))
                self.at = now
                if beat.code is not None and self.error is None:
                    self.error, self.error_at = (beat.code, beat.error), now
                self.beat = beat

    def close(self) -> None:
        os.close(self._pipe)
        self.stacks.close()


class _Supervisor:
    def __init__(
        self, command: Sequence[str], workdir: pathlib.Path, options: Options, env: Mapping[str, str]
    ) -> None:
        self._command, self._workdir, self._options, self._env = command, workdir, options, env
        self._host, self._hosts = place(env)
        self._leader: orders.Leader | None = None
        self._board: Alone | Follower
        if self._host == 0:
            address = env.get("JAX_COORDINATOR_ADDRESS") or f"{socket.gethostname()}:8476"
            policy = Policy(options.policy.restarts, options.policy.elastic_s, address)
            self._leader = orders.Leader(self._hosts, policy, time.monotonic(), newest_step(workdir))
            self._board = Alone() if self._hosts == 1 else Leader(workdir, self._hosts)
        else:
            self._board = Follower(workdir, self._host)
        self._own = Report()
        self._trainer: _Trainer | None = None
        self._posted = self._kill_at = self._ordered_at = 0.0
        self._why = ""  # this process killed its trainer
        self._signals: list[int] = []
        self._forwarded, self._signal_at, self._heard_at = 0, 0.0, 0.0
        self._waiting_since: float | None = None
        self._unwritten: list[tuple[str, dict[str, Any]]] = []  # events of the time before the workdir

    def run(self) -> int:
        with self._listening():
            try:
                while True:
                    self._forward()
                    if self._trainer is not None:
                        self._watch(self._trainer)
                    else:
                        time.sleep(POLL_S if self._posted else 0)
                    if time.monotonic() - self._posted >= POST_S:
                        order = self._confer()
                        if (code := self._obey(order)) is not None:
                            return code
            finally:
                if self._trainer is not None:
                    self._trainer.process.kill()
                self._write_events()

    # -------------------------------------------------------------------------------------- other hosts

    def _confer(self) -> Order | None:
        """Tells the other hosts of this one. Returns the order in force."""
        self._posted = time.monotonic()
        self._write_events("config.json")  # a start that fails leaves no directory behind
        if self._leader is None:
            assert isinstance(self._board, Follower)
            before = self._board.launch
            order = self._board.order()
            if self._board.launch != before:  # a leader that was launched anew, or this host was
                self._own = Report(-1, "running" if self._trainer else "ready")
            if order is not None:
                self._ordered_at = self._posted
            with contextlib.suppress(OSError):
                self._board.post(self._own)
            return order
        assert isinstance(self._board, Alone)
        others = self._board.reports()
        before_order = self._leader.order
        order = self._leader.decide(
            {0: self._own, **others}, lambda: newest_step(self._workdir), self._posted
        )
        with contextlib.suppress(OSError):  # a full disk: this host alone goes on
            self._board.publish(order)
        if order != before_order:
            self._announce(order)
        return order

    def _announce(self, order: Order) -> None:
        assert self._leader is not None
        if order.kind != "end":
            return
        where = f"host {order.host}: " if self._hosts > 1 else ""
        if not order.final:
            in_s, newest, failures = self._leader.backoff_s, self._leader.newest, self._leader.failures
            about = {"checkpoint": newest, "failures": failures, "line": order.line, "failed": order.host}
            self._note("restarting", attempt=order.attempt + 1, in_s=in_s, **about)
            after = "no checkpoint" if newest is None else f"step {newest:,}"
            limit = self._options.policy.restarts
            _say(f"restart   {where}{order.line}; again from {after} in {in_s:.0f} s ({failures} of {limit})")
            return
        if order.code == orders.GAVE_UP:
            self._note("gave_up", line=order.line)
            _say(f"error: {where}{order.line}")
        self._note("finished", code=order.code, line=order.line)

    def _obey(self, order: Order | None) -> int | None:
        """Does what the order says. Returns the exit code when all is over."""
        now = time.monotonic()
        if order is None:
            return self._without_leader(now)
        mine = order.attempt == self._own.attempt
        if self._trainer is not None:
            if not (mine and order.kind == "go") and self._own.doing == "running" and not self._kill_at:
                self._kill_at = now + (order.grace_s if mine else 0.0)
                self._why = f"ended with host {order.host}: {order.line}" if mine else "the job began anew"
            return None
        if order.kind == "end" and order.final:
            return order.code
        if self._signals and self._own.doing == "ready":
            code = INTERRUPTED if self._signals[0] == signal.SIGINT else STOPPED
            self._own = Report(order.attempt, "ended", code, _stopped_by(self._signals[0]))
            self._posted = 0.0  # at once
            if self._leader is None:
                self._confer()
                return code
        elif order.kind == "wait" and self._own != Report(order.attempt, "ready"):
            if self._own.doing != "ended" or self._own.attempt != order.attempt:
                self._own = Report(order.attempt, "ready")
                self._posted = 0.0
        elif order.kind == "go" and mine and self._own.doing == "ready" and self._host in order.members:
            self._start(order)
        return None

    def _without_leader(self, now: float) -> int | None:
        """Waits for a leader. Where none comes, a trainer that has ended decides for this host alone."""
        if self._trainer is not None:
            return None
        if self._signals and self._own.doing == "ready":
            return INTERRUPTED if self._signals[0] == signal.SIGINT else STOPPED
        self._ordered_at = self._ordered_at or now
        over = self._own.code in (orders.DONE, *orders.FINAL)
        if now - self._ordered_at > (DEAD_S if over else DEAD_S + orders.WAIT_S):
            if over and self._own.code is not None:
                return self._own.code
            _say(f"error: host {self._host}: host 0 did not come within {orders.WAIT_S:.0f} s")
            return STOPPED
        return None

    # -------------------------------------------------------------------------------------- the trainer

    def _start(self, order: Order) -> None:
        env = dict(self._env)
        if order.address:  # some hosts are missing
            env["JAX_COORDINATOR_ADDRESS"], env["JAX_NUM_PROCESSES"] = order.address, str(len(order.members))
            env["JAX_PROCESS_ID"] = str(order.members.index(self._host))
        waited_s = time.monotonic() - self._waiting_since if self._waiting_since is not None else 0.0
        # A workdir that this job has begun may hold a run by now.
        command = [*self._command, "--resume=auto"] if order.attempt else self._command
        self._trainer = _Trainer(command, env, waited_s)
        self._own = Report(order.attempt, "running")
        self._kill_at, self._why, self._posted = 0.0, "", 0.0
        pid = self._trainer.process.pid
        self._note("started", attempt=order.attempt, hosts=list(order.members), pid=pid)

    def _watch(self, trainer: _Trainer) -> None:
        trainer.listen(POLL_S)
        code, now = trainer.process.poll(), time.monotonic()
        if code is not None:
            self._ended(trainer, code)
            return
        limit_s = trainer.beat.limit_s(self._options.limits)
        if trainer.error is not None and now - trainer.error_at > LEAVE_S:
            self._kill(trainer, "it printed its error and did not end")
        elif self._kill_at and now > self._kill_at:
            if HANGS in self._why:  # perhaps here, and another host only waits for it
                self._dump(trainer, limit_s)
            self._kill(trainer, self._why)
        elif self._forwarded and now - self._signal_at > self._stop_s(trainer):
            self._dump(trainer, limit_s)
            self._kill(trainer, f"{_stopped_by(self._signals[0])}, and did not end")
        elif not self._signals and not self._kill_at and now - trainer.at > limit_s:
            waited_s = now - trainer.at
            path = self._dump(trainer, limit_s)
            doing = f"{HANGS} in {waited_s:.0f} s of {trainer.beat.phase} (limit {limit_s:.0f} s)"
            self._kill(trainer, f"{doing}; stacks in {path}")

    def _stop_s(self, trainer: _Trainer) -> float:
        """Seconds after the first signal; a second one shortens them."""
        if len(self._signals) > 1:
            return LEAVE_S
        return SAVE_S if trainer.beat.phase == "checkpoint" else STOP_S

    def _dump(self, trainer: _Trainer, limit_s: float) -> str:
        """Writes the stacks of all threads of the trainer into the workdir. Returns the path there."""
        with contextlib.suppress(ProcessLookupError):
            trainer.process.send_signal(heartbeat.DUMP)
        end, size = time.monotonic() + STACKS_S, 0
        while time.monotonic() < end and (not size or os.fstat(trainer.stacks.fileno()).st_size > size):
            size = os.fstat(trainer.stacks.fileno()).st_size
            time.sleep(0.3)
        trainer.stacks.seek(0)
        text = trainer.stacks.read() or b"the process did not answer\n"
        path = pathlib.Path("stacks") / f"host-{self._host}-attempt-{self._own.attempt}.txt"
        with contextlib.suppress(OSError):
            (self._workdir / "stacks").mkdir(parents=True, exist_ok=True)
            (self._workdir / path).write_bytes(text)
        waited_s = round(time.monotonic() - trainer.at, 1)
        about = {"phase": trainer.beat.phase, "waited_s": waited_s, "limit_s": round(limit_s, 1)}
        self._note("stalled", attempt=self._own.attempt, step=trainer.beat.steps, **about, stacks=str(path))
        return str(path)

    def _kill(self, trainer: _Trainer, why: str) -> None:
        self._why = why
        trainer.process.kill()
        self._ended(trainer, trainer.process.wait())

    def _ended(self, trainer: _Trainer, code: int) -> None:
        trainer.listen(0)
        why = self._why or (f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
        if trainer.error is not None:
            code, why = trainer.error
        elif self._signals and code != orders.DONE and code not in orders.FINAL:
            code = INTERRUPTED if self._signals[0] == signal.SIGINT else STOPPED
        self._own = Report(self._own.attempt, "ended", code, why)
        self._note("ended", attempt=self._own.attempt, code=code, line=why, step=trainer.beat.steps)
        trainer.close()
        if trainer.beat.steps:
            self._waiting_since = time.monotonic()
        elif self._waiting_since is None:  # it died before it trained: all of its time is waiting
            self._waiting_since = trainer.began
        self._trainer, self._posted = None, 0.0

    # ------------------------------------------------------------------------------------------ signals

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._heard_at > REPEATED_S:
            self._signals.append(number)
        self._heard_at = now

    def _forward(self) -> None:
        """Passes new signals on to the trainer."""
        while self._forwarded < len(self._signals):
            number = self._signals[self._forwarded]
            self._forwarded += 1
            self._signal_at = time.monotonic()
            step = self._trainer.beat.steps if self._trainer else None
            self._note("signal", name=signal.Signals(number).name, step=step)
            if self._trainer is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._trainer.process.send_signal(number)

    def _note(self, event: str, **fields: Any) -> None:
        self._unwritten.append((event, {"time": round(time.time(), 3), **fields}))

    def _write_events(self, where: str = "") -> None:
        while self._unwritten and (self._workdir / where).exists():
            event, fields = self._unwritten.pop(0)
            events.append(self._workdir, self._host, event, **fields)


def _stopped_by(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}; the same command goes on"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))
