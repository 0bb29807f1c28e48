"""Files that need no TFDS: text, a document a file, and pairs of texts, one on each line."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping

import numpy as np

from bigmodel.config import InputError
from bigmodel.data.source import ALL, Feature, check_split, paths


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
