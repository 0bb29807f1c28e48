"""Transformers: experts, attention in both directions, two stacks."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, by_path, random_batch, tiny

from bigmodel import mesh, models
from bigmodel.config import Config, families, parsing
from bigmodel.config.families import GPT
from bigmodel.models import moe, transformer, vit


def define(config: Config, batch: Mapping[str, Any]) -> tuple[Any, Callable[..., Any]]:
    """-> (parameters, jitted (parameters, batch) -> the model's outputs)."""
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    model = models.define(config, specs)
    run = jax.jit(lambda params, batch: model.apply(params, {}, batch, key=None, train=False)[0])
    return jax.jit(model.init)(jax.random.key(0))[0], run


# ---------------------------------------------------------------------------------------------- experts


def logits(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("per_token", [1, 2, 3])
def test_no_place_is_given_twice_and_padding_has_none(per_token):
    real = np.stack([np.arange(20) < 15, np.arange(20) >= 15])
    scores = logits((2, 20, 4))
    route = jax.jit(moe.route, static_argnums=(2, 3))
    weight, slot = jax.device_get(route(scores, real, per_token, 6))
    best = np.argsort(-scores, -1)[..., :per_token]
    for row, valid in enumerate(real):
        taken = slot[row]
        assert (taken[~valid] == 24).all()
        used = taken[taken < 24]
        assert len(used) == len(set(used))
        for expert in range(4):  # whoever has no place found its expert full
            wanted = ((best[row] == expert) & valid[:, None]).sum()
            assert (used // 6 == expert).sum() == min(wanted, 6)
    sums = weight.sum(-1)
    if per_token > 1:
        np.testing.assert_allclose(sums, 1, rtol=1e-6)
    else:
        assert (sums < 1).all()  # Switch: the probability itself


def test_equal_experts_are_one_mlp():
    """With a place for every token, and the weights of each token summing to one."""
    config = tiny("moe", model__capacity_factor=2.0)
    dense = dataclasses.replace(config, model=dataclasses.replace(config.model, experts=0))
    batch = random_batch(config)
    (params, run), (_, run_sparse) = define(dense, batch), define(config, batch)
    mlp = jax.device_get(params["blocks"]["mlp"])
    copies = jax.tree.map(lambda x: np.repeat(x[:, None], 4, 1), mlp)
    router = {"kernel": logits((1, 32, 4))}
    sparse = {**params, "blocks": {**params["blocks"], "mlp": {"experts": copies, "router": router}}}
    expected, ours = run(params, batch)["logits"], run_sparse(sparse, batch)["logits"]
    real = batch["segments"] > 0
    np.testing.assert_allclose(ours[real], expected[real], rtol=1e-4, atol=1e-5)


def test_the_routers_losses():
    c = GPT(experts=4, experts_per_token=1, balance_loss=1.0, router_z_loss=1.0)
    losses = jax.jit(lambda scores, real: moe.losses(c, scores, real))
    even, one = (
        50 * np.eye(4, dtype=np.float32)[np.arange(16) % 4],
        50 * np.eye(4, dtype=np.float32)[[0] * 16],
    )
    lopsided_end = np.concatenate([even[:8], 2 * one[:8]])
    scores = np.stack([even, one, lopsided_end])
    real = np.stack([np.arange(16) < n for n in (16, 16, 8)])  # the last row's end is padding
    found = losses(scores, real)
    np.testing.assert_allclose(found["balance"][:, 0], [1.0, 4.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(found["router_z"][0], 2500.0, rtol=1e-5)


def test_experts_lie_on_their_axis():
    program = build(tiny("moe", mesh__data=1, mesh__expert=4, mesh__tensor=2))
    spec = by_path(program.state_spec["params"])
    kernel = spec["blocks/mlp/experts/up/kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 1, 32, 64)
    assert program.batch_spec["tokens"].sharding.shard_shape((8, 16)) == (2, 16)
    assert mesh.batch_ways(program.mesh) == 4


# ------------------------------------------------------------------------------------- bert, t5 and vit


def test_bert_sees_both_ways_but_not_other_documents():
    config = tiny("bert", task__next_sentence=False, model__head="none")
    batch = {k: v for k, v in random_batch(config).items() if not k.startswith(("masked", "mask"))}
    params, run = define(config, batch)
    before = run(params, batch)["hidden"]
    batch["tokens"] = batch["tokens"].copy()
    row = 0
    at = int(np.flatnonzero(batch["segments"][row] == 2)[0])
    batch["tokens"][row, at] = (batch["tokens"][row, at] + 1) % 48
    changed = np.asarray(run(params, batch)["hidden"] != before).any(-1)
    np.testing.assert_array_equal(changed[row], batch["segments"][row] == 2)
    assert not changed[1:].any()


def test_t5_decoder_sees_its_past_and_all_of_the_input_but_no_padding():
    config = tiny("t5", model__tie_embeddings=False, model__mlp="geglu")
    batch = random_batch(config)
    params, run = define(config, batch)
    before = np.asarray(run(params, batch)["logits"])

    def changed(key: str, at: int) -> np.ndarray:
        other = {**batch, key: batch[key].copy()}
        other[key][0, at] = (other[key][0, at] + 1) % 40
        return (np.asarray(run(params, other)["logits"]) != before).any(-1)[0]

    real = batch["decoder_segments"][0] > 0
    padding = int(np.flatnonzero(batch["segments"][0] == 0)[0])
    assert changed("tokens", 3)[real].all()
    assert not changed("tokens", padding)[real].any()
    np.testing.assert_array_equal(changed("decoder_tokens", 2)[real], np.arange(real.sum()) >= 2)


def test_relative_buckets():
    """The values of the authors' code, 32 buckets up to a distance of 128."""
    offsets = jnp.array([0, -1, 1, -7, 7, -8, 8, -16, 16, -127, 127, -1000, 1000])
    bucket = jax.jit(transformer.bucket, static_argnums=(1, 2, 3))
    both = bucket(offsets, 32, 128, True)
    np.testing.assert_array_equal(both, [0, 1, 17, 7, 23, 8, 24, 10, 26, 15, 31, 15, 31])
    past = bucket(offsets, 32, 128, False)
    np.testing.assert_array_equal(past, [0, 1, 0, 7, 0, 8, 0, 16, 0, 31, 0, 31, 0])


def test_patches_times_a_kernel_are_a_convolution():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 8, 12, 3)), rng.normal(size=(4, 4, 3, 5))
    conv = jax.lax.conv_general_dilated(
        x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    ours = vit.patches(jnp.asarray(x), 4) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(ours.reshape(2, 2, 3, 5), conv, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("family", typing.get_args(typing.get_args(families.Model)[1]))
def test_what_a_family_names_is_there(family):
    config = family().resolve()
    assert callable(config.module())
    assert not config.units or callable(parsing.refer(config.walked_by, "test"))
    assert config.divides.keys() <= set(mesh.AXES)
    assert {f.name for f in dataclasses.fields(family)} >= {
        key for keys in config.units.values() for key in keys
    }
