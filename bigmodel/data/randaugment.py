"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719): fourteen operations on uint8 images [H, W, C].

Strengths on the paper's scale of 0 to 10: 10 turns by 30 degrees, shears by 0.3, and so on.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

GREY = 128  # fills what an operation uncovers


def randaugment(image: np.ndarray, rng: np.random.Generator, count: float, strength: float) -> np.ndarray:
    """`count` operations drawn with replacement, each at `strength`, in a random direction."""
    for index in rng.integers(0, len(OPERATIONS), int(count)):
        sign = 1.0 if rng.random() < 0.5 else -1.0
        image = OPERATIONS[index](np.ascontiguousarray(image), strength / 10, sign).reshape(image.shape)
    return image


def _affine(image: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    """Around the image's center; output pixel p shows input pixel matrix @ (p - c, 1) + c."""
    height, width, channels = image.shape
    to_center = np.array([[1, 0, (width - 1) / 2], [0, 1, (height - 1) / 2], [0, 0, 1]])
    full = to_center @ np.array([*matrix, [0, 0, 1]]) @ np.linalg.inv(to_center)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        image, full[:2], (width, height), flags=flags, borderValue=(GREY,) * min(channels, 4)
    )


def _rotate(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    angle = np.deg2rad(30 * m * sign)
    return _affine(image, [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]])


def _shear_x(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    return _affine(image, [[1, 0.3 * m * sign, 0], [0, 1, 0]])


def _shear_y(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    return _affine(image, [[1, 0, 0], [0.3 * m * sign, 1, 0]])


def _translate_x(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    """Up to 100 pixels of 224, as the paper's code has it for ImageNet."""
    return _affine(image, [[1, 0, m * sign * 100 / 224 * image.shape[1]], [0, 1, 0]])


def _translate_y(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    return _affine(image, [[1, 0, 0], [0, 1, m * sign * 100 / 224 * image.shape[0]]])


def _blend(base: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """factor 0: base, 1: the image, beyond: away from the base."""
    mixed = base + factor * (image.astype(np.float32) - base)
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def _factor(m: float, sign: float) -> float:
    return 1 + 0.9 * m * sign


def _grey(image: np.ndarray) -> np.ndarray:
    """[H, W, 1] float32."""
    if image.shape[2] != 3:
        return image.mean(2, keepdims=True, dtype=np.float32)
    return (image @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


def _color(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    return _blend(_grey(image), image, _factor(m, sign))


def _contrast(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    return _blend(_grey(image).mean(dtype=np.float32, keepdims=True), image, _factor(m, sign))


def _brightness(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    return _blend(np.zeros(1, np.float32), image, _factor(m, sign))


def _sharpness(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = image.astype(np.float32)
    inner = cv2.filter2D(smooth, -1, kernel).reshape(image.shape)
    smooth[1:-1, 1:-1] = inner[1:-1, 1:-1]
    return _blend(smooth, image, _factor(m, sign))


def _autocontrast(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    low = image.min((0, 1), keepdims=True).astype(np.float32)
    high = image.max((0, 1), keepdims=True).astype(np.float32)
    stretched = (image - low) * (255 / np.maximum(high - low, 1))
    return np.where(high > low, stretched, image).astype(np.uint8)


def _equalize(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    return np.stack([cv2.equalizeHist(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, 2, 0)], 2)


def _posterize(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    """Drops none of the 8 bits at strength 0, four at 10."""
    return image & np.uint8(256 - (1 << round(4 * m)))


def _solarize(image: np.ndarray, m: float, sign: float) -> np.ndarray:
    return np.where(image < 256 - 256 * m, image, 255 - image)


OPERATIONS: list[Callable[[np.ndarray, float, float], np.ndarray]] = [
    lambda image, m, sign: image, _autocontrast, _equalize, _rotate, _solarize, _color, _posterize,
    _contrast, _brightness, _sharpness, _shear_x, _shear_y, _translate_x, _translate_y,
]  # fmt: skip
