"""Output of a run's numbers: metrics.jsonl always, TensorBoard, a live progress line, pictures.

Only process 0 writes. Every other file of the package logs through `logging.getLogger("bigmodel")`.

metrics.jsonl has one JSON object per line. It is only ever appended to. A resume that drops lines (of steps
after its checkpoint, or cut short by a kill) replaces the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from bigmodel import disk
from bigmodel.disk import InputError


class _Console(Console):
    """A console that survives a closed pipe, as of `| head`: the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        disk.to_nowhere(sys.stdout.fileno())


console = _Console(highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Prints a line, on process 0 alone."""
    if jax.process_index() == 0:
        _print(line)


def _print(line: str) -> None:
    """Prints to stdout. If stdout is a file on a full disk, the run goes on without it."""
    try:
        console.print(line, markup=False)
        sys.stdout.flush()
    except OSError as error:
        console.quiet = True
        disk.to_nowhere(sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(
                f"warning: stdout cannot be written ({disk.cause(error)}); the run goes on", file=sys.stderr
            )


@contextlib.contextmanager
def doing(line: str, every_s: float = 20) -> Iterator[None]:
    """Prints `line` at once, and again with the time every so often, so that a start is never silent."""
    ended, began = threading.Event(), time.monotonic()

    def remind() -> None:
        while not ended.wait(every_s):
            say(f"{line} ... {time.monotonic() - began:.0f} s")

    say(line)
    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(
            f"{record.levelname.lower()}: {record.getMessage()}"
            if record.levelno > logging.INFO
            else record.getMessage()
        )


def show_logging() -> None:
    """Sends the package's log records to the console, without breaking the progress line."""
    logger = logging.getLogger("bigmodel")
    if not logger.handlers:
        logger.addHandler(_Handler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


# These print hundreds of lines about a failing save; the error's own line says the same.
LIBRARIES = ("absl", "orbax")


def show_libraries(verbose: bool) -> None:
    """Shows all messages of the libraries that save, or none: an error that stops a run says enough."""
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.CRITICAL)


class Tracker(Protocol):
    """A service that gets what `Writer` writes, too."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None: ...


class Writer:
    """Writes metrics by step. A context manager; one for each run, in every process."""

    def __init__(
        self, directory: pathlib.Path, *, first_step: int, tensorboard: bool, tracker: Tracker | None = None
    ) -> None:
        """Drops the lines after `first_step`: they are of steps that no checkpoint has.

        Raises:
            InputError: something cannot be written; from `write` and `picture`, too.
        """
        self._directory, self._path = directory, directory / "metrics.jsonl"
        self._file, self._board, self._tracker = None, None, tracker
        if jax.process_index() != 0:
            return
        self._file = self._open(first_step)
        if tensorboard:
            self._board = _Board(directory / "tb", first_step + 1)

    def _open(self, first_step: int) -> io.FileIO:
        _keep_up_to(self._path, first_step)
        with disk.writing(self._path):
            return self._path.open("ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Drops the lines after `step`; the run goes on from there."""
        if self._file is None:
            return
        self._file.close()
        self._file = self._open(step)
        if self._board is not None:
            self._board.begin(step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line; `step` counts the training steps done."""
        if self._file is None:
            return
        # JSON has no NaN or infinity: null.
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n"
        with disk.writing(self._path):
            _append(self._file, line.encode())
        if self._board is not None:
            self._board.scalars(step, values)
        if self._tracker is not None:
            self._tracker.write(step, metrics)

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """uint8 [H, W, 3] -> pictures/<name>-<step>.png in the workdir, and TensorBoard."""
        if self._file is None:
            return
        import cv2

        path = self._directory / "pictures" / f"{name}-{step:07}.png"
        _, png = cv2.imencode(".png", image_HWC[..., ::-1])
        disk.write_atomically(path, lambda file: file.write(png.tobytes()), "make room")
        if self._board is not None:
            self._board.image(step, name, image_HWC)
        if self._tracker is not None:
            self._tracker.picture(step, name, image_HWC)

    def text(self, step: int, name: str, texts: Sequence[str]) -> None:
        """Writes texts to <name>/<step>.txt in the workdir."""
        if self._file is not None:
            content = ("\n\n".join(texts) + "\n").encode(errors="backslashreplace")
            path = self._directory / name / f"{step:07}.txt"
            disk.write_atomically(path, lambda file: file.write(content), "make room")

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


class _Board:
    """TensorBoard's event file, written directly: tensorboardX's own writer uses a thread, whose errors are
    lost and then block the run."""

    def __init__(self, directory: pathlib.Path, purge_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._directory, self._event = directory, event_pb2.Event
        with disk.writing(directory):
            directory.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(directory / "events"))
        self.begin(purge_step)

    def begin(self, step: int) -> None:
        """Hides what was written of this step and later ones."""
        from tensorboardX.proto import event_pb2

        self._write(step=step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self._flush()

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        from tensorboardX import summary

        for name, value in values.items():
            if value is not None:
                self._write(step=step, summary=summary.scalar(name, value))
        self._flush()

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        from tensorboardX import summary

        self._write(step=step, summary=summary.image(name, image_HWC, dataformats="HWC"))
        self._flush()

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            logging.getLogger("bigmodel").warning("%s: %s", self._directory, disk.cause(error))
            with contextlib.suppress(OSError):  # a flush that fails leaves its file open
                self._writer._py_recordio_writer.close()

    def _write(self, **event: Any) -> None:
        with disk.writing(self._directory):
            self._writer.write_event(self._event(wall_time=time.time(), **event))

    def _flush(self) -> None:
        with disk.writing(self._directory):
            self._writer.flush()


class Progress:
    """The progress line: updated in place on a terminal, printed anew elsewhere."""

    def __init__(self) -> None:
        self._live: Live | None = None
        if jax.process_index() == 0 and console.is_terminal:
            self._live = Live(Text(""), console=console, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, line: str) -> None:
        if self._live is not None:
            self._live.update(Text(line))
        else:
            say(line)


def read_metrics(directory: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, oldest first; skips damaged ones with a warning."""
    path = directory / "metrics.jsonl"
    found = read_lines(path)
    if found.bad:
        logging.getLogger("bigmodel").warning("%s is damaged in %s; left out", path, numbered(found.bad))
    return found.rows


def last_evaluation(directory: pathlib.Path) -> dict[str, float]:
    """Returns the newest evaluation in metrics.jsonl; {} without one."""
    found: dict[str, float] = {}
    for row in read_metrics(directory):
        found = {name: x for name, x in row.items() if name.startswith("eval/") and x is not None} or found
    return found


def _keep_up_to(path: pathlib.Path, last_step: int) -> None:
    """Drops the lines after a step, and a line that a kill cut short; a damaged file is copied first.

    Raises:
        InputError: the new file cannot be written; then nothing changes.
    """
    found = read_lines(path)
    bad = found.bad
    pairs = zip(found.rows, found.lines, strict=True)
    content = b"".join(line for row, line in pairs if row["step"] <= last_step)
    if not path.exists() or len(content) == path.stat().st_size:
        return
    if bad:
        damaged = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        original = path.read_bytes()
        disk.write_atomically(damaged, lambda file: file.write(original), "make room")
        logging.getLogger("bigmodel").warning(
            "%s is damaged in %s; the rest goes on, the file as it was is kept as %s",
            path, numbered(bad), damaged.name,
        )  # fmt: skip
    disk.write_atomically(path, lambda file: file.write(content), "make room")


@dataclass(frozen=True)
class Lines:
    """Sound lines of a metrics.jsonl, and the numbers of the damaged ones."""

    rows: list[dict[str, Any]]
    lines: list[bytes]  # of the rows, as they are in the file
    bad: list[int]
    every: int = 1  # each `every`-th line was read, and those with an evaluation


def read_lines(path: pathlib.Path, most: int = 0) -> Lines:
    """Reads a metrics.jsonl. The last line may lack its end, after a kill: it is neither sound nor damaged.

    Args:
        most: about how many lines to read, evenly spaced, those with an evaluation always; 0: all.
    """
    if not path.exists():
        return Lines([], [], [])
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({disk.cause(error)}); move it away") from error
    found = Lines([], [], [], -(-len(lines) // most) if most and lines else 1)
    for number, line in enumerate(lines, 1):
        if number % found.every and number < len(lines) and b'"eval/' not in line:
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            found.rows.append(row)
            found.lines.append(line + b"\n")
        else:
            found.bad.append(number)
    return found


def numbered(lines: list[int]) -> str:
    """`lines 3, 7, 9 and 2 more`."""
    some = ", ".join(map(str, lines[:3])) + (f" and {len(lines) - 3} more" if len(lines) > 3 else "")
    return f"line{'s' if len(lines) > 1 else ''} {some}"


def _append(file: io.FileIO, line: bytes) -> None:
    """Appends a complete line or nothing."""
    begin = os.fstat(file.fileno()).st_size
    try:
        done = 0
        while done < len(line):
            done += file.write(line[done:]) or 0
    except OSError:
        file.truncate(begin)
        raise
