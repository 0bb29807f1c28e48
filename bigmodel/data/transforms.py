"""Pure functions on batches (dicts of arrays) and on single images (uint8 [H, W, C]).

What is random takes a generator that belongs to one example of the run (`generator`), so that a batch is a
pure function of (seed, step) on any number of hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from bigmodel.config import Data, InputError
from bigmodel.data.randaugment import randaugment

Batch = dict[str, np.ndarray]
Transform = Callable[[Mapping[str, np.ndarray], np.ndarray], Batch]  # (batch, positions in the run) -> batch
Random = np.random.Generator
Augment = Callable[[np.ndarray, Random], np.ndarray]


def generator(seed: int, position: int, stream: int) -> Random:
    """The random numbers of the example at `position` of the run's order; streams do not share any."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, position]))


def normalize(
    batch: Mapping[str, np.ndarray], mean: Sequence[float] = (), std: Sequence[float] = ()
) -> Batch:
    """`image` uint8 [0, 255] -> float32 (image / 255 - mean) / std; by default 0.5 and 0.5, so [-1, 1]."""
    center = np.asarray(mean or (0.5,), np.float32) * np.float32(255)
    scale = np.float32(1 / 255) / np.asarray(std or (0.5,), np.float32)
    return {**batch, "image": batch["image"].astype(np.float32) * scale - center * scale}


def pad_rows(batch: Mapping[str, np.ndarray], size: int) -> Batch:
    """Appends rows of zeros up to `size` rows; `mask` float32 (size,) is 1 for a row that was there.

    A batch that has a `mask` already keeps it.
    """
    rows = len(next(iter(batch.values())))
    batch = {**batch, "mask": batch.get("mask", np.ones(rows, np.float32))}
    missing = size - rows
    if not missing:
        return batch
    return {k: np.concatenate([v, np.zeros((missing, *v.shape[1:]), v.dtype)]) for k, v in batch.items()}


# ------------------------------------------------------------------------------------------ single images


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W, C] -> [height, width, C]; averages where it shrinks, else linear."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height < image.shape[0] or width < image.shape[1]
    out = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return out.reshape(height, width, image.shape[2])


def center(image: np.ndarray, size: int, fraction: float = 1.0) -> np.ndarray:
    """The shorter side resized to size / fraction, then the central [size, size, C]."""
    height, width = image.shape[:2]
    scale = max(round(size / fraction), size) / min(height, width)
    return _middle(resize(image, max(round(height * scale), size), max(round(width * scale), size)), size)


def fitted(image: np.ndarray, data: Data, fraction: float) -> np.ndarray:
    """An image resized as `data.resize` and `data.resample` say, for size / fraction, and cut to the middle.

    With a filter of Pillow's the longer side is rounded down, as in torchvision and transformers.

    Raises:
        InputError: an image of another size with `data.resize=none`.
    """
    size = data.image_size
    side = max(round(size / fraction), size)
    height, width = image.shape[:2]
    if data.resize == "none":
        if min(height, width) < size:
            raise InputError(f"an image is {width} x {height}, but data.resize=none needs {size} or more")
        return _middle(image, size)
    if data.resample == "area":
        return (
            _middle(resize(image, side, side), size)
            if data.resize == "exact"
            else center(image, size, fraction)
        )
    shape = side, side
    if data.resize == "cover":
        longer = int(side * max(height, width) / min(height, width))
        shape = (side, longer) if height <= width else (longer, side)
    return _middle(_pillow(image, *shape, data.resample), size)


def _middle(image: np.ndarray, size: int) -> np.ndarray:
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def _pillow(image: np.ndarray, height: int, width: int, name: str) -> np.ndarray:
    """uint8 [H, W, C] -> [height, width, C]."""
    from PIL import Image

    flat = image[..., 0] if image.shape[-1] == 1 else image
    made = Image.fromarray(flat).resize((width, height), Image.Resampling[name.upper()])
    return np.asarray(made).reshape(height, width, image.shape[-1])


