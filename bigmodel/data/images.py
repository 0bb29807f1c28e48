"""Images and their labels, ready for the model; the checks on both, and how often each class is drawn.

A batch holds `image` float32 [B, H, W, C] and `label`: int32 [B] of one class, float32 [B, K] for several
(multilabel) or for numbers (regress). As the config asks: `label_other`, `label_share` (mixup, cutmix),
`weight` (task.class_weights) and `group` (data.group).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bigmodel.config import Config, InputError
from bigmodel.data import sources, transforms

Shapes = dict[str, tuple[tuple[int, ...], Any]]  # name -> (shape after the batch's dimension, dtype)

log = logging.getLogger("bigmodel")

CHUNK = 4096  # labels read at once
BIG_PIXELS = 64 * 64  # from this size on, threads prepare the images


class Records:
    """A source's records, each checked; at most `max_skipped` that are bad are replaced and masked.

    A bad record's row holds the next good one, with `mask` 0: it counts for nothing, and neither the loss nor
    a metric sees it twice. Which are bad depends on the data alone, so batches stay pure.
    """

    def __init__(self, source: sources.Source, config: Config, where: str) -> None:
        self.source, self._where, self._label = source, where, config.data.label
        self._classes = classes_of(config) if config.task.name != "regress" else sys.maxsize
        self._max_skipped, self.skipped = config.data.max_skipped, dict[int, str]()

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Raises InputError for a bad record too many; the message names it."""
        known = {index: self._good_after(index) for index in self.skipped.keys() & set(indices.tolist())}
        at = np.array([known.get(index, index) for index in indices.tolist()], np.int64)
        try:
            batch = self.source.read(at)
            self._check(batch, at)
        except InputError:
            if not self._max_skipped or not self._find_bad(at):
                raise
            return self.read(indices)
        mask = np.array([index not in known for index in indices.tolist()], np.float32)
        return {**batch, "mask": mask}

    def _check(self, batch: Mapping[str, np.ndarray], indices: np.ndarray) -> None:
        column = batch[self._label]
        if column.dtype.kind in "iu" and ((column >= 0) & (column < self._classes)).all():
            return
        for index, label in zip(indices, column, strict=True):
            if (label.dtype.kind in "iu") and ((label < 0) | (label >= self._classes)).any():
                raise InputError(
                    f"{self._where} record {index} has label {label}, not one of 0..{self._classes - 1}; set "
                    "model.num_classes, choose a split with labels, or skip it by data.max_skipped"
                )
            if label.dtype.kind == "f" and not np.isfinite(label).all():
                raise InputError(
                    f"{self._where} record {index} has {self._label} {label}, no finite number; prepare it "
                    "again, or skip it by data.max_skipped"
                )

    def _find_bad(self, indices: np.ndarray) -> bool:
        """Reads one by one, and notes what is bad. -> whether anything new was found."""
        before = len(self.skipped)
        for index in np.unique(indices).tolist():
            self._is_good(index)
        return len(self.skipped) > before

    def _is_good(self, index: int) -> bool:
        if index in self.skipped:
            return False
        try:
            one = np.array([index])
            self._check(self.source.read(one), one)
        except InputError as error:
            if len(self.skipped) >= self._max_skipped:
                raise InputError(
                    f"{error}; data.max_skipped={self._max_skipped} are skipped already"
                ) from None
            self.skipped[index] = str(error)
            log.warning("skipped %d of at most %d: %s", len(self.skipped), self._max_skipped, error)
            return False
        return True

    def _good_after(self, index: int) -> int:
        count = len(self)
        following = ((index + step) % count for step in range(1, count))
        good = next((other for other in following if self._is_good(other)), None)
        if good is None:
            raise InputError(f"{self._where} has no good record; prepare it again")
        return good


class Prepare:
    """Raw records -> the batch's arrays: resized, augmented (training), normalised, labels as the task's."""

    def __init__(self, config: Config, train: bool, weights: np.ndarray | None) -> None:
        self._config, self._train, self._weights = config, train, weights
        d = config.data
        self._resizes, self._augment = transforms.augmentation(d.augment, d.image_size)
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, batch: Mapping[str, np.ndarray], positions: np.ndarray) -> transforms.Batch:
        d, task = self._config.data, self._config.task.name
        image, label = self._images(batch["image"], positions), batch[d.label]
        out = {"image": image, "label": _label(label, task, classes_of(self._config)), "mask": batch["mask"]}
        if self._config.task.class_weights != "none":
            ones = np.ones(len(label), np.float32)
            out["weight"] = ones if self._weights is None else self._weights[label]
        if d.group:
            out["group"] = batch[d.group].astype(np.int32)
        if mixes(self._config):  # nothing mixed yet
            out |= {"label_other": out["label"], "label_share": np.ones(len(label), np.float32)}
        return transforms.normalise(out, d.mean, d.std)

    def _images(self, images: np.ndarray, positions: np.ndarray) -> np.ndarray:
        d = self._config.data
        if images.dtype != object and not d.image_size and not (self._train and d.augment):
            return images
        pairs = zip(images, positions.tolist(), strict=True)
        size = d.image_size**2 or images[0].size
        if size < BIG_PIXELS:
            return np.stack([self._image(*pair) for pair in pairs])
        self._pool = self._pool or ThreadPoolExecutor(os.cpu_count(), "prepare")
        return np.stack(list(self._pool.map(lambda pair: self._image(*pair), pairs)))

    def _image(self, image: np.ndarray, position: int) -> np.ndarray:
        d = self._config.data
        if d.image_size and not (self._train and self._resizes):
            image = transforms.center(image, d.image_size, 1.0 if self._train else d.eval_crop)
        if not self._train or not d.augment:
            return image
        return self._augment(image, transforms.generator(self._config.seed, position, 1))


