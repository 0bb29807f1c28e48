"""The task gan: images like those of the data.

| name | shape | dtype | meaning |
|---|---|---|---|
| image | [B, H, W, C] | float32 | real images, in -1..1 |
| label | [B] | int32 | their classes, for a model that has them |
| serial | [B] | int32 | the number from which evaluation draws a fake's latent |
| mask | [B] | float32 | 0: the row fills up the batch |

Legend: B batch, N examples.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel import config as keys
from bigmodel import metrics, models, pictures
from bigmodel.config import Config, InputError
from bigmodel.config.families import CNN
from bigmodel.data import images, labeled, transforms
from bigmodel.data.facts import Facts
from bigmodel.data.labels import Shapes
from bigmodel.data.pipeline import Parts
from bigmodel.metrics import Metrics
from bigmodel.tasks.base import Batch, Examples, Features, ReportTo, Row, Task
from bigmodel.tasks.labels import example_weight

Loss = Callable[[jax.Array], jax.Array]
# Of the discriminator's logits: its loss on real images, on fakes; the generator's loss.
LOSSES: dict[str, tuple[Loss, Loss, Loss]] = {
    # Goodfellow et al. 2014, eq. 1, with the generator's other loss that section 3 gives
    "non-saturating": (lambda x: jax.nn.softplus(-x), jax.nn.softplus, lambda x: jax.nn.softplus(-x)),
    # Lim and Ye 2017; Miyato et al. 2018, eqs. 16 and 17
    "hinge": (lambda x: jax.nn.relu(1 - x), lambda x: jax.nn.relu(1 + x), lambda x: -x),
    # Arjovsky et al. 2017; the penalty of Gulrajani et al. 2017, eq. 3, comes on top
    "wgan-gp": (lambda x: -x, lambda x: x, lambda x: -x),
}


class GAN(Task[keys.GAN]):
    """A generator against a discriminator (Goodfellow et al. 2014)."""

    reports: ClassVar[bool] = True
    several_passes: ClassVar[bool] = True
    compared: ClassVar[tuple[str, ...]] = ("image",)
    draws: ClassVar[bool] = True

    def shapes(self, facts: Facts) -> Shapes:
        d = self.config.data
        refused = {"mixup": d.mixup, "cutmix": d.cutmix, "balance": d.balance != "none"}
        for key in [key for key, value in (refused | {"mean": d.mean, "std": d.std}).items() if value]:
            raise InputError(f"data.{key} is nothing for task.name=gan, which draws images in -1..1; drop it")
        return {**images.shapes(self.config, facts), "serial": ((), np.int32)}

    def examples(self, split: str, facts: Facts, train: bool) -> Parts:
        self.shapes(facts)
        parts = labeled.of_images(self.config, split, facts, train)

        def finish(batch: Mapping[str, np.ndarray], serials: np.ndarray) -> transforms.Batch:
            return {**parts.finish(batch, serials), "serial": (serials % 2**31).astype(np.int32)}

        return parts._replace(finish=finish)

    def weight(self, batch: Batch) -> jax.Array:
        return example_weight(batch).sum()

    def terms(self, outputs: Any, batch: Batch, train: bool) -> Metrics:
        """Both networks' losses and their sum; where each one's gradient stops is the model's business."""
        real_B, fake_B = (outputs[name].astype(jnp.float32) for name in ("real", "fake"))
        judged_B = outputs.get("judged", outputs["fake"]).astype(jnp.float32)
        on_real, on_fake, on_judged = LOSSES[self.keys.gan_loss]
        losses = {"discriminator": on_real(real_B) + on_fake(fake_B), "generator": on_judged(judged_B)}
        if "slope" in outputs:
            losses["penalty"] = self.keys.gradient_penalty * jnp.square(outputs["slope"] - 1)
        told_apart_B = ((real_B > 0).astype(jnp.float32) + (fake_B < 0).astype(jnp.float32)) / 2
        values = {f"{name}_loss": value for name, value in losses.items()}
        values |= {"loss": sum(losses.values(), jnp.float32(0)), "told_apart": told_apart_B}
        values |= {"real_logit": real_B, "fake_logit": fake_B}
        mask_B = batch["mask"]
        return {name: ((value * mask_B).sum(), mask_B.sum()) for name, value in values.items()}

    def predictions(self, outputs: Any) -> dict[str, jax.Array]:
        return {"fake": outputs["image"].astype(jnp.float32)}

    @property
    def over_all_names(self) -> tuple[str, ...]:
        return ("frechet_random",)

    def over_all(self, examples: Examples) -> Mapping[str, float | None]:
        """`frechet_random`: the Frechet distance between features of real images and of fakes that a small
        CNN of fixed random weights sees. For comparing runs on one dataset; 0 for equal sets."""
        features = _random_features(examples["image"].shape[1:])
        distance = metrics.frechet(features(examples["image"]), features(examples["fake"]))
        return {"frechet_random": distance}

    def report(self, examples: Examples, to: ReportTo) -> dict[str, Any]:
        """Distances between real images and fakes, and a grid of the real ones."""
        out: dict[str, Any] = {"examples": len(examples["image"]), **self.over_all(examples)}
        if to.features is not None:
            real_NK, fake_NK = (to.features(examples[key]) for key in ("image", "fake"))
            out["frechet_logits"] = metrics.frechet(real_NK, fake_NK)
            for key, logits_NK in (("real", real_NK), ("fake", fake_NK)):
                counts = np.bincount(logits_NK.argmax(1), minlength=logits_NK.shape[1])
                out[f"class_share_{key}"] = counts.tolist()
        real = pictures.grid(pictures.pixels(self.config, examples["image"]))
        return out | {"pictures": pictures.save(to.directory, {"real": real})}

    def pictures(self, predicted: Examples, batch: Examples, names: Sequence[str]) -> dict[str, np.ndarray]:
        return {"fakes": pictures.grid(pictures.pixels(self.config, predicted["fake"]))}

    def answer(self, out: Mapping[str, np.ndarray], names: Sequence[str], columns: Any) -> Row:
        """A generated image in -1..1 as base64 of a PNG."""
        image = np.clip((out["fake"] + 1) * 127.5, 0, 255).round().astype(np.uint8)
        _, png = cv2.imencode(".png", image[..., ::-1])  # cv2 takes blue first
        return {"image": base64.b64encode(png.tobytes()).decode()}


def _random_features(shape: tuple[int, ...]) -> Features:
    net = CNN(channels=(32, 64), width=128, num_classes=64)
    config = Config(model=net, task=keys.Classify())
    model = models.define(config, {"image": jax.ShapeDtypeStruct((1, *shape), np.float32)})
    params, rest = jax.jit(model.init)(jax.random.key(0))

    def run(image: jax.Array) -> jax.Array:
        outputs, _ = model.apply(params, rest, {"image": image}, key=None, train=False)
        return outputs["logits"]

    return lambda image_NHWC: in_pieces(jax.jit(run), image_NHWC)


def in_pieces(run: Any, image_NHWC: np.ndarray, size: int = 256) -> np.ndarray:
    """Runs on at most `size` images at once; the last piece is filled up, so that it compiles once."""
    out = []
    for start in range(0, len(image_NHWC), size):
        piece = image_NHWC[start : start + size]
        padded = np.pad(piece, ((0, size - len(piece)), (0, 0), (0, 0), (0, 0)))
        out.append(np.asarray(run(padded))[: len(piece)])
    return np.concatenate(out)
