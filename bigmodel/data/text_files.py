"""Text files, a document a file: what is read, and which parts of it are held out."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Unpack

import numpy as np

from bigmodel.config import InputError
from bigmodel.data.source import ALL, TEST_FRACTION, Feature, Reading, check_split, is_test, paths

BLOCKS = 10  # of a file that go to test, each with what follows it up to the next


class TextFiles:
    """`text:GLOB`: each file is a document; about `test_fraction` of them, by a hash of the content, are
    `test`, the others `train`. Of a single file its end is `test`, from the start of a line.

    With split_by=blocks ten blocks of each file, spread over it, are `test`, what is between them `train`.
    """

    features: Mapping[str, Feature] = {"text": Feature((), "text")}

    def __init__(self, name: str, split: str, **how: Unpack[Reading]) -> None:
        check_split(name, split)
        by_block, fraction = how.get("split_by") == "blocks", how.get("test_fraction", TEST_FRACTION)
        texts = paths(name, "text:books/*.txt")
        self._parts: list[tuple[str, int, int]] = []  # path, first byte, end byte
        contents = {path: content_hash(read_bytes(path)) for path in texts}
        tests = test_hashes(set(contents.values()), fraction)
        is_single = len(tests) == len(set(contents.values()))
        self.split_rule = "the end of the file" if is_single else "files by a hash of their content"
        self.split_rule = f"{BLOCKS} blocks of each file" if by_block else self.split_rule
        digest = hashlib.sha256()
        for path in texts:
            content = read_bytes(path)
            if split == ALL:
                spans = [(0, len(content))]
            elif by_block or is_single:
                spans = _spans(content, split, BLOCKS if by_block else 1, fraction)
            else:
                spans = [(0, len(content))] if (contents[path] in tests) == (split == "test") else []
            for start, end in spans:
                self._parts.append((path, start, end))
                digest.update(hashlib.sha256(content[start:end]).digest())
        if not self._parts:
            raise InputError(f"data.name={name!r} has no text in split {split!r}; give more or longer files")
        self.num_bytes = sum(end - start for _, start, end in self._parts)
        # The content, not the path: a run may resume where the files lie elsewhere.
        self.fingerprint = (
            f"text/{split} records={len(self)} bytes={self.num_bytes} sha256={digest.hexdigest()[:16]}"
        )

    def __len__(self) -> int:
        return len(self._parts)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        out = np.empty(len(indices), object)
        for row, index in enumerate(indices):
            path, start, end = self._parts[index]
            out[row] = read_bytes(path, start, end)
            if len(out[row]) != end - start:
                raise InputError(f"{path} became shorter while it was read; start again")
            try:
                out[row].decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path} is not UTF-8 text ({error}); convert it or leave it out") from None
        return {"text": out}


def content_hash(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def _spans(content: bytes, split: str, count: int, fraction: float) -> list[tuple[int, int]]:
    """Cuts a text at starts of lines into `count` blocks, whose ends are `test` -> (first, end byte)."""

    def line(share: float) -> int:
        at = int(len(content) * share)
        return content.find(b"\n", at) + 1 or len(content) if at else 0

    ends = [line((block + 1) / count) for block in range(count - 1)] + [len(content)]
    starts, cuts = [0, *ends[:-1]], [line((block + 1 - fraction) / count) for block in range(count)]
    both = zip(cuts, ends, strict=True) if split == "test" else zip(starts, cuts, strict=True)
    return [(start, end) for start, end in both if end > start]


def test_hashes(hashes: set[int], fraction: float) -> set[int]:
    """About `fraction` of the files' hashes, but at least one, and not all where there are two."""
    tests = {each for each in hashes if is_test(each, fraction)}
    return tests if 0 < len(tests) < len(hashes) else {min(hashes)}


def read_bytes(path: str, start: int = 0, end: int | None = None) -> bytes:
    """Reads a file from byte `start` up to `end`. Raises InputError where it cannot be read."""
    try:
        with pathlib.Path(path).open("rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)
    except OSError as error:
        raise InputError(f"data.name: {path} cannot be read: {error.strerror}") from error
