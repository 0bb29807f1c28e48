"""`digits`: scikit-learn's 1797 handwritten digits of 8x8 pixels, for quick tests of image models."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

TEST_EVERY = 6  # in each class every sixth image is a test image: 1501 train, 296 test


class Digits(tfds.core.GeneratorBasedBuilder):
    """`image` uint8 (8, 8, 1), 0..255, and `label` 0..9; TFDS shuffles each split by a hash of the index."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; see python_source.py

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8x8 (UCI ML, through scikit-learn).",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8, encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        import cv2
        from sklearn import datasets

        bunch = datasets.load_digits()
        images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # scikit-learn's are 0..16
        test = is_test(bunch.target)
        for index in np.flatnonzero(test == (split == "test")):
            # TFDS encodes arrays through TensorFlow; a file object it takes as it is.
            png = cv2.imencode(".png", images[index])[1].tobytes()
            yield int(index), {"image": io.BytesIO(png), "label": int(bunch.target[index])}


def is_test(labels: np.ndarray) -> np.ndarray:
    """(n,) int -> (n,) bool, stratified: in each class, every `TEST_EVERY`th image."""
    out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        out[np.flatnonzero(labels == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return out
