"""Where records come from: any TFDS dataset, the bundled ones, or text files; no TensorFlow at run time.

    source = open_source("mnist", "train", data_dir)
    source.read(np.array([3, 1]))  # {"image": uint8 (2, 28, 28, 1), "label": int64 (2,)}

A source gives random access, so the order of a run can be a pure function of (seed, step). For that a TFDS
dataset has to be prepared as array_record; scripts/prepare_data.py does it.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import math
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bigmodel.config import InputError
from bigmodel.data.builders.prepare import find, one_line, prepared

log = logging.getLogger("bigmodel")

BIG_IMAGE_BYTES = 64 * 64 * 3  # decoding one takes long enough for a thread to pay
CACHE_FRACTION = 0.25  # of this machine's memory: a decoded split that needs more is not kept


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


def open_source(
    name: str,
    split: str,
    data_dir: str | None = None,
    *,
    keys: Collection[str] | None = None,
    cache: bool = True,
) -> Source:
    """Opens a split of a dataset; a bundled one is made first if need be.

    Args:
        name: `mnist`, `name/config:version` (TFDS), `python_source`, `digits`, `text:GLOB` or `pairs:GLOB`.
        split: a split's name, or a TFDS slice of it such as `train[:10%]`.
        data_dir: TFDS's directory; None is its own default.
        keys: the features to read; None reads all plain ones (images, labels, text).
        cache: keep decoded records of fixed size in memory, so each is decoded once.

    Raises:
        InputError: unknown or not prepared dataset, unknown split, no data, no random access.
    """
    if name.startswith("text:"):
        return TextFiles(name, split)
    if name.startswith("pairs:"):
        return PairFiles(name, split)
    return TfdsSource(name, split, data_dir, keys=keys, cache=cache)


def features_of(name: str, data_dir: str | None = None) -> Mapping[str, Feature]:
    """The features of a dataset whose data need not be there (they are part of its TFDS code).

    Raises:
        InputError: unknown dataset.
    """
    if name.startswith("text:"):
        return TextFiles.features
    if name.startswith("pairs:"):
        return PairFiles.features
    return _features(find(name, data_dir))


# ------------------------------------------------------------------------------------------ text files


class TextFiles:
    """`text:GLOB`: each file is a document; about a tenth of them, by a hash of the content, are `test`.

    The others are `train`. Of a single file, the last 10 % (from the next start of a line) are `test`.
    """

    features: Mapping[str, Feature] = {"text": Feature((), "text")}

    def __init__(self, name: str, split: str) -> None:
        _check_split(name, split)
        paths = _paths(name, "text:books/*.txt")
        self._parts: list[tuple[str, int, int]] = []  # path, first byte, end byte
        contents = {path: _content_hash(_read_bytes(path)) for path in paths}
        tests = _test_hashes(set(contents.values()))
        digest = hashlib.sha256()
        for path in paths:
            content = _read_bytes(path)
            if len(tests) == len(set(contents.values())):  # one text only
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
            out[row] = _read_bytes(path)[start:end]
            if len(out[row]) != end - start:
                raise InputError(f"{path} became shorter while it was read; start again")
            try:
                out[row].decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path} is not UTF-8 text ({error}); convert it or leave it out") from None
        return {"text": out}


def _check_split(name: str, split: str) -> None:
    if split not in ("train", "test"):
        raise InputError(
            f"split {split!r} of data.name={name!r} is unknown; set data.split or data.eval_split "
            "to train or test"
        )


def _paths(name: str, example: str) -> list[str]:
    """The files of `text:GLOB` or `pairs:GLOB`, sorted."""
    pattern = os.path.expanduser(name.partition(":")[2])
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise InputError(f"data.name={name!r} matches no file; give a path or a glob such as {example}")
    return paths


def _content_hash(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def _test_hashes(hashes: set[int]) -> set[int]:
    """About a tenth of the files' hashes, but at least one, and not all where there are two."""
    tests = {each for each in hashes if each % 10 == 0}
    return tests if 0 < len(tests) < len(hashes) else {min(hashes)}


def _read_bytes(path: str) -> bytes:
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
        _check_split(name, split)
        lines = [line for path in _paths(name, "pairs:data/*.tsv") for line in _lines(path)]
        self._lines = [line for line in lines if (_content_hash(line) % 10 == 0) == (split == "test")]
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
    lines = _read_bytes(path).split(b"\n")
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


# ------------------------------------------------------------------------------------------------ TFDS


