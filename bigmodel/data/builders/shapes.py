"""`shapes`: drawn circles, squares, triangles and stars with their boxes, for detectors; no download."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

NAMES = ("circle", "square", "triangle", "star")
COUNTS = {"train": 4000, "test": 500}
SIZE, FINE = 64, 8  # pixels a side; how much finer shapes are drawn before they are averaged
MOST = 5  # shapes in an image


class Shapes(tfds.core.GeneratorBasedBuilder):
    """`image` uint8 (64, 64, 3) and `objects`: `bbox` (y0, x0, y1, x1) in 0..1 and `label` of each shape.

    One to five shapes of any color and direction, none of which hides much of another, on a noisy ground.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; see python_source.py

    def _info(self) -> tfds.core.DatasetInfo:
        one = {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=NAMES)}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Drawn circles, squares, triangles and stars, each with its box.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(SIZE, SIZE, 3), dtype=np.uint8, encoding_format="png"
                    ),
                    "objects": tfds.features.Sequence(one),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        import cv2

        for index in range(COUNTS[split]):
            image, boxes, labels = draw(list(COUNTS).index(split), index)
            png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
            objects = [
                {"bbox": tfds.features.BBox(*map(float, box / SIZE)), "label": int(label)}
                for box, label in zip(boxes, labels, strict=True)
            ]
            yield index, {"image": io.BytesIO(png), "objects": objects}


def draw(split: int, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The image of a number -> (uint8 [64, 64, 3], boxes float [M, 4] in pixels, labels int [M])."""
    rng = np.random.Generator(np.random.Philox(key=[2026, split], counter=[0, 0, 0, index]))
    ground = rng.uniform(0, 255, 3)
    image = ground + rng.uniform(-40, 40, 3) * np.linspace(-1, 1, SIZE)[:, None, None]
    image = np.broadcast_to(image, (SIZE, SIZE, 3))
    boxes: list[np.ndarray] = []
    labels: list[int] = []
    for _ in range(rng.integers(1, MOST + 1)):
        label = int(rng.integers(len(NAMES)))
        for _ in range(20):  # tries to find a free place
            outline = _outline(label, rng)
            box = np.concatenate([outline.min(0), outline.max(0)])
            if all(_shared(box, other) < 0.1 for other in boxes):
                break
        else:
            continue
        color = rng.uniform(0, 255, 3)
        color = np.where(np.abs(color - ground).max() < 80, 255 - ground, color)  # not unseen
        cover = _cover(outline)[..., None]
        image = image * (1 - cover) + color * cover
        boxes.append(box)
        labels.append(label)
    noisy = image + rng.normal(0, 8, image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8), np.array(boxes), np.array(labels)


def _outline(label: int, rng: np.random.Generator) -> np.ndarray:
    """Corners (y, x) in pixels, all inside the image."""
    radius, turn = rng.uniform(6, 14), rng.uniform(0, 2 * np.pi)
    corners = (64, 4, 3, 10)[label]
    angle = turn + 2 * np.pi * np.arange(corners) / corners
    reach = radius * np.where((label == 3) & (np.arange(corners) % 2 == 1), 0.45, 1.0)
    outline = np.stack([np.sin(angle), np.cos(angle)], 1) * reach[:, None]
    low, high = -outline.min(0), SIZE - outline.max(0)
    return outline + rng.uniform(low, high)


def _cover(outline: np.ndarray) -> np.ndarray:
    """[64, 64] how much of each pixel lies inside the outline, 0..1."""
    import cv2

    fine = np.zeros((SIZE * FINE, SIZE * FINE), np.float32)
    corners = np.rint(outline[:, ::-1] * FINE - 0.5).astype(np.int32)
    cv2.fillPoly(fine, [corners], 1.0)
    return fine.reshape(SIZE, FINE, SIZE, FINE).mean((1, 3))


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """The intersection of two boxes, as a share of the smaller one."""
    inside = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    return float(inside / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()))
