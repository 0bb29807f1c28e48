"""Ends a run early, on all hosts alike: on SIGTERM, on Ctrl-C, and on another host's error.

Python runs signal handlers only between two lines of the main thread, which may wait for minutes in a
compiler, a collective or a read. So a separate thread listens for signals. Before the first step there is
nothing to save, and it ends the process at once. Later the loop finishes the step and saves it, within a time
limit.

The hosts of a job notify each other through JAX's coordination service. Otherwise, when one host fails, the
others would wait in their next collective and the failed one would wait for them in JAX's exit handler, until
both are aborted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from bigmodel.training.heartbeat import Heartbeat

STOPPED, INTERRUPTED = 75, 130  # exit codes of SIGTERM (EX_TEMPFAIL) and Ctrl-C (128 + SIGINT)
LIMIT_S = 60.0  # on top of twice the longest step; after that the loop is assumed to hang
STALLED_S = 5.0  # after a signal, a read that takes longer is abandoned
POLL_S = 1.0
ACKNOWLEDGED_S = 10.0
FAILED = "bigmodel/failed"  # keys of the coordination service
HEARD = "bigmodel/heard"
PREEMPTED = "RECEIVED_PREEMPTION_NOTICE"  # JAX's own key, set by the host that got SIGTERM

Phase = Literal["starting", "training", "saving"]


class Ending:
    """Listens for signals and for other hosts' failures from `__enter__` to `__exit__`.

    Args:
        owns_process: this object may end the process, as in a script. In a notebook it may not: there it only
            listens for SIGTERM while training.
        heartbeat: reports progress to the supervisor, if there is one.
    """

    def __init__(self, owns_process: bool = False, heartbeat: Heartbeat | None = None) -> None:
        self.owns_process = owns_process
        self.heartbeat = heartbeat or Heartbeat()
        self._phase: Phase = "starting"
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._signal, self._since, self._heard_of = 0, 0.0, False
        self._calls, self._called, self._longest_s = 0, 0.0, 0.0
        self._stopping = False
        self._client: Any = None
        self._process, self._processes = 0, 1
        self._before: dict[int, Any] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if self.owns_process:
            self._listen(signal.SIGTERM, signal.SIGINT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._unlisten()
        for thread in self._threads:
            thread.join(timeout=2 * POLL_S)

    @property
    def code(self) -> int:
        """Exit code of a run that a signal stopped."""
        return INTERRUPTED if self._signal == signal.SIGINT else STOPPED

    # ------------------------------------------------------------------------------------- for the loop

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """While this is entered, a signal makes `should_stop` true."""
        if not self.owns_process and self._processes == 1:
            self._listen(signal.SIGTERM)
        self._called = time.monotonic()
        self._enter("training")
        try:
            with self.heartbeat.phase("step"):
                yield
        finally:
            self._enter("saving")
            if not self.owns_process:
                self._unlisten()

    def should_stop(self) -> bool:
        """Returns true when the run has to stop now.

        Call it after each step and each batch of an evaluation. All hosts of a job must call it equally
        often; they get the same answer."""
        now = time.monotonic()
        self._calls += 1
        if self._calls > 2:  # the first two include one-time work
            self._longest_s = max(self._longest_s, now - self._called)
        self._called = now
        self.heartbeat.step(self._calls, self._longest_s)
        if self._stopping:
            return True
        if self._processes > 1:
            from jax.experimental import multihost_utils

            stop = bool(multihost_utils.reached_preemption_sync_point(self._calls))
        else:
            stop = self._signal != 0
        if stop:
            self._stopping = True
            self._enter("saving")  # without a time limit
        return stop

    def stalled(self) -> bool:
        """Returns true when a read should be abandoned: some seconds have passed since a signal.

        Always false in a job of several hosts, where no host can decide that alone."""
        waited = time.monotonic() - max(self._since, self._called)
        stop = self._processes == 1 and bool(self._signal) and waited > STALLED_S
        if stop:
            self._enter("saving")
        return stop

    # ------------------------------------------------------------------------------------------ the job

    def join(self) -> None:
        """Starts watching the other hosts. Call it once they are connected; does nothing on a single host."""
        import jax
        from jax._src import distributed

        if self._client is not None:
            return
        self._client = distributed.global_state.client
        self._process, self._processes = jax.process_index(), jax.process_count()
        if self._client is not None and self._processes > 1 and self.owns_process:
            self._start(self._watch)

    def end_job(self, code: int, line: str) -> None:
        """Ends every host of a job with `code`, including this one, in seconds. Returns if there is no job.

        Args:
            line: what happened; this host has already printed it.
        """
        self.heartbeat.error(line, code)
        if self._client is None or self._processes == 1:
            return
        value = json.dumps({"code": code, "line": line, "process": self._process})
        with contextlib.suppress(Exception):  # another host was first, or the service is gone
            self._client.key_value_set(FAILED, value)
        self._leave()
        os._exit(code)

    def await_news(self) -> None:
        """In a job, waits for news of another host's failure, which then ends this process: the error here
        may only be a lost connection to that host."""
        if self._client is not None and self._processes > 1:
            time.sleep(2 * POLL_S)

    def _leave(self) -> None:
        """Waits until all hosts have read the news: the first to exit breaks the others' collectives.

        Process 0 runs the service, so it exits last."""
        end = time.monotonic() + ACKNOWLEDGED_S
        with contextlib.suppress(Exception):  # the service is gone: exit too
            self._client.key_value_set(f"{HEARD}/{self._process}", "")
            while time.monotonic() < end and len(self._client.key_value_dir_get(HEARD)) < self._processes:
                time.sleep(0.1)
        if self._process == 0:
            time.sleep(0.5)

    def _watch(self) -> None:
        """Polls for another host's failure, and for JAX's notice that a host got SIGTERM."""
        while not self._closed.wait(POLL_S):
            if failed := self._get(FAILED):
                about = json.loads(failed)
                if about["process"] == self._process:
                    return
                failed_there = f"error: process {about['process']} of the job failed: "
                _say(("" if about["code"] in (STOPPED, INTERRUPTED) else failed_there) + about["line"])
                self.heartbeat.error(about["line"], about["code"])
                self._leave()
                os._exit(about["code"])
            if not self._signal and self._get(PREEMPTED):
                self._heard(signal.SIGTERM)
            self._end_if_late()

    def _get(self, key: str) -> str:
        try:
            return str(self._client.key_value_try_get(key))
        except Exception:  # NOT_FOUND, or the service is gone, which JAX handles
            return ""

    # ---------------------------------------------------------------------------------------- signals

    def _listen(self, *numbers: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._ear, self._mouth = socket.socketpair()
        for end in (self._ear, self._mouth):
            end.setblocking(False)
        for number in numbers:
            self._before[number] = signal.signal(number, self._note)
        self._wakeup = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._ear.settimeout(POLL_S / 2)
        self._start(self._hear)

    def _unlisten(self) -> None:
        if self._before and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _start(self, target: Any) -> None:
        thread = threading.Thread(target=target, name="ending", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _hear(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                for number in self._ear.recv(64):
                    if number in (signal.SIGTERM, signal.SIGINT):
                        self._heard(number)
            self._end_if_late()

    def _note(self, number: int, frame: FrameType | None = None) -> None:
        """Handles the signal in the main thread."""
        if not self._signal:
            self._signal, self._since = number, time.monotonic()

    def _heard(self, number: int) -> None:
        self._note(number)
        if self._heard_of and self.heartbeat.is_on:
            return  # a launcher may signal both; a second one is the supervisor's matter
        with self._lock:
            again, phase, self._heard_of = self._heard_of, self._phase, True
        name = signal.Signals(number).name
        if again:
            self._end(f"{name} came again: ended at once")
        elif phase == "starting":
            self._end(f"{name} before the first step: nothing was trained")
        elif self._processes > 1 and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX notices, and picks a step at which all hosts stop

    def _enter(self, phase: Phase) -> None:
        with self._lock:
            self._phase = phase

    def _end_if_late(self) -> None:
        limit_s = LIMIT_S + 2 * self._longest_s
        late = time.monotonic() - max(self._since, self._called) > limit_s
        if self._signal and self._phase == "training" and late:
            self._end(f"no step ended within {limit_s:.0f} s of the signal: it is not saved")

    def _end(self, line: str) -> None:
        if not self.owns_process:
            return
        code = self.code
        line += "; the same command goes on" if code == STOPPED else ""
        _say(line)
        self.end_job(code, line)
        os._exit(code)


def _say(line: str) -> None:
    """Writes to stderr without Python's own buffers, whose locks another thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))


_taken: list[Ending] = []


def take_over(heartbeat: Heartbeat | None = None) -> Ending:
    """Returns this process's `Ending`, which from now on may end the process. For scripts."""
    if not _taken:
        _taken.append(Ending(owns_process=True, heartbeat=heartbeat).__enter__())
    return _taken[0]


def taken() -> Ending | None:
    """Returns the result of `take_over`, or None if it was not called."""
    return _taken[0] if _taken else None
