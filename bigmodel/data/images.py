"""Images ready for the model, and the checks on them.

A batch holds `image` float32 [B, H, W, C], what labels.py adds, and for mixup and cutmix `label_other` and
`label_share`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bigmodel.config import Config, InputError
from bigmodel.data import labels, transforms
from bigmodel.data.facts import Facts
from bigmodel.data.labels import Shapes
from bigmodel.data.source import Feature

BIG_PIXELS = 64 * 64  # from this size on, threads prepare the images


class Prepare:
    """Raw records -> the batch's arrays: resized, augmented (training), normalized, labels as the task's."""

    def __init__(self, config: Config, train: bool, weights: np.ndarray | None) -> None:
        self._config, self._train, self._weights = config, train, weights
        d = config.data
        self._resizes, self._augment = transforms.augmentation(d.augment, d.image_size)
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, batch: Mapping[str, np.ndarray], positions: np.ndarray) -> transforms.Batch:
        d = self._config.data
        image = self._images(batch["image"], positions)
        out = {"image": image, **labels.finish(self._config, batch, self._weights)}
        if mixes(self._config):  # nothing mixed yet
            out |= {"label_other": out["label"], "label_share": np.ones(len(image), np.float32)}
        return transforms.normalize(out, d.mean, d.std)

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
            image = transforms.fitted(image, d, 1.0 if self._train else d.eval_crop)
        if not self._train or not d.augment:
            return image
        return self._augment(image, transforms.generator(self._config.seed, position, 1))


def mixes(config: Config) -> bool:
    """True if a training example is made of two."""
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


# ------------------------------------------------------------------------------------------------ shapes


def shapes(config: Config, facts: Facts) -> Shapes:
    """Returns the arrays of a batch but `mask`. Reads no data.

    Raises:
        InputError: an unknown dataset, or features that do not suit the task or the model.
    """
    out: Shapes = {"image": (check(config, facts.features), np.float32), **labels.shapes(config)}
    if mixes(config):
        out |= {"label_other": out["label"], "label_share": ((), np.float32)}
    return out


def check(config: Config, features: Mapping[str, Feature]) -> tuple[int, ...]:
    """-> the shape of an image (H, W, C), after the features were seen to suit the config."""
    labels.require(config, features, "image")
    shape = image_shape(config, features["image"])
    if label := labels.name_of(config):
        labels.check(config, features[label])
    if config.task.label_kind == "numbers" and mixes(config):
        raise InputError(
            f"data.mixup and data.cutmix need classes; set them to 0 for task.name={config.task.name}"
        )
    return shape


def image_shape(config: Config, feature: Feature) -> tuple[int, ...]:
    """(H, W, C) of the images that the model will see.

    Raises:
        InputError: images that are not uint8, of no one size, or not normalized as they should be.
    """
    d, name, shape = config.data, config.data.name, feature.shape
    if feature.dtype != "uint8":
        raise InputError(f"data.name={name!r} has images of {feature.dtype}; choose one with uint8")
    if None in shape[:2] and not d.image_size:
        raise InputError(f"data.name={name!r} has images of any size {shape}; set data.image_size, e.g. 224")
    if shape[-1] is None:
        raise InputError(f"data.name={name!r} has images of any number of channels; choose another dataset")
    for key in ("mean", "std"):
        if len(getattr(d, key)) not in (0, 1, shape[-1]):
            raise InputError(f"data.{key} has {len(getattr(d, key))} numbers; give one, or {shape[-1]}")
    if d.image_size:
        return (d.image_size, d.image_size, shape[-1])
    return tuple(size for size in shape if size is not None)
