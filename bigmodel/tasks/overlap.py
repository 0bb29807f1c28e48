"""Boxes (y0, x0, y1, x1) on the device: overlap, and from a detector's outputs to detections.

Legend: B batch, P places of the detector's grid, K classes, N detections of an image.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def overlap(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Boxes [..., 4] -> (intersection, union, area of the smallest box around both), each [...]."""

    def area(low: Array, high: Array) -> Array:
        return jnp.maximum(high - low, 0).prod(-1)

    shared = area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - shared
    hull = area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    return shared, union, hull


def iou(a: Array, b: Array) -> Array:
    """Intersection over union of boxes [..., 4]; 0 where both are empty."""
    shared, union, _ = overlap(a, b)
    return shared / jnp.maximum(union, 1e-9)


def giou(a: Array, b: Array) -> Array:
    """Generalised IoU (Rezatofighi et al. 2019, algorithm 1), -1..1; boxes apart have a slope too."""
    shared, union, hull = overlap(a, b)
    return shared / jnp.maximum(union, 1e-9) - (hull - union) / jnp.maximum(hull, 1e-9)


def suppress(boxes_BN4: Array, label_BN: Array, score_BN: Array, limit: float) -> Array:
    """Non-maximum suppression, class by class -> bool [B, N], which detections stay.

    Args:
        score_BN: falling; a detection that overlaps a better one of its class by more than `limit` goes.
    """
    count = score_BN.shape[1]
    same = label_BN[:, :, None] == label_BN[:, None, :]
    close_BNN = (iou(boxes_BN4[:, :, None], boxes_BN4[:, None, :]) > limit) & same

    def visit(stays_BN: Array, index: Array) -> tuple[Array, None]:
        beaten_BN = close_BNN[:, index] & (jnp.arange(count) > index) & stays_BN[:, index, None]
        return stays_BN & ~beaten_BN, None

    return jax.lax.scan(visit, score_BN > 0, jnp.arange(count))[0]


def decode(outputs: Any, most: int, limit: float, least: float) -> dict[str, Array]:
    """A detector's outputs -> the `most` best detections after suppression.

    -> {"found": boxes [B, N, 4], "scores": [B, N], "classes": int32 [B, N]}, the best first; score 0: none.

    The score is the class's probability times the centre's (Tian et al. 2019, section 3.3). Four times `most`
    candidates are suppressed, so that near doubles do not crowd out others.
    """
    class_BPK = jax.nn.sigmoid(outputs["class_logits"].astype(jnp.float32))
    score_BPK = class_BPK * jax.nn.sigmoid(outputs["center_logits"].astype(jnp.float32))[..., None]
    b, p, k = score_BPK.shape
    score_BN, at_BN = jax.lax.top_k(score_BPK.reshape(b, p * k), min(4 * most, p * k))
    boxes_BN4 = jnp.take_along_axis(outputs["boxes"].astype(jnp.float32), (at_BN // k)[..., None], axis=1)
    label_BN = (at_BN % k).astype(jnp.int32)
    score_BN = jnp.where(score_BN >= least, score_BN, 0.0)
    score_BN = jnp.where(suppress(boxes_BN4, label_BN, score_BN, limit), score_BN, 0.0)
    score_BN, best_BN = jax.lax.top_k(score_BN, min(most, score_BN.shape[1]))
    boxes_BN4 = jnp.take_along_axis(boxes_BN4, best_BN[..., None], axis=1)
    return {
        "found": boxes_BN4,
        "scores": score_BN,
        "classes": jnp.take_along_axis(label_BN, best_BN, axis=1),
    }
