"""Token ids in a file that is mapped into memory, with a checksum for each block of it.

Beside NAME.bin lies NAME.crc: the CRC-32 of each BLOCK bytes. A file of up to CHECKED_AT_OPEN bytes is
compared with them when it is opened; of a larger one each block is, the first time that it is read. So
nothing of an overwritten or damaged file reaches a model, and a long corpus opens at once.
"""

from __future__ import annotations

import pathlib
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bigmodel.config import InputError
from bigmodel.disk import write_atomically

BLOCK = 1 << 16  # bytes: about 0.1 ms of checking for the first window that is read of one
CHECKED_AT_OPEN = 1 << 27


class TokenFile(np.memmap):
    """Ids (N,) of a whole file; what is read is to be checked before, by `check`."""

    crc: np.ndarray  # uint32: of each block
    checked: np.ndarray  # bool: whether a block has been compared

    def check(self, first: np.ndarray, last: np.ndarray) -> None:
        """Compares the blocks that hold the ids `first[i]` to `last[i]` with their checksums, once each.

        Raises:
            InputError: one differs; the file is then removed, so that the next start makes it anew.
        """
        a, b = (at.astype(np.int64) * self.dtype.itemsize // BLOCK for at in (first, last))
        wanted = {block for x, y in zip(a.tolist(), b.tolist(), strict=True) for block in range(x, y + 1)}
        for block in sorted(block for block in wanted if not self.checked[block]):
            if _crc(self, block) != self.crc[block]:
                path = pathlib.Path(str(self.filename))
                path.unlink(missing_ok=True)
                raise InputError(
                    f"{path}: block {block} is not what was written (CRC-32 differs): the file was damaged "
                    "or overwritten. It is removed; start again, and it is made anew"
                )
            self.checked[block] = True


def write(path: pathlib.Path, chunks: Iterable[np.ndarray]) -> None:
    """Writes ids and their checksums. Raises InputError where it cannot."""
    crc, rest = list[int](), b""

    def put(file: Any) -> None:
        nonlocal rest
        for chunk in chunks:
            content = chunk.tobytes()
            file.write(content)
            rest += content
            complete = len(rest) // BLOCK * BLOCK
            crc.extend(zlib.crc32(rest[at : at + BLOCK]) for at in range(0, complete, BLOCK))
            rest = rest[complete:]

    _sums(path).unlink(missing_ok=True)  # first: those of another content are never beside this one
    write_atomically(path, put)
    crc.extend([zlib.crc32(rest)] if rest else [])
    write_atomically(_sums(path), lambda file: file.write(np.array(crc, np.uint32).tobytes()))


def open_checked(path: pathlib.Path, dtype: np.dtype) -> TokenFile | str:
    """The file, or in words why it is not as `write` left it; "" where it is not there at all."""
    if not path.is_file() or not _sums(path).is_file():
        return "its checksums are missing" if path.is_file() else ""
    size, sums = path.stat().st_size, _sums(path).read_bytes()
    if not size or size % dtype.itemsize or len(sums) != 4 * -(-size // BLOCK):
        return "it is cut short"
    file = TokenFile(path, dtype, "r")
    file.crc, file.checked = np.frombuffer(sums, np.uint32), np.zeros(len(sums) // 4, bool)
    if size <= CHECKED_AT_OPEN:
        with ThreadPoolExecutor() as pool:  # zlib lets go of the interpreter lock
            found = np.array(list(pool.map(lambda block: _crc(file, block), range(len(file.crc)))), np.uint32)
        if len(bad := np.flatnonzero(found != file.crc)):
            return f"block {bad[0]} of it is not what was written (CRC-32 differs)"
        file.checked[:] = True
    return file


def _sums(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".crc")


def _crc(file: TokenFile, block: int) -> int:
    step = BLOCK // file.dtype.itemsize
    return zlib.crc32(np.asarray(file[block * step : (block + 1) * step]).view(np.uint8).data)
