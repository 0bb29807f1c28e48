"""FCOS, an anchor-free single-shot detector (Tian et al. 2019), on a ResNet with a feature pyramid.

Legend: B batch, H height, W width, C channels, P places of all levels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bigmodel import mesh
from bigmodel.config import Config
from bigmodel.config.families import Detector as DetectorConfig
from bigmodel.data.boxes import places
from bigmodel.models import layers, module, resnet

PRIOR = 0.01  # every class's probability at the start (Lin et al. 2017, section 4.1)


class Tower(nnx.Module):
    """3x3 convolutions with GroupNorm and ReLU, then a 3x3 convolution to `o` channels; for every level."""

    def __init__(self, c: DetectorConfig, o: int, prior: float, dtype: str, rngs: nnx.Rngs):
        width = c.width
        shape = [(width, width)] * c.head_depth
        self.convs = nnx.List([layers.Conv(a, b, 3, dtype=dtype, rngs=rngs, bias=False) for a, b in shape])
        self.norms = nnx.List([GroupNorm(width, c.groups, dtype=dtype) for _ in shape])
        self.last = layers.Conv(width, o, 3, dtype=dtype, rngs=rngs)
        # Small at first, so that all places begin near the prior.
        self.last.kernel[...] = 0.1 * self.last.kernel[...]
        assert self.last.bias is not None
        self.last.bias[...] = jnp.full((o,), math.log(prior / (1 - prior)), dtype)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BHWC = jax.nn.relu(norm(conv(x_BHWC)))
        return self.last(x_BHWC)


class GroupNorm(nnx.Module):
    """Wu and He 2018: over height, width and the channels of a group; statistics in float32."""

    def __init__(self, d: int, groups: int, *, dtype: str, eps: float = 1e-5):
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones((d,), dtype))
        self.bias = nnx.Param(jnp.zeros((d,), dtype))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        b, h, w, c = x_BHWC.shape
        wide = x_BHWC.astype(jnp.float32).reshape(b, h, w, self.groups, c // self.groups)
        wide = wide - wide.mean((1, 2, 4), keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean((1, 2, 4), keepdims=True) + self.eps)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (wide.reshape(b, h, w, c) * scale + bias).astype(x_BHWC.dtype)


class Detector(nnx.Module):
    """batch: `image` float [B, H, W, C] -> {"class_logits": [B, P, K], "center_logits": [B, P], "boxes":
    float32 [B, P, 4] in pixels}, at the places that data/objects.py numbers."""

    def __init__(self, config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs):
        assert isinstance(config.model, DetectorConfig)
        c = self.c = config.model
        dtype, self.compute_dtype = config.param_dtype, config.compute_dtype
        self.backbone = resnet.ResNet(config.replace(model=c.backbone()), spec, rngs, c.levels[-1])
        ins = [self.backbone.widths[stage - 1] for stage in c.levels]
        self.laterals = nnx.List([layers.Conv(i, c.width, 1, dtype=dtype, rngs=rngs) for i in ins])
        self.smooths = nnx.List([layers.Conv(c.width, c.width, 3, dtype=dtype, rngs=rngs) for _ in ins])
        self.classes = Tower(c, c.num_classes, PRIOR, dtype, rngs)
        self.boxes = Tower(c, 5, 0.5, dtype, rngs)  # four distances and the center
        self.scales = nnx.Param(jnp.ones((len(ins),), dtype))  # of a level's distances (section 3.2)

    def __call__(self, batch: module.Batch, *, key: jax.Array | None, train: bool) -> module.Outputs:
        image_BHWC = batch["image"].astype(self.compute_dtype)
        stages = self.backbone.stages(image_BHWC, train)
        levels = self._pyramid([stages[stage - 1] for stage in self.c.levels])
        class_logits, rest = [], []
        for index, x_BHWC in enumerate(levels):
            class_logits.append(_flat(self.classes(x_BHWC)))
            box_BPC = _flat(self.boxes(x_BHWC)).astype(jnp.float32)
            scale = self.scales[...][index].astype(jnp.float32)
            rest.append(jnp.concatenate([scale * box_BPC[..., :4], box_BPC[..., 4:]], -1))
        raw_BP5 = jnp.concatenate(rest, 1)
        where = places(self.c.strides, (image_BHWC.shape[1], image_BHWC.shape[2]))
        # exp, as in the paper, but no further than e^4 strides: beyond, float32 would overflow.
        far_BP4 = jnp.exp(jnp.minimum(raw_BP5[..., :4], 4.0)) * where.stride[:, None]
        sign = np.array([-1, -1, 1, 1], np.float32)
        return {
            "class_logits": jnp.concatenate(class_logits, 1),
            "center_logits": raw_BP5[..., 4],
            "boxes": jnp.tile(where.center, 2) + sign * far_BP4,
        }

    def _pyramid(self, stages: list[jax.Array]) -> list[jax.Array]:
        """Lin et al. 2016: each level gets what the coarser ones see, enlarged."""
        out: list[jax.Array] = []
        for stage, lateral in reversed(list(zip(stages, self.laterals, strict=True))):
            x_BHWC = lateral(stage)
            out.append(x_BHWC + _enlarge(out[-1], x_BHWC.shape) if out else x_BHWC)
        return [smooth(x_BHWC) for smooth, x_BHWC in zip(self.smooths, reversed(out), strict=True)]


def _enlarge(x_BHWC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Nearest neighbors, up to the height and width of `shape`."""
    b, h, w, c = x_BHWC.shape
    times = (shape[1] // h, shape[2] // w)
    big = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (b, h, times[0], w, times[1], c))
    return mesh.shard(big.reshape(shape), "batch", None, None, None)


def _flat(x_BHWC: jax.Array) -> jax.Array:
    return x_BHWC.reshape(x_BHWC.shape[0], -1, x_BHWC.shape[-1])
