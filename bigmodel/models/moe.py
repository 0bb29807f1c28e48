"""Mixture of experts: each token passes through the few experts that a router picks for it.

An example is a group of its own (Lepikhin et al. 2020, GShard, section 2.2): capacity and balance are counted
within it, so that neither the mesh nor the microbatches change a value.

Legend: B batch, L length, D width, F hidden units, E experts, C places of an expert in an example, K experts
a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bigmodel import mesh
from bigmodel.config.families import Transformer
from bigmodel.models import layers, weights

LOSSES = ("balance", "router_z")
Losses = dict[str, jax.Array]  # name -> [B, L], to be added to a token's own loss


class ExpertDense(nnx.Module):
    """x [B, E, C, I] -> [B, E, C, O], each expert with its own kernel [E, I, O] (and bias [E, O])."""

    SUMS: ClassVar[layers.Sums] = {"kernel": (-2,)}

    def __init__(self, e: int, i: int, o: int, *, std: float, dtype: str, rngs: nnx.Rngs, bias: bool):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (e, i, o), dtype))
        self.bias = nnx.Param(jnp.zeros((e, o), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = weights.product_of_experts(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None, :, None]


class Experts(nnx.Module):
    """The MLPs of all experts: x [B, E, C, D] -> [B, E, C, D]."""

    def __init__(
        self, c: Transformer, activation: Callable[[jax.Array], jax.Array], *, gated: bool, std: float,
        out_std: float, dtype: str, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.activation = activation
        options: Any = {"dtype": dtype, "rngs": rngs, "bias": c.bias}
        self.up = ExpertDense(c.experts, c.width, c.mlp_width, std=std, **options)
        self.gate = ExpertDense(c.experts, c.width, c.mlp_width, std=std, **options) if gated else None
        self.down = ExpertDense(c.experts, c.mlp_width, c.width, std=out_std, **options)

    def __call__(self, x_BECD: jax.Array) -> jax.Array:
        h_BECF = _shard(checkpoint_name(self.up(x_BECD), "up"), "hidden")
        if self.gate is None:
            h_BECF = self.activation(h_BECF)
        else:
            h_BECF = h_BECF * self.activation(_shard(checkpoint_name(self.gate(x_BECD), "gate"), "hidden"))
        return checkpoint_name(self.down(h_BECF), "mlp_out")


def _shard(x_BECI: jax.Array, inner: mesh.Dimension = None) -> jax.Array:
    """Experts over their axis. The batch, split over that axis too, is gathered: an all-to-all."""
    return mesh.shard(x_BECI, "group", "experts", None, inner)


class MoE(nnx.Module):
    """Top-k routing with capacity (Fedus et al. 2021; Lepikhin et al. 2020; Jiang et al. 2024)."""

    def __init__(
        self, c: Transformer, activation: Callable[[jax.Array], jax.Array], *, gated: bool, std: float,
        out_std: float, dtype: str, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.c = c
        self.router = layers.Dense(c.width, c.experts, std=std, dtype=dtype, rngs=rngs, bias=False)
        self.experts = Experts(
            c, activation, gated=gated, std=std, out_std=out_std, dtype=dtype, rngs=rngs
        )  # fmt: skip

    def __call__(self, x_BLD: jax.Array, segments_BL: jax.Array | None) -> tuple[jax.Array, Losses]:
        """-> (y [B, L, D], the router's losses). Padding (segment 0) goes nowhere and takes no place."""
        b, length, width = x_BLD.shape
        real_BL = jnp.ones((b, length), bool) if segments_BL is None else segments_BL > 0
        logits_BLE = self.router(x_BLD.astype(jnp.float32))
        places = capacity(self.c, length)
        weight_BLK, slot_BLK = route(logits_BLE, real_BL, self.c.experts_per_token, places)
        lost = self.c.experts * places  # the slot of what found no place
        source_BS = _sources(slot_BLK, lost)
        x_BSD = jnp.take_along_axis(x_BLD, source_BS[..., None], 1, mode="fill", fill_value=0)
        x_BECD = _shard(x_BSD.reshape(b, self.c.experts, places, width))
        y_BSD = _shard(self.experts(x_BECD)).reshape(b, lost, width)
        y_BSD = mesh.shard(y_BSD, "batch", None, None)
        slot_BT = slot_BLK.reshape(b, -1)
        picked_BTD = jnp.take_along_axis(y_BSD, slot_BT[..., None], 1, mode="fill", fill_value=0)
        picked_BLKD = picked_BTD.reshape(b, length, -1, width)
        y_BLD = (picked_BLKD * weight_BLK[..., None].astype(x_BLD.dtype)).sum(2)
        return layers.shard_stream(y_BLD), losses(self.c, logits_BLE, real_BL)


def capacity(c: Transformer, length: int) -> int:
    """Places of one expert in one example; where FLOPs are counted, no more than an even share."""
    factor = 1.0 if mesh.platform() == "plain" else c.capacity_factor
    return min(math.ceil(c.experts_per_token * length * factor / c.experts), length)


def route(
    logits_BLE: jax.Array, real_BL: jax.Array, per_token: int, places: int
) -> tuple[jax.Array, jax.Array]:
    """-> (weights float32 [B, L, K], slots int32 [B, L, K]: expert * C + place, or E * C where none is left).

    First choices take their places before second ones, in the order of the tokens. The weights of a token's
    experts sum to one (GShard, Mixtral); a single expert's is its probability (Switch).
    """
    b, length, experts = logits_BLE.shape
    weight_BLK, expert_BLK = jax.lax.top_k(jax.nn.softmax(logits_BLE, -1), per_token)
    if per_token > 1:
        weight_BLK = weight_BLK / weight_BLK.sum(-1, keepdims=True)
    real_BL11 = real_BL[..., None, None].astype(jnp.int32)
    chosen_BLKE = jax.nn.one_hot(expert_BLK, experts, dtype=jnp.int32) * real_BL11
    chosen_BTE = chosen_BLKE.swapaxes(1, 2).reshape(b, -1, experts)  # T: choice by choice
    place_BT = (jnp.cumsum(chosen_BTE, 1) * chosen_BTE).sum(-1) - 1
    place_BLK = place_BT.reshape(b, per_token, length).swapaxes(1, 2)
    kept_BLK = (place_BLK >= 0) & (place_BLK < places)
    return weight_BLK, jnp.where(kept_BLK, expert_BLK * places + place_BLK, experts * places)


def _sources(slot_BLK: jax.Array, slots: int) -> jax.Array:
    """[B, slots]: which token stands in a slot; L where none does."""
    b, length, per_token = slot_BLK.shape
    token_T = jnp.repeat(jnp.arange(length, dtype=jnp.int32), per_token)
    empty = jnp.full((slots + 1,), length, jnp.int32)
    return jax.vmap(lambda slot_T: empty.at[slot_T].set(token_T))(slot_BLK.reshape(b, -1))[:, :-1]


def losses(c: Transformer, logits_BLE: jax.Array, real_BL: jax.Array) -> Losses:
    """`balance`: E sum_e f_e P_e of the token's example, 1 when even, with f the share of choices and P the
    mean probability of expert e (Fedus et al. 2021, eq. 4-6); `router_z`: log^2 sum_e exp(logit_e) (Zoph et
    al. 2022, eq. 5). Both times their weights, as [B, L].
    """
    real_BL1 = real_BL[..., None].astype(jnp.float32)
    count_B1 = jnp.maximum(real_BL1.sum(1), 1.0)
    probability_BLE = jax.nn.softmax(logits_BLE, -1)
    chosen_BLK = jax.lax.top_k(logits_BLE, c.experts_per_token)[1]
    chosen_BLE = jax.nn.one_hot(chosen_BLK, c.experts, dtype=jnp.float32).mean(2)
    f_BE, p_BE = ((x * real_BL1).sum(1) / count_B1 for x in (chosen_BLE, probability_BLE))
    balance_B = c.experts * (f_BE * p_BE).sum(-1)
    z_BL = jnp.square(jax.nn.logsumexp(logits_BLE, -1))
    balance_BL = jnp.broadcast_to(balance_B[:, None], z_BL.shape)
    return {"balance": c.balance_loss * balance_BL, "router_z": c.router_z_loss * z_BL}