class TfdsSource:
    """A split of a TFDS dataset that lies on disk as array_record."""

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | None,
        *,
        keys: Collection[str] | None = None,
        cache: bool = True,
    ) -> None:
        builder = prepared(name, data_dir)
        features = _features(builder)
        self.features = {key: features[key] for key in features if keys is None or key in keys}
        self._where = f"{builder.info.full_name} split {split!r}"
        self._records = _open_records(builder, split, name)
        self._decoders = {key: _decoder(builder.info.features[key]) for key in self.features}
        if not len(self._records):
            raise InputError(f"data.name={name!r} has no records in split {split!r}; choose another split")
        splits = builder.info.splits  # a part of a split does not know its bytes
        self.num_bytes = int(splits[split].num_bytes if split in splits else builder.info.dataset_size)
        self.fingerprint = f"{builder.info.full_name}/{split} records={len(self)} bytes={self.num_bytes}"
        self._threads: ThreadPoolExecutor | None = None
        self._kept: dict[str, np.ndarray] = self._room_for_all() if cache else {}
        self._have = np.zeros(len(self) if self._kept else 0, bool)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        if not self._kept:
            return self._decode(indices)
        missing = np.unique(indices[~self._have[indices]])
        if len(missing):
            for key, column in self._decode(missing).items():
                self._kept[key][missing] = column
            self._have[missing] = True  # after the data: another thread may be reading
        return {key: column[indices] for key, column in self._kept.items()}

    def _room_for_all(self) -> dict[str, np.ndarray]:
        """Empty columns for the whole split, or {} where sizes vary or memory is short."""
        shapes = {key: _fixed(feature) for key, feature in self.features.items()}
        columns: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for key, shape in shapes.items():
            if shape is None:
                return {}
            columns[key] = (len(self), *shape), np.dtype(self.features[key].dtype)
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in columns.values())
        if size > CACHE_FRACTION * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            log.warning("%s needs %.1f GB decoded: it is decoded anew each epoch", self._where, size / 1e9)
            return {}
        return {key: np.empty(shape, dtype) for key, (shape, dtype) in columns.items()}

    def _decode(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        records = self._fetch(indices) if len(indices) else []
        shapes = [_fixed(feature) for key, feature in self.features.items() if feature.dtype != "text"]
        if any(shape is None or math.prod(shape) >= BIG_IMAGE_BYTES for shape in shapes):
            self._threads = self._threads or ThreadPoolExecutor(os.cpu_count(), "decode")
            rows = list(self._threads.map(self._decode_one, records, indices))
        else:
            rows = [self._decode_one(*pair) for pair in zip(records, indices, strict=True)]
        return {key: self._stack(key, [row[key] for row in rows]) for key in self.features}

    def _stack(self, key: str, column: list[Any]) -> np.ndarray:
        shape = _fixed(self.features[key])
        if shape is None:
            out = np.empty(len(column), object)
            out[:] = column
            return out
        return np.array(column, self.features[key].dtype).reshape(len(column), *shape)

    def _fetch(self, indices: np.ndarray) -> Sequence[bytes]:
        try:
            return self._records.__getitems__(indices.tolist())
        except Exception:  # array_record raises several kinds, none of which says which record it was
            for index in indices.tolist():
                try:
                    self._records[index]
                except Exception as error:
                    raise self._damaged(index, error) from error
            raise

    def _decode_one(self, record: bytes, index: int) -> dict[str, Any]:
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            stored = tf_example_pb2.Example.FromString(record).features.feature
            return {key: decode(stored[key]) for key, decode in self._decoders.items()}
        except Exception as error:  # protobuf's, OpenCV's and TFDS's own
            raise self._damaged(index, error) from error

    def _damaged(self, index: int, error: Exception) -> InputError:
        return InputError(
            f"{self._where} record {index} is damaged ({one_line(error)}); prepare it again, or, of images, "
            "skip it by data.max_skipped"
        )


def _fixed(feature: Feature) -> tuple[int, ...] | None:
    """The shape, when every record has the same."""
    if feature.dtype == "text":
        return None
    sizes = tuple(size for size in feature.shape if size is not None)
    return sizes if len(sizes) == len(feature.shape) else None


def _decoder(feature: Any) -> Callable[[Any], Any]:
    """tf.train.Feature -> value. TFDS's own parser of whole records takes four times as long."""
    from tensorflow_datasets import features as kinds

    if isinstance(feature, kinds.ClassLabel):
        return lambda stored: stored.int64_list.value[0]
    if isinstance(feature, kinds.Text):
        return lambda stored: stored.bytes_list.value[0]
    if isinstance(feature, kinds.Sequence):
        return lambda stored: np.array(stored.int64_list.value, np.int64)
    if not isinstance(feature, kinds.Image):
        shape, dtype = feature.shape, feature.np_dtype
        field = "float_list" if np.dtype(dtype).kind == "f" else "int64_list"
        return lambda stored: np.array(getattr(stored, field).value, dtype).reshape(shape)
    return lambda stored: feature.decode_example_np(stored.bytes_list.value[0])


def _features(builder: Any) -> dict[str, Feature]:
    """The top-level features that are images, classes, text, numbers or lists of classes."""
    from tensorflow_datasets import features as kinds

    out = {}
    for key, feature in builder.info.features.items():
        if isinstance(feature, kinds.Text):
            out[key] = Feature((), "text")
        elif isinstance(feature, kinds.Image | kinds.ClassLabel):
            classes = getattr(feature, "num_classes", None)
            out[key] = Feature(
                tuple(feature.shape), np.dtype(feature.np_dtype).name, classes, _names(feature)
            )
        elif isinstance(feature, kinds.Sequence) and isinstance(feature.feature, kinds.ClassLabel):
            out[key] = Feature((None,), "int64", feature.feature.num_classes, _names(feature.feature))
        elif type(feature) in (kinds.Tensor, kinds.Scalar) and _is_number(feature):
            out[key] = Feature(tuple(feature.shape), np.dtype(feature.np_dtype).name)
    return out


def _names(feature: Any) -> tuple[str, ...]:
    try:
        return tuple(getattr(feature, "names", None) or ())
    except (ValueError, AttributeError):  # classes that TFDS has no names for
        return ()


def _is_number(feature: Any) -> bool:
    """A feature of one number, or of a fixed number of them in a row."""
    kind = np.dtype(feature.np_dtype).kind if feature.np_dtype is not None else "O"
    return kind in "iufb" and len(feature.shape) <= 1 and None not in feature.shape


def _open_records(builder: Any, split: str, name: str) -> Any:
    from tensorflow_datasets.core import decode

    try:
        return builder.as_data_source(
            split, deserialize_method=decode.DeserializeMethod.RAW_BYTES
        ).data_source
    except (ValueError, AssertionError, KeyError) as error:
        known = ", ".join(builder.info.splits)
        raise InputError(
            f"split {split!r} of data.name={name!r} is unknown; set data.split or data.eval_split to one of "
            f"{known}, or to a part of one such as train[:10%]"
        ) from error
