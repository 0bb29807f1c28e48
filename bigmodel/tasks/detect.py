"""The task detect: boxes of objects in images, and their classes (FCOS, Tian et al. 2019).

| name | shape | dtype | meaning |
|---|---|---|---|
| image | [B, H, W, C] | float32 | images, normalized |
| boxes | [B, M, 4] | float32 | (y0, x0, y1, x1) in pixels of the image |
| labels | [B, M] | int32 | classes; -1: no box |
| crowds | [B, M] | int32 | 1: the box stands for many objects, where the dataset says so |
| place_label | [B, P] | int32 | class to be given at a place of the grids; -1: background |
| place_box | [B, P, 4] | float32 | box to be given there |
| place_center | [B, P] | float32 | how central the place is in the box, 1 to 0 |
| mask | [B] | float32 | 0: the row fills up the batch, or was skipped |

Legend: B batch, M boxes, P places, K classes, N detections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bigmodel import config as keys
from bigmodel import metrics, pictures
from bigmodel.config import Data, InputError
from bigmodel.data import boxes, labels, tfds
from bigmodel.data.facts import Facts
from bigmodel.data.labels import Shapes
from bigmodel.data.pipeline import Parts
from bigmodel.data.sizes import Size, Sizes, short
from bigmodel.metrics import Metrics
from bigmodel.tasks.base import Batch, Examples, ReportTo, Row, Task, focal
from bigmodel.tasks.labels import title

FOCAL_ALPHA = 0.25  # Lin et al. 2017, section 5.1


class Detect(Task[keys.Detect]):
    """Boxes of objects and their classes."""

    reports: ClassVar[bool] = True
    compared: ClassVar[tuple[str, ...]] = ("boxes", "labels", "crowds")
    class_feature: ClassVar[str] = "objects/label"
    draws: ClassVar[bool] = True

    def shapes(self, facts: Facts) -> Shapes:
        return boxes.shapes(self.config, facts)

    def sizes(self, facts: Facts) -> Sizes:
        def classes() -> Size:
            name, label = self.config.data.name, facts.features.get("objects/label")
            if label is None or not label.num_classes:
                raise InputError(f"data.name={name!r} does not say its classes; set model.num_classes")
            return Size(label.num_classes, f"classes of {short(name)}", rounded=False)

        return {"num_classes": classes}

    def examples(self, split: str, facts: Facts, train: bool) -> Parts:
        config, d = self.config, self.config.data
        source = facts.open(split, [key for key in (*boxes.KEYS, tfds.CROWDS) if key in facts.features])
        boxes.check(config, source.features)
        where = labels.where(config, source, split)
        about: dict[str, Any] = {"source": source.fingerprint}
        changing = ("image_size", "augment") if train else ()
        about |= {key: getattr(d, key) for key in changing if getattr(d, key) != getattr(Data, key)}
        return Parts(
            boxes.Records(source, config, where),
            boxes.Prepare(config, train),
            about,
            split_rule=source.split_rule,
        )

    def weight(self, batch: Batch) -> Array:
        return self._weight(batch).sum()

    def _weight(self, batch: Batch) -> Array:
        """Places of each image that have something to give, [B]; at least 1, so that empty images count."""
        count_B = (batch["place_label"] >= 0).sum(-1).astype(jnp.float32)
        return jnp.maximum(count_B, 1) * batch["mask"]

    def terms(self, outputs: Any, batch: Batch, train: bool) -> Metrics:
        """Tian et al. 2019, eq. 2: focal loss of every class at every place; where there is a box also
        1 - GIoU, and cross-entropy of how central the place is."""
        label_BP, mask_B, count_B = batch["place_label"], batch["mask"], self._weight(batch)
        logits_BPK = outputs["class_logits"].astype(jnp.float32)
        some_BP = (label_BP >= 0).astype(jnp.float32) * mask_B[:, None]
        is_BPK = jax.nn.one_hot(label_BP, logits_BPK.shape[-1])
        on_BPK = focal(jax.nn.softplus(-logits_BPK), self.keys.focal_gamma)
        off_BPK = focal(jax.nn.softplus(logits_BPK), self.keys.focal_gamma)
        class_BP = (FOCAL_ALPHA * is_BPK * on_BPK + (1 - FOCAL_ALPHA) * (1 - is_BPK) * off_BPK).sum(-1)
        overlap_BP = giou(outputs["boxes"], batch["place_box"])
        center_BP = optax.sigmoid_binary_cross_entropy(
            outputs["center_logits"].astype(jnp.float32), batch["place_center"]
        )
        losses = {
            "class_loss": (class_BP * mask_B[:, None]).sum(),
            "box_loss": ((1 - overlap_BP) * some_BP).sum(),
            "center_loss": (center_BP * some_BP).sum(),
        }
        losses["loss"] = sum(losses.values(), jnp.float32(0))
        found = {name: (value, count_B.sum()) for name, value in losses.items()}
        return found | {"giou": ((overlap_BP * some_BP).sum(), some_BP.sum())}

    def predictions(self, outputs: Any) -> dict[str, Array]:
        return decode(outputs, self.keys.most_detections, self.keys.nms_overlap, self.keys.least_score)

    @property
    def over_all_names(self) -> tuple[str, ...]:
        return "map", "map50", "map75"

    def over_all(self, examples: Examples) -> Mapping[str, float | None]:
        return {key: value for key, value in _precision(examples).items() if key != "per_class"}

    def report(self, examples: Examples, to: ReportTo) -> dict[str, Any]:
        out: dict[str, Any] = {"examples": len(examples["boxes"]), **_precision(examples)}
        for row in out["per_class"]:
            row["name"] = title(to.names, row["label"])
        return out

    def pictures(self, predicted: Examples, batch: Examples, names: Sequence[str]) -> dict[str, np.ndarray]:
        return pictures.detections(self.config, predicted, batch, names)

    def answer(self, out: Mapping[str, Any], names: Sequence[str], columns: Any) -> Row:
        """Detections, the surest first; boxes (y0, x0, y1, x1) in pixels of the image as it was given."""
        sure = out["scores"] > 0
        found = np.clip(out["found"][sure] * np.tile(out["scale"], 2), 0, np.tile(out["size"], 2))
        labels_N = out["classes"][sure].astype(int).tolist()
        return {
            "boxes": found.round(2).tolist(), "scores": out["scores"][sure].tolist(), "labels": labels_N,
            "names": [title(names, label) for label in labels_N],
        }  # fmt: skip


def _precision(examples: Examples) -> dict[str, Any]:
    return metrics.detections(
        examples["boxes"], examples["labels"], examples["found"], examples["scores"], examples["classes"],
        crowd_NM=examples.get("crowds"),
    )  # fmt: skip


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
    """Generalized IoU (Rezatofighi et al. 2019, algorithm 1), -1..1; boxes apart have a slope too."""
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

    The score is the class's probability times the center's (Tian et al. 2019, section 3.3). Four times `most`
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