def _label(label: np.ndarray, task: str, classes: int) -> np.ndarray:
    if task == "classify":
        return label.astype(np.int32)
    if label.dtype != object:  # numbers, or 0 and 1 for each class
        return label.reshape(len(label), -1).astype(np.float32)
    out = np.zeros((len(label), classes), np.float32)
    for row, ids in enumerate(label):
        out[row, ids] = 1
    return out


def mixes(config: Config) -> bool:
    """Whether a training example is made of two."""
    return config.data.mixup > 0 or config.data.cutmix > 0


def mixer(config: Config) -> Any:
    """(batch, the other half's rows, positions) -> the mixed batch."""

    def mix(
        batch: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], positions: np.ndarray
    ) -> transforms.Batch:
        rngs = [transforms.generator(config.seed, position, 2) for position in positions.tolist()]
        out = transforms.mix(batch, other, rngs, config.data.mixup, config.data.cutmix)
        if "weight" in out:
            share = out["label_share"]
            out["weight"] = share * batch["weight"] + (1 - share) * other["weight"]
        return out

    return mix


def class_names(config: Config) -> tuple[str, ...]:
    """What the dataset calls its classes; nothing where it has no names for them."""
    features = sources.features_of(config.data.name, config.data.data_dir)
    return features[config.data.label].names


def classes_of(config: Config) -> int:
    return getattr(config.model, "num_classes", sys.maxsize)


# ------------------------------------------------------------------------------------------------ shapes


def shapes(config: Config) -> Shapes:
    """What a batch holds beside `mask`. Reads no data.

    Raises:
        InputError: an unknown dataset, or features that do not suit the task or the model.
    """
    features, task = sources.features_of(config.data.name, config.data.data_dir), config.task.name
    label = ((), np.int32) if task == "classify" else ((classes_of(config),), np.float32)
    out: Shapes = {"image": (check(config, features), np.float32), "label": label}
    if config.task.class_weights != "none":
        out["weight"] = ((), np.float32)
    if config.data.group:
        out["group"] = ((), np.int32)
    if mixes(config):
        out |= {"label_other": label, "label_share": ((), np.float32)}
    return out


def check(config: Config, features: Mapping[str, sources.Feature]) -> tuple[int, ...]:
    """-> the shape of an image (H, W, C), after the features were seen to suit the config."""
    d, name = config.data, config.data.name
    missing = {"image", d.label, *([d.group] if d.group else [])} - set(features)
    if missing:
        raise InputError(
            f"data.name={name!r} has no feature {min(missing)!r}, which task.name={config.task.name} needs; "
            f"set data.label or data.group to one of {', '.join(features)}, or choose another dataset"
        )
    shape, label = features["image"].shape, features[d.label]
    if features["image"].dtype != "uint8":
        raise InputError(f"data.name={name!r} has images of {features['image'].dtype}; choose one with uint8")
    if None in shape[:2] and not d.image_size:
        raise InputError(f"data.name={name!r} has images of any size {shape}; set data.image_size, e.g. 224")
    if shape[-1] is None:
        raise InputError(f"data.name={name!r} has images of any number of channels; choose another dataset")
    _check_label(config, label)
    for key in ("mean", "std"):
        if len(getattr(d, key)) not in (0, 1, shape[-1]):
            raise InputError(f"data.{key} has {len(getattr(d, key))} numbers; give one, or {shape[-1]}")
    if d.image_size:
        return (d.image_size, d.image_size, shape[-1])
    return tuple(size for size in shape if size is not None)


def _check_label(config: Config, label: sources.Feature) -> None:
    name, task, classes = config.data.name, config.task.name, classes_of(config)
    if task == "classify" and (label.shape or not label.dtype.startswith(("int", "uint"))):
        raise InputError(
            f"data.label={config.data.label!r} of data.name={name!r} is not one class an example; set "
            "task.name to multilabel or regress, or data.label to another feature"
        )
    if task != "regress" and (label.num_classes or 0) > classes:
        raise InputError(
            f"model.num_classes is too small for data.name={name!r}: set it to {label.num_classes}"
        )
    width = 1 if not label.shape else label.shape[0]
    if task != "classify" and width is not None and width != classes:
        raise InputError(
            f"model.num_classes is {classes}, but data.label has {width} numbers: set it to that"
        )
    if task != "classify" and config.task.class_weights != "none":
        raise InputError(f"task.class_weights needs task.name=classify, not {task}; set it to none")
    if task == "regress" and mixes(config):
        raise InputError("data.mixup and data.cutmix need classes; set them to 0 for task.name=regress")


def labels(config: Config, split: str) -> np.ndarray:
    """The class of every example of a split, int64 (n,); reads the whole split without decoding images."""
    d = config.data
    source = sources.open_source(d.name, split, d.data_dir, keys=(d.label,), cache=False)
    parts = [
        source.read(np.arange(start, min(start + CHUNK, len(source))))[d.label]
        for start in range(0, len(source), CHUNK)
    ]
    return np.concatenate(parts).astype(np.int64)
