"""Pure functions on whole batches: dict of arrays -> dict of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Batch = dict[str, np.ndarray]
Transform = Callable[[Mapping[str, np.ndarray]], Batch]


def normalise(batch: Mapping[str, np.ndarray]) -> Batch:
    """`image` uint8 [0, 255] -> float32 [-1, 1]: mean and standard deviation are taken to be 0.5."""
    return {**batch, "image": batch["image"].astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)}


def pad_rows(batch: Mapping[str, np.ndarray], size: int) -> Batch:
    """Appends rows of zeros up to `size` rows, and `mask` float32 (size,): 1 for a row that was there."""
    rows = len(next(iter(batch.values())))
    missing = size - rows
    mask = np.concatenate([np.ones(rows, np.float32), np.zeros(missing, np.float32)])
    if not missing:
        return {**batch, "mask": mask}
    padded = {k: np.concatenate([v, np.zeros((missing, *v.shape[1:]), v.dtype)]) for k, v in batch.items()}
    return {**padded, "mask": mask}
