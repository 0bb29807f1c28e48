"""Images with boxes, for detectors: checks, augmentation that moves the boxes too, and what each place of the
detector's grids has to say.

A batch holds `image` float32 [B, H, W, C]; `boxes` float32 [B, M, 4], (y0, x0, y1, x1) in pixels of that
image, and `labels` int32 [B, M], -1 where there is none. Where the dataset tells crowds it also holds
`crowds` int32 [B, M], 1 for a box that stands for many objects; training leaves such boxes out. Of the P
places of all grids it holds `place_label` int32 [B, P], -1 for background, `place_box` float32 [B, P, 4], the
box to be given there, and `place_center` float32 [B, P], how much in its middle the place is, 1 to 0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bigmodel.config import Config, InputError
from bigmodel.data import images, labels, tfds, transforms
from bigmodel.data.facts import Facts
from bigmodel.data.labels import Shapes
from bigmodel.data.source import Feature, Source

KEYS = ("image", "objects/bbox", "objects/label")
OUTSIDE = 1e-3  # of the image's size: a box may reach so far out, by rounding; it is then cut
SMALLEST = 1.0  # pixels: what augmentation leaves of a box is dropped if it is smaller, a side
LEFT = 0.25  # or if less than this share of its area is left
COLORS = ("erase",)  # steps of data.augment that move nothing


class Records(labels.Records):
    """A source's images with boxes, each checked; see labels.Records."""

    def __init__(self, source: Source, config: Config, where: labels.Where) -> None:
        super().__init__(source, config, where)
        self._most = config.data.max_boxes

    def _check(self, batch: Mapping[str, np.ndarray], indices: np.ndarray) -> None:
        for index, boxes, kinds in zip(indices, batch["objects/bbox"], batch["objects/label"], strict=True):
            problem = self._problem(boxes, kinds)
            if problem:
                raise InputError(f"{self._where(index)} has {problem}")

    def _problem(self, boxes: np.ndarray, kinds: np.ndarray) -> str:
        skip = "prepare it again, or skip it by data.max_skipped"
        if len(boxes) != len(kinds):
            return f"{len(boxes)} boxes but {len(kinds)} labels; {skip}"
        if len(boxes) > self._most:
            return f"{len(boxes)} boxes; set data.max_boxes to that, or skip it by data.max_skipped"
        for number, (box, label) in enumerate(zip(boxes, kinds, strict=True)):
            if not 0 <= label < self._classes:
                return (
                    f"label {label} at box {number}, not one of 0..{self._classes - 1}; set "
                    "model.num_classes, or skip it by data.max_skipped"
                )
            corners = ", ".join(f"{x:.4g}" for x in box)
            if not np.isfinite(box).all() or box.min() < -OUTSIDE or box.max() > 1 + OUTSIDE:
                return f"box {number} outside the image: ({corners}), not within 0..1; {skip}"
            if box[2] <= box[0] or box[3] <= box[1]:
                return f"box {number} without an inside: ({corners}); {skip}"
        return ""


class Prepare:
    """Raw records -> the batch's arrays: resized, augmented (training), normalized, with targets."""

    def __init__(self, config: Config, train: bool) -> None:
        self._config, self._train = config, train
        self._parts = transforms.parse_augment(config.data.augment) if train else []
        for name, _ in self._parts:
            if name not in (*transforms.WINDOWS, *COLORS):
                known = ", ".join((*transforms.WINDOWS, *COLORS))
                raise InputError(f"data.augment has {name!r}, which moves no boxes; choose from {known}")
        self._resizes, _ = transforms.augmentation(
            config.data.augment if train else "", config.data.image_size
        )

    def __call__(self, batch: Mapping[str, np.ndarray], positions: np.ndarray) -> transforms.Batch:
        columns = [batch[key] for key in KEYS]
        crowds = batch.get(tfds.CROWDS, [None] * len(positions))
        rows = [self._one(*row) for row in zip(*columns, crowds, positions.tolist(), strict=True)]
        out = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        d = self._config.data
        return transforms.normalize({**out, "mask": batch["mask"]}, d.mean, d.std)

    def _one(
        self,
        image: np.ndarray,
        shares: np.ndarray,
        labels: np.ndarray,
        crowds: np.ndarray | None,
        position: int,
    ) -> transforms.Batch:
        size = self._config.data.image_size
        boxes = np.clip(shares, 0, 1) * np.array(image.shape[:2] * 2, np.float32)
        if size and not self._resizes:
            image, boxes = letterbox(image, boxes, size)
        rng, keep = transforms.generator(self._config.seed, position, 1), np.ones(len(boxes), bool)
        for name, numbers in self._parts:
            image, boxes, inside = augment(name, image, boxes, rng, numbers, size)
            keep &= inside
        if crowds is not None and self._train:
            keep &= crowds == 0
        crowds = crowds if crowds is None else crowds[keep]
        return {"image": image, **targets(self._config, image.shape[:2], boxes[keep], labels[keep], crowds)}


