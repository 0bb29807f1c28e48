"""Decodes PNG and JPEG files, here or in a child process with limits on memory and time.

A few bytes of a file can claim gigabytes of pixels, and decoders have bugs: so a server decodes what
strangers send in a child process. This file is also that child's program, so it imports nothing of the
package.

Legend: H height, W width, C channels.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import IO

import cv2
import numpy as np

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
PIXELS = 1 << 28  # of a picture that is decoded without other limits
NO_PICTURE = "no image that can be decoded; give a PNG or a JPEG"
_MEM, _ASK, _SAY = struct.Struct("<Q"), struct.Struct("<QB"), struct.Struct("<B3Q")


class PictureError(ValueError):
    """A file that is not a picture, or too large; its message is one line."""


def size(content: bytes) -> tuple[int, int]:
    """-> (height, width) by the header. Raises PictureError for what is neither PNG nor JPEG."""
    if content.startswith(PNG) and content[12:16] == b"IHDR" and len(content) >= 24:
        width, height = struct.unpack(">2I", content[16:24])
        return height, width
    if content.startswith(JPEG):
        return _jpeg_size(content)
    raise PictureError(NO_PICTURE)


def _jpeg_size(content: bytes) -> tuple[int, int]:
    """Reads the frame's header (ISO 10918-1, B.2.2), which follows other segments."""
    at = 2
    while at + 9 <= len(content):
        if content[at] != 0xFF:
            break
        marker = content[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without a length
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">2H", content[at + 5 : at + 9])
            return height, width
        else:
            at += 2 + int(struct.unpack(">H", content[at + 2 : at + 4])[0])
    raise PictureError(NO_PICTURE)


def decode(content: bytes, channels: int, most_pixels: int = PIXELS) -> np.ndarray:
    """A PNG's or JPEG's bytes -> uint8 [H, W, C] (RGB, or gray), as training sees it (data/sources.py): an
    orientation in the EXIF data is ignored. Raises PictureError."""
    check(content, most_pixels)
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except (cv2.error, MemoryError) as error:
        raise PictureError(NO_PICTURE) from error
    if image is None:
        raise PictureError(NO_PICTURE)
    return image[..., None] if channels == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def check(content: bytes, most_pixels: int) -> None:
    """Raises PictureError unless the header is that of a PNG or JPEG with no more than so many pixels."""
    height, width = size(content)
    if height * width > most_pixels or not height * width:
        said = f"an image of {width} x {height} pixels; give one of 1 to {most_pixels} pixels"
        raise PictureError(said)


class PictureDecoder:
    """`decode` in a child process, which is started when needed and ended when it takes too long.

    One picture at a time; for several threads.
    """

    def __init__(self, most_pixels: int, mem_bytes: int = 0, limit_s: float = 10.0) -> None:
        """
        Args:
            mem_bytes: that the child may take beyond what it needs when idle; 0: by the pixels.
            limit_s: for one picture.
        """
        self.most_pixels, self.limit_s = most_pixels, limit_s
        self.mem_bytes = mem_bytes or 16 * most_pixels + (128 << 20)
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def decode(self, content: bytes, channels: int) -> np.ndarray:
        """uint8 [H, W, C]. Raises PictureError, also for what takes too long or too much memory."""
        check(content, self.most_pixels)
        with self._lock:
            child = self._started()
            try:
                return self._answer(child, content, channels)
            except (OSError, EOFError, TimeoutError) as error:
                self._end()
                raise PictureError("the image takes too much time or memory to decode") from error

    def warm(self) -> None:
        """Starts the child, so that no request waits for that."""
        with self._lock:
            self._started()

    def close(self) -> None:
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._end()
            self._child = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert self._child.stdin is not None
            os.write(self._child.stdin.fileno(), _MEM.pack(self.mem_bytes))
        return self._child

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(BrokenPipeError):  # bytes that it did not read
                    pipe.close()  # type: ignore[union-attr]
        self._child = None

    def _answer(self, child: subprocess.Popen[bytes], content: bytes, channels: int) -> np.ndarray:
        assert child.stdin is not None
        assert child.stdout is not None
        until = time.monotonic() + self.limit_s
        _write(child.stdin.fileno(), _ASK.pack(len(content), channels) + content, until)
        good, *shape = _SAY.unpack(_read(child.stdout.fileno(), _SAY.size, until))
        if not good:
            raise PictureError(NO_PICTURE)
        raw = _read(child.stdout.fileno(), int(np.prod(shape)), until)
        return np.frombuffer(raw, np.uint8).reshape(shape)


def _write(pipe: int, content: bytes, until: float) -> None:
    view = memoryview(content)
    while view:
        if not select.select([], [pipe], [], max(until - time.monotonic(), 0))[1]:
            raise TimeoutError
        view = view[os.write(pipe, view[: select.PIPE_BUF]) :]  # never blocks where the pipe is writable


def _read(pipe: int, count: int, until: float) -> bytearray:
    out = bytearray()
    while len(out) < count:
        if not select.select([pipe], [], [], max(until - time.monotonic(), 0))[0]:
            raise TimeoutError
        part = os.read(pipe, min(count - len(out), 1 << 20))
        if not part:
            raise EOFError
        out += part
    return out


# ------------------------------------------------------------------------------------------------ the child


def _exactly(file: IO[bytes], count: int) -> bytes:
    content = file.read(count)
    if len(content) < count:
        sys.exit(0)  # the parent has gone
    return content


def _serve() -> None:
    """Decodes what comes in on stdin to stdout, until that ends; the first there is its memory's limit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    cv2.setNumThreads(1)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    (mem_bytes,) = _MEM.unpack(_exactly(source, _MEM.size))
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + mem_bytes, now + mem_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        length, channels = _ASK.unpack(_exactly(source, _ASK.size))
        try:
            image = decode(_exactly(source, length), channels)
        except PictureError:
            sink.write(_SAY.pack(0, 0, 0, 0))
        else:
            sink.write(_SAY.pack(1, *image.shape))
            sink.write(image.data if image.flags.c_contiguous else image.tobytes())
        sink.flush()


if __name__ == "__main__":
    _serve()
