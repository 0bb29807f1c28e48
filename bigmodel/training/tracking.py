"""Weights & Biases: a run's metrics and pictures also go to a project (`log.wandb`).

Another process talks to it (`wandb_process.py`), so that none of its faults, a service that hangs among
them, stops a run or makes it wait, but for its uploads at the end: they are one warning, and metrics.jsonl
has everything. wandb.json in the workdir keeps the run's id, under which a resumed run goes on.
WANDB_MODE=offline writes to the workdir's `wandb/`, for `wandb sync` later.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import logging
import os
import pathlib
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from bigmodel import config as config_lib
from bigmodel import log, workdir
from bigmodel.config import Config, InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
WAIT_S = 60.0  # for the last uploads, at the end
MOST_BYTES = 16 << 20  # that wait to be sent


def check(config: Config) -> None:
    """Raises InputError where `log.wandb` is set and the first host has no wandb."""
    if not config.log.wandb or jax.process_index() != 0:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # None: a directory called wandb
        raise InputError(
            f"log.wandb={config.log.wandb}: wandb is not installed here; pip install wandb, or leave "
            "log.wandb out"
        )


@contextlib.contextmanager
def tracking(config: Config, directory: pathlib.Path) -> Iterator[Wandb | None]:
    """Starts tracking where `log.wandb` is set, and ends it with the block."""
    tracker = Wandb(config, directory) if config.log.wandb else None
    try:
        yield tracker
    except BaseException:
        if tracker is not None:
            tracker.finish(1)
        raise
    if tracker is not None:
        tracker.finish(0)


class Wandb:
    """One run at Weights & Biases; silent after its first fault."""

    def __init__(self, config: Config, directory: pathlib.Path) -> None:
        """Raises InputError where wandb.json cannot be written."""
        entity, _, project = config.log.wandb.rpartition("/")
        path = directory / "wandb.json"
        run_id = workdir.read_json(path).get("id") or secrets.token_hex(4)
        workdir.write_json(path, {"id": run_id, "project": config.log.wandb})
        self._unsent, self._unread, self._name = bytearray(), b"", f"{config.log.wandb}, run {run_id}"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = _start_process()
        except OSError as error:
            self._fail(str(error))
        begin = {
            "entity": entity or None, "project": project, "id": str(run_id), "resume": "allow",
            "dir": str(directory), "name": directory.resolve().name, "config": config_lib.to_dict(config),
        }  # fmt: skip
        limits = dict.fromkeys(("init_timeout", "login_timeout", "finish_timeout"), WAIT_S - 10)
        self._send({"start": begin, "settings": {"console": "off", "silent": True, **limits}})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics; steps that an earlier session logged stay as they are."""
        self._send({"log": dict(metrics), "step": step})

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Logs a picture, uint8 [H, W, 3]."""
        import PIL.Image

        png = io.BytesIO()
        PIL.Image.fromarray(image_HWC).save(png, "png")
        self._send({"picture": base64.b64encode(png.getvalue()).decode(), "name": name, "step": step})

    def finish(self, code: int) -> None:
        """Ends the run there: 0 for one that ended well."""
        self._send({"finish": code})
        until = time.monotonic() + WAIT_S
        while self._process is not None:
            if self._pump(max(until - time.monotonic(), 0.0)):
                if self._process is not None and self._process.wait() != 0:
                    self._fail("its process did not end well")
                self._close()
            elif time.monotonic() >= until:
                self._fail(f"it does not answer within {WAIT_S:.0f} s")

    # ------------------------------------------------------------------------------------- the other process

    def _send(self, message: dict[str, Any]) -> None:
        """Queues a message, and writes what the pipe takes."""
        if self._process is None:
            return
        self._unsent += json.dumps(message).encode() + b"\n"
        if self._pump(0.0):
            self._fail("its process has ended")
        if len(self._unsent) > MOST_BYTES:
            self._fail("its process does not keep up")

    def _pump(self, wait_s: float) -> bool:
        """Writes and reads what can be, after at most `wait_s` seconds. -> true at the end of its answers."""
        if self._process is None:
            return False
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        inlet, outlet = self._process.stdin.fileno(), self._process.stdout.fileno()
        readable, writable, _ = select.select([outlet], [inlet] if self._unsent else [], [], wait_s)
        if writable:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # broken: its answers have ended, too
                del self._unsent[: os.write(inlet, self._unsent)]
        if not readable:
            return False
        data = os.read(outlet, 1 << 16)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for answer in map(json.loads, lines):
            if "place" in answer:
                log.say(f"wandb     {self._name}, {answer['place']}")
            elif self._process is not None:
                self._fail(answer["error"])
        return not data

    def _fail(self, why: str) -> None:
        """Warns, and ends the process."""
        logging.getLogger("bigmodel").warning("log.wandb failed (%.200s); the run goes on without it", why)
        self._unsent.clear()
        if self._process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._close()

    def _close(self) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self._process.wait()
            self._process = None


def _start_process() -> subprocess.Popen[bytes]:
    """Starts wandb_process.py in a session of its own, which Ctrl-C does not reach."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "bigmodel.training.wandb_process"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, start_new_session=True,
    )  # fmt: skip
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
    return process