def letterbox(image: np.ndarray, boxes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The longer side resized to `size`, zeros below or to the right: [size, size, C] and the boxes in it."""
    height, width = image.shape[:2]
    scale = size / max(height, width)
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    out = np.zeros((size, size, image.shape[2]), image.dtype)
    out[:h, :w] = transforms.resize(image, h, w)
    return out, boxes * np.array([h / height, w / width] * 2, np.float32)


def augment(
    name: str,
    image: np.ndarray,
    boxes: np.ndarray,
    rng: transforms.Random,
    numbers: tuple[float, ...],
    size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of data.augment -> (image, the boxes as it moved them, which of them can still be seen)."""
    if name in COLORS:
        return transforms.AUGMENTS[name][0](image, rng, *numbers), boxes, np.ones(len(boxes), bool)
    window = transforms.WINDOWS[name](image.shape, rng, *numbers)
    out = transforms.take(image, window, size if name == "resized_crop" else 0)
    scale = np.array([out.shape[0] / window.height, out.shape[1] / window.width] * 2, np.float32)
    moved = (boxes - np.array([window.top, window.left] * 2, np.float32)) * scale
    if window.mirrored:
        moved[:, [1, 3]] = out.shape[1] - moved[:, [3, 1]]
    cut = np.clip(moved, 0, np.array(out.shape[:2] * 2, np.float32))
    sides, before = cut[:, 2:] - cut[:, :2], (moved[:, 2:] - moved[:, :2]).prod(1)
    return out, cut, (sides.min(1, initial=np.inf) >= SMALLEST) & (sides.prod(1) >= LEFT * before)


# ----------------------------------------------------------------------------------------------- targets


class Places(NamedTuple):
    """The places of all grids, the finest grid first, row by row."""

    center: np.ndarray  # float32 [P, 2], (y, x) in pixels
    stride: np.ndarray  # float32 [P]
    reach: np.ndarray  # float32 [P, 2]: a box belongs here if the farthest of its edges is from..to so far


@functools.lru_cache(maxsize=8)
def places(strides: tuple[int, ...], size: tuple[int, int]) -> Places:
    """Returns the places for images of a size (Tian et al. 2019, section 3.2).

    A grid takes boxes whose farthest edge is 4 to 8 strides away, the finest smaller ones too, the coarsest
    larger ones.

    Raises:
        InputError: a size that the strides do not divide.
    """
    coarsest = strides[-1]
    if size[0] % coarsest or size[1] % coarsest:
        raise InputError(
            f"model.name=detector needs images whose sides are multiples of {coarsest}, its coarsest stride, "
            f"these have {size[0]} x {size[1]}; set data.image_size to one"
        )
    centers, steps, reaches = [], [], []
    for index, stride in enumerate(strides):
        y, x = (stride * (np.arange(side // stride) + 0.5) for side in size)
        centers.append(np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2))
        count = len(centers[-1])
        last = index == len(strides) - 1
        steps.append(np.full(count, stride, np.float32))
        reaches.append(np.tile([0 if not index else 4 * stride, np.inf if last else 8 * stride], (count, 1)))
    return Places(*(np.concatenate(parts).astype(np.float32) for parts in (centers, steps, reaches)))


def targets(
    config: Config,
    size: tuple[int, ...],
    boxes: np.ndarray,
    labels: np.ndarray,
    crowds: np.ndarray | None = None,
) -> dict[str, Any]:
    """Boxes [n, 4], labels [n] and, if the dataset tells, crowds [n] of one image -> its part of the batch.

    A place gives the box that it lies in, near the middle (1.5 strides), if the box suits its grid; of
    several the smallest (Tian et al. 2019, section 3.2; the middle is of the authors' later version).
    """
    most = config.data.max_boxes
    out_boxes, out_labels = np.zeros((most, 4), np.float32), np.full(most, -1, np.int32)
    out_boxes[: len(boxes)], out_labels[: len(labels)] = boxes, labels
    where = places(config.model.strides, (size[0], size[1]))
    count = len(where.stride)
    out = {"boxes": out_boxes, "labels": out_labels, "place_label": np.full(count, -1, np.int32)}
    if crowds is not None:
        out["crowds"] = np.pad(crowds, (0, most - len(crowds))).astype(np.int32)
        boxes, labels = boxes[crowds == 0], labels[crowds == 0]
    out |= {"place_box": np.zeros((count, 4), np.float32), "place_center": np.zeros(count, np.float32)}
    if not len(boxes):
        return out
    before_PM2 = where.center[:, None] - boxes[None, :, :2]
    after_PM2 = boxes[None, :, 2:] - where.center[:, None]
    far_PM = np.maximum(before_PM2, after_PM2).max(-1)
    off_PM = np.abs(where.center[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2).max(-1)
    fits_PM = (np.minimum(before_PM2, after_PM2).min(-1) > 0) & (off_PM < 1.5 * where.stride[:, None])
    fits_PM &= (far_PM >= where.reach[:, :1]) & (far_PM < where.reach[:, 1:])
    area_PM = np.where(fits_PM, (boxes[:, 2:] - boxes[:, :2]).prod(1), np.inf)
    chosen_P, some_P = area_PM.argmin(1), fits_PM.any(1)
    sides_P22 = np.stack([part[np.arange(count), chosen_P] for part in (before_PM2, after_PM2)])
    balance_P = (sides_P22.min(0) / np.maximum(sides_P22.max(0), 1e-6)).prod(-1)
    out["place_label"] = np.where(some_P, labels[chosen_P], -1).astype(np.int32)
    out["place_box"] = np.where(some_P[:, None], boxes[chosen_P], 0).astype(np.float32)
    out["place_center"] = np.where(some_P, np.sqrt(np.maximum(balance_P, 0)), 0).astype(np.float32)
    return out


# ------------------------------------------------------------------------------------------------ shapes


def shapes(config: Config, facts: Facts) -> Shapes:
    """Returns the arrays of a batch but `mask`. Reads no data.

    Raises:
        InputError: as `check`.
    """
    image = check(config, facts.features)
    most, count = config.data.max_boxes, len(places(config.model.strides, image[:2]).stride)
    crowds: Shapes = {"crowds": ((most,), np.int32)} if tfds.CROWDS in facts.features else {}
    return crowds | {
        "image": (image, np.float32),
        "boxes": ((most, 4), np.float32),
        "labels": ((most,), np.int32),
        "place_label": ((count,), np.int32),
        "place_box": ((count, 4), np.float32),
        "place_center": ((count,), np.float32),
    }


def check(config: Config, features: Mapping[str, Feature]) -> tuple[int, int, int]:
    """-> the shape of an image (H, W, C), after the features were seen to suit the config.

    Raises:
        InputError: a dataset without boxes, or with more classes than the model.
    """
    d = config.data
    if missing := [key for key in KEYS if key not in features]:
        raise InputError(
            f"data.name={d.name!r} has no feature {missing[0]!r}, which task.name=detect needs (boxes as "
            "tfds.features.BBoxFeature, in the order y0, x0, y1, x1); choose another dataset, e.g. shapes"
        )
    classes = features["objects/label"].num_classes or 0
    if classes > labels.classes_of(config):
        raise InputError(f"model.num_classes is too small for data.name={d.name!r}: set it to {classes}")
    refused = {"mixup": d.mixup, "cutmix": d.cutmix, "balance": d.balance != "none", "group": d.group}
    for key in [key for key, value in refused.items() if value]:
        raise InputError(f"data.{key} is nothing for task.name=detect; leave it out")
    height, width, channels = images.image_shape(config, features["image"])
    return height, width, channels