class Window(NamedTuple):
    """A part of an image, in pixels; it may reach beyond the edges. `take` cuts it out."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool = False


def take(image: np.ndarray, window: Window, size: int = 0) -> np.ndarray:
    """Cuts the window out, with zeros beyond the edges; resized to [size, size, C] if a size is given."""
    top, left, height, width, mirrored = window
    over = [max(-top, top + height - image.shape[0], 0), max(-left, left + width - image.shape[1], 0)]
    if any(over):
        image = np.pad(image, ((over[0],) * 2, (over[1],) * 2, (0, 0)))
    image = image[top + over[0] :, left + over[1] :][:height, :width]
    image = image[:, ::-1] if mirrored else image
    return resize(image, size, size) if size else image


def crop_window(shape: tuple[int, ...], rng: Random, pad: float) -> Window:
    """A window of the old size, up to `pad` pixels beyond the edges (He et al. 2015, 4.2)."""
    top, left = (int(n) - int(pad) for n in rng.integers(0, 2 * int(pad) + 1, 2))
    return Window(top, left, shape[0], shape[1])


def resized_crop_window(shape: tuple[int, ...], rng: Random, smallest: float) -> Window:
    """`smallest` to 1 of the area, 3/4 to 4/3 in shape (Szegedy et al. 2014, section 6); where ten draws do
    not fit, the central square."""
    height, width = shape[:2]
    for area, tilt in zip(rng.uniform(smallest, 1, 10), rng.uniform(-1, 1, 10), strict=True):
        ratio = (4 / 3) ** tilt
        h, w = (round(float(np.sqrt(area * height * width * r))) for r in (1 / ratio, ratio))
        if 0 < h <= height and 0 < w <= width:
            return Window(int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)
    side = min(height, width)
    return Window((height - side) // 2, (width - side) // 2, side, side)


def flip_window(shape: tuple[int, ...], rng: Random, chance: float) -> Window:
    """The whole image, mirrored left to right with probability `chance`."""
    return Window(0, 0, shape[0], shape[1], bool(rng.random() < chance))


WINDOWS: dict[str, Callable[..., Window]] = {  # the steps of data.augment that move what is in an image
    "crop": crop_window,
    "flip": flip_window,
    "resized_crop": resized_crop_window,
}


def crop(image: np.ndarray, rng: Random, pad: float) -> np.ndarray:
    return take(image, crop_window(image.shape, rng, pad))


def resized_crop(image: np.ndarray, rng: Random, smallest: float, size: int) -> np.ndarray:
    return take(image, resized_crop_window(image.shape, rng, smallest), size)


def flip(image: np.ndarray, rng: Random, chance: float) -> np.ndarray:
    return take(image, flip_window(image.shape, rng, chance))


def erase(image: np.ndarray, rng: Random, chance: float) -> np.ndarray:
    """With probability `chance`, noise in a rectangle of 2 to 40 % of the area (Zhong et al. 2017)."""
    height, width, channels = image.shape
    if rng.random() >= chance:
        return image
    area = rng.uniform(0.02, 0.4) * height * width
    ratio = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
    h, w = min(max(round((area * ratio) ** 0.5), 1), height), min(max(round((area / ratio) ** 0.5), 1), width)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    image = image.copy()
    image[top : top + h, left : left + w] = rng.integers(0, 256, (h, w, channels), np.uint8)
    return image


# Name -> (the function, its numbers where none are given, the limits of each).
AUGMENTS: dict[str, tuple[Callable[..., np.ndarray], tuple[float, ...], tuple[tuple[float, float], ...]]] = {
    "crop": (crop, (4,), ((1, 1024),)),
    "flip": (flip, (0.5,), ((0, 1),)),
    "randaugment": (randaugment, (2, 9), ((1, 14), (0, 10))),
    "erase": (erase, (0.25,), ((0, 1),)),
    "resized_crop": (resized_crop, (0.08,), ((0.01, 1),)),
}


def parse_augment(text: str) -> list[tuple[str, tuple[float, ...]]]:
    """`crop:4,flip,randaugment:2:9` -> [("crop", (4.0,)), ("flip", (0.5,)), ("randaugment", (2.0, 9.0))].

    Raises:
        InputError: an unknown name, or a number that is none or out of range.
    """
    out = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, *given = item.split(":")
        if name not in AUGMENTS:
            raise InputError(
                f"data.augment has {name!r}, which is unknown; choose from {', '.join(AUGMENTS)}, "
                "e.g. data.augment=crop:4,flip,randaugment:2:9,erase:0.25"
            )
        _, defaults, limits = AUGMENTS[name]
        try:
            numbers = tuple(map(float, given)) + defaults[len(given) :]
        except ValueError:
            raise InputError(f"data.augment has {item!r}: write numbers, such as {_usual(name)}") from None
        fits = len(numbers) == len(limits)
        if not fits or not all(low <= n <= high for n, (low, high) in zip(numbers, limits, strict=True)):
            ranges = " and ".join(f"{low:g} to {high:g}" for low, high in limits)
            raise InputError(f"data.augment has {item!r}, out of range: {ranges}; write e.g. {_usual(name)}")
        out.append((name, numbers))
    return out


def _usual(name: str) -> str:
    return ":".join([name, *(f"{number:g}" for number in AUGMENTS[name][1])])


def augmentation(text: str, size: int) -> tuple[bool, Augment]:
    """Steps of `data.augment` as one function -> (True if it resizes to `size` itself, the function)."""
    parts = parse_augment(text)
    resizes = any(name == "resized_crop" for name, _ in parts)
    if resizes and (not size or parts[0][0] != "resized_crop"):
        raise InputError("data.augment: resized_crop comes first, and needs data.image_size, e.g. 224")

    def augment(image: np.ndarray, rng: Random) -> np.ndarray:
        for name, numbers in parts:
            extra = (size,) if name == "resized_crop" else ()
            image = AUGMENTS[name][0](image, rng, *numbers, *extra)
        return image

    return resizes, augment


# ------------------------------------------------------------------------------------------ two examples


def mix(batch: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], rngs: Sequence[Random],
        mixup: float, cutmix: float) -> Batch:  # fmt: skip
    """Each row of `batch` mixed with that of `other`: `image`, `label_other`, and `label_share` of `label`.

    mixup (Zhang et al. 2017) averages, cutmix (Yun et al. 2019) pastes a rectangle; the share is drawn from
    Beta(a, a) with a = `mixup` or `cutmix`. With both, each row takes one of them by a fair coin.
    """
    image, share = batch["image"].copy(), np.ones(len(rngs), np.float32)
    height, width = image.shape[1:3]
    for row, rng in enumerate(rngs):
        paste = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
        part = rng.beta(*(cutmix if paste else mixup,) * 2)
        if paste:
            h, w = round(height * (1 - part) ** 0.5), round(width * (1 - part) ** 0.5)
            y, x = rng.integers(0, height), rng.integers(0, width)
            rows = slice(max(y - h // 2, 0), min(y - h // 2 + h, height))
            columns = slice(max(x - w // 2, 0), min(x - w // 2 + w, width))
            image[row, rows, columns] = other["image"][row, rows, columns]
            pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
            share[row] = 1 - pasted / (height * width)
        else:
            image[row] = part * image[row] + (1 - part) * other["image"][row]
            share[row] = part
    return {**batch, "image": image, "label_other": other["label"], "label_share": share}
