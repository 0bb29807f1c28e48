"""TFDS datasets on disk as array_record, read at random without TensorFlow."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bigmodel.config import InputError
from bigmodel.data.builders.prepare import find, one_line, prepared
from bigmodel.data.source import Feature

log = logging.getLogger("bigmodel")

BIG_IMAGE_BYTES = 64 * 64 * 3  # decoding one takes long enough for a thread to pay


CACHE_FRACTION = 0.25  # of this machine's memory: a decoded split that needs more is not kept


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
        kinds = _flat(builder.info.features)
        self._decoders = {key: _decoder(kinds[key]) for key in self.features}
        if not len(self._records):
            raise InputError(f"data.name={name!r} has no records in split {split!r}; choose another split")
        splits = builder.info.splits  # a part of a split does not know its bytes
        self.split_rule = ""
        self.num_bytes = int(splits[split].num_bytes if split in splits else builder.info.dataset_size)
        self.fingerprint = f"{builder.info.full_name}/{split} records={len(self)} bytes={self.num_bytes}"
        self._threads: ThreadPoolExecutor | None = None
        self._cached: dict[str, np.ndarray] = self._room_for_all() if cache else {}
        self._have = np.zeros(len(self) if self._cached else 0, bool)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        if not self._cached:
            return self._decode(indices)
        missing = np.unique(indices[~self._have[indices]])
        if len(missing):
            for key, column in self._decode(missing).items():
                self._cached[key][missing] = column
            self._have[missing] = True  # after the data: another thread may be reading
        return {key: column[indices] for key, column in self._cached.items()}

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
            for row, value in enumerate(column):  # at once, numpy would take arrays of one shape apart
                out[row] = value
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
    if isinstance(feature, kinds.Sequence) and isinstance(feature.feature, kinds.BBoxFeature):
        return lambda stored: np.array(stored.float_list.value, np.float32).reshape(-1, 4)
    if isinstance(feature, kinds.Sequence):
        return lambda stored: np.array(stored.int64_list.value, np.int64)
    if not isinstance(feature, kinds.Image):
        shape, dtype = feature.shape, feature.np_dtype
        field = "float_list" if np.dtype(dtype).kind == "f" else "int64_list"
        return lambda stored: np.array(getattr(stored, field).value, dtype).reshape(shape)
    if feature.np_dtype == np.uint8 and feature.shape[-1] in (1, 3):
        return lambda stored: pixels(stored.bytes_list.value[0], feature.shape[-1])
    return lambda stored: feature.decode_example_np(stored.bytes_list.value[0])


def pixels(content: bytes, channels: int) -> np.ndarray:
    """An image's bytes -> uint8 [H, W, C], RGB or gray, whatever the file holds.

    As Pillow's `convert` does: palettes and CMYK become colors, transparency is dropped, an orientation in
    the EXIF data is not minded. Of 16 bits the upper 8 count. TFDS would give the file's own channels, and
    the lower 8 bits. Raises ValueError for what is no image.
    """
    import cv2

    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    image = cv2.imdecode(np.frombuffer(content, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise ValueError("no image that can be decoded")
    return image[..., None] if channels == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def features(name: str, data_dir: str | None) -> dict[str, Feature]:
    """The features of a dataset, which need not be prepared."""
    return _features(find(name, data_dir))


def _features(builder: Any) -> dict[str, Feature]:
    """The features that are images, classes, text, numbers, or lists of classes or boxes."""
    from tensorflow_datasets import features as kinds

    out = {}
    for key, feature in _flat(builder.info.features).items():
        if isinstance(feature, kinds.Text):
            out[key] = Feature((), "text")
        elif isinstance(feature, kinds.Image | kinds.ClassLabel):
            classes = getattr(feature, "num_classes", None)
            out[key] = Feature(
                tuple(feature.shape), np.dtype(feature.np_dtype).name, classes, _names(feature)
            )
        elif isinstance(feature, kinds.Sequence) and isinstance(feature.feature, kinds.ClassLabel):
            out[key] = Feature((None,), "int64", feature.feature.num_classes, _names(feature.feature))
        elif isinstance(feature, kinds.Sequence) and isinstance(feature.feature, kinds.BBoxFeature):
            order = feature.feature.bbox_format
            if getattr(order, "value", order) in (None, BOXES):
                out[key] = Feature((None, 4), "float32")
        elif key == CROWDS:
            out[key] = Feature((None,), "int64")
        elif type(feature) in (kinds.Tensor, kinds.Scalar) and _is_number(feature):
            out[key] = Feature(tuple(feature.shape), np.dtype(feature.np_dtype).name)
    return out


CROWDS = "objects/is_crowd"  # which boxes stand for many objects, as in COCO


BOXES = "REL_YXYX"  # (y0, x0, y1, x1) as shares of the image: how TFDS stores boxes, unless it says otherwise


def _flat(features: Any) -> dict[str, Any]:
    """Top-level features by name, and of a list of groups each part as a list, such as `objects/label`."""
    from tensorflow_datasets import features as kinds

    out = {}
    for key, feature in features.items():
        if isinstance(feature, kinds.Sequence) and isinstance(feature.feature, kinds.FeaturesDict):
            for name, inner in feature.feature.items():
                if isinstance(inner, kinds.ClassLabel | kinds.BBoxFeature) or f"{key}/{name}" == CROWDS:
                    out[f"{key}/{name}"] = kinds.Sequence(inner)
        else:
            out[key] = feature
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
