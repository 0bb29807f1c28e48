"""Files that need no TFDS: text, a document a file, and pairs of texts, one on each line."""

from __future__ import annotations

import glob
import hashlib
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bigmodel.config import InputError

ALL = "all"  # a split for evaluation on other files than those of training: every record


@dataclass(frozen=True)
class Feature:
    """One column of a source. Text has dtype `text` and shape (); None in `shape` varies by record."""

    shape: tuple[int | None, ...]
    dtype: str
    num_classes: int | None = None
    names: tuple[str, ...] = ()  # of the classes


class Source(Protocol):
    """Records by index."""

    @property
    def features(self) -> Mapping[str, Feature]: ...

    fingerprint: str  # name, version, split, length and bytes: two equal ones hold the same records
    num_bytes: int  # as stored; 0 when unknown

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """(n,) int -> {feature: (n, *shape)}; text as an object array of UTF-8 bytes.

        Raises:
            InputError: a record is damaged.
        """
        ...


class TextFiles:
    """`text:GLOB`: each file is a document; about a tenth of them, by a hash of the content, are `test`.

    The others are `train`. Of a single file, the last 10 % (from the next start of a line) are `test`.
    """

    features: Mapping[str, Feature] = {"text": Feature((), "text")}

    def __init__(self, name: str, split: str) -> None:
        check_split(name, split)
        texts = paths(name, "text:books/*.txt")
        self._parts: list[tuple[str, int, int]] = []  # path, first byte, end byte
        contents = {path: content_hash(read_bytes(path)) for path in texts}
        tests = test_hashes(set(contents.values()))
        digest = hashlib.sha256()
        for path in texts:
            content = read_bytes(path)
            if split == ALL:
                start, end = 0, len(content)
            elif len(tests) == len(set(contents.values())):  # one text only
                cut = content.find(b"\n", int(len(content) * 0.9)) + 1 or len(content)
                start, end = (0, cut) if split == "train" else (cut, len(content))
            else:
                start, end = 0, len(content) if (contents[path] in tests) == (split == "test") else 0
            if end > start:
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
            out[row] = read_bytes(path)[start:end]
            if len(out[row]) != end - start:
                raise InputError(f"{path} became shorter while it was read; start again")
            try:
                out[row].decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path} is not UTF-8 text ({error}); convert it or leave it out") from None
        return {"text": out}


def check_split(name: str, split: str) -> None:
    if split not in ("train", "test", ALL):
        raise InputError(
            f"split {split!r} of data.name={name!r} is unknown; set data.split or data.eval_split "
            "to train or test, or to all"
        )


def paths(name: str, example: str) -> list[str]:
    """The files of `text:GLOB` or `pairs:GLOB`, sorted; what exists by that very name is meant."""
    pattern = literal(os.path.expanduser(name.partition(":")[2]))
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        raise InputError(f"data.name={name!r} matches no file; give a path or a glob such as {example}")
    return found


def literal(pattern: str) -> str:
    """A glob whose longest beginning that exists, file or directory, is meant as it is written."""
    parts = pattern.split(os.sep)
    for count in range(len(parts), 0, -1):
        beginning = os.sep.join(parts[:count])
        if beginning and os.path.exists(beginning):
            return os.sep.join([glob.escape(beginning), *parts[count:]])
    return pattern


def content_hash(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def test_hashes(hashes: set[int]) -> set[int]:
    """About a tenth of the files' hashes, but at least one, and not all where there are two."""
    tests = {each for each in hashes if each % 10 == 0}
    return tests if 0 < len(tests) < len(hashes) else {min(hashes)}


def read_bytes(path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"data.name: {path} cannot be read: {error.strerror}") from error


# ------------------------------------------------------------------------------------------- parallel text


class PairFiles:
    """`pairs:GLOB`: files with a source and its target on each line, a tab between them.

    Every line is a record: `source`, `target`, and `text`, which is both (for a tokenizer to learn from).

    About a tenth of the lines, by a hash of the content, are `test`, the others `train`.
    """

    features: Mapping[str, Feature] = {name: Feature((), "text") for name in ("source", "target", "text")}

    def __init__(self, name: str, split: str) -> None:
        """Reads all lines.

        Raises:
            InputError: no file, an unknown split, a line that is no pair or no UTF-8.
        """
        check_split(name, split)
        lines = [line for path in paths(name, "pairs:data/*.tsv") for line in _lines(path)]
        test = split == "test"
        self._lines = [x for x in lines if split == ALL or (content_hash(x) % 10 == 0) == test]
        if not self._lines:
            raise InputError(f"data.name={name!r} has no line in split {split!r}; give more lines")
        self.num_bytes = sum(map(len, self._lines))
        digest = hashlib.sha256(b"\n".join(self._lines)).hexdigest()[:16]
        self.fingerprint = f"pairs/{split} records={len(self)} bytes={self.num_bytes} sha256={digest}"

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        out = {key: np.empty(len(indices), object) for key in self.features}
        for row, index in enumerate(indices):
            line = self._lines[index]
            source, _, target = line.partition(b"\t")
            out["source"][row], out["target"][row], out["text"][row] = source, target, line
        return out


def _lines(path: str) -> list[bytes]:
    """The lines of a file, each checked; empty ones are left out."""
    lines = read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        columns = line.removesuffix(b"\r").split(b"\t")
        if columns == [b""]:
            continue
        if len(columns) != 2 or not columns[0].strip() or not columns[1].strip():
            found = f"{len(columns)} columns" if len(columns) != 2 else "an empty column"
            raise InputError(f"{path} line {number} has {found}; write source, one tab, target")
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} line {number} is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
            ) from None
    return [line.removesuffix(b"\r") for line in lines if line.removesuffix(b"\r")]
