"""Models: published parameter counts, and what must not change whatever the implementation.

Legend: L length, G key/value heads, K head dim."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, batch_spec, build, by_path, random_batch, sized, steps, tiny

from bigmodel import config as config_lib
from bigmodel import models
from bigmodel.config import Config
from bigmodel.models import attention, layers, products
from bigmodel.models.attention_blocks import attend_blocks
from bigmodel.plan import estimate, flops, planner

LLAMA = {
    "model__norm": "rmsnorm", "model__position": "rope", "model__mlp": "swiglu", "model__bias": False,
    "model__tie_embeddings": False, "model__kv_heads": 2, "model__mlp_width": 64,
}  # fmt: skip
STYLES = pytest.mark.parametrize("style", [{}, LLAMA], ids=["gpt", "llama"])


ENCODER = {"model__head": "none", "model__pooler": True}
TRANSFORMERS = ["moe", "bert", "t5", "vit"]


def sizes(family: str) -> list[str]:
    return list(runpy.run_path(str(ROOT / "configs" / f"{family}.py"))["SIZES"])


def forward(config: Config, train: bool = False) -> tuple[Any, Callable[..., jax.Array]]:
    """-> (parameters, jitted (parameters, batch, key) -> logits)."""
    model = models.define(config, batch_spec(config))

    @jax.jit
    def run(params: Any, batch: Any, key: jax.Array | None = None) -> jax.Array:
        return model.apply(params, {}, batch, key=key, train=train)[0]["logits"]

    return jax.jit(model.init)(jax.random.key(0))[0], run


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("124m", 124_439_808),  # Hugging Face openai-community/gpt2 (the paper's own 117M is a misprint)
        ("350m", 354_823_168),  # openai-community/gpt2-medium
        ("774m", 774_030_080),  # openai-community/gpt2-large
        ("1.5b", 1_557_611_200),  # openai-community/gpt2-xl
        ("llama-7b", 6_738_415_616),  # huggyllama/llama-7b; Touvron et al. 2023, table 2: 6.7B
        ("llama-13b", 13_015_864_320),  # huggyllama/llama-13b; table 2: 13.0B
        ("llama-70b", 68_976_648_192),  # meta-llama/Llama-2-70b-hf
        ("llama3-8b", 8_030_261_248),  # meta-llama/Meta-Llama-3-8B
        ("mixtral-8x7b", 46_702_792_704),  # mistralai/Mixtral-8x7B-v0.1; Jiang et al. 2024: 47B
    ],
)
def test_published_parameter_counts(size, count):
    config = sized(size, seq_len=1024)
    assert estimate.parameters(models.define(config, batch_spec(config)).params_spec) == count


@pytest.mark.parametrize(
    ("family", "size", "keys", "count"),
    [
        ("bert", "base", ENCODER, 109_482_240),  # Hugging Face google-bert/bert-base-uncased, with its pooler
        ("bert", "large", ENCODER, 335_141_888),  # google-bert/bert-large-uncased
        ("bert", "minilm-l6", ENCODER, 22_713_216),  # sentence-transformers/all-MiniLM-L6-v2
        ("t5", "small", {}, 60_506_624),  # google-t5/t5-small; Raffel et al. 2020, section 3.7: 60M
        ("t5", "base", {}, 222_903_552),  # google-t5/t5-base
        ("t5", "large", {}, 737_668_096),  # google-t5/t5-large
        ("t5", "3b", {}, 2_851_598_336),  # google-t5/t5-3b
        ("t5", "11b", {}, 11_307_321_344),  # google-t5/t5-11b
        ("vit", "ti,classes=1000", {}, 5_717_416),  # timm vit_tiny_patch16_224
        ("vit", "s,classes=1000", {}, 22_050_664),  # timm vit_small_patch16_224
        ("vit", "b,classes=1000", {}, 86_567_656),  # google/vit-base-patch16-224
        ("vit", "l,classes=1000", {}, 304_326_632),  # google/vit-large-patch16-224
        ("vit", "h,classes=1000", {}, 632_045_800),  # timm vit_huge_patch14_224
    ],
)
def test_published_parameter_counts_of_other_transformers(family, size, keys, count):
    config = sized(size, family, **keys, **({} if family == "vit" else {"seq_len": 512}))
    assert estimate.parameters(models.define(config, batch_spec(config)).params_spec) == count


def test_vit_g_is_about_as_published():
    config = sized("g,classes=1000", "vit")
    spec = by_path(models.define(config, batch_spec(config)).params_spec)
    count = sum(np.prod(s.shape) for path, s in spec.items() if not path.startswith("head/"))
    assert count == pytest.approx(1011e6, abs=5e5)  # Zhai et al. 2021, table 2, without a head


def test_active_parameters_of_mixtral():
    program = build(sized("mixtral-8x7b", seq_len=128))
    assert estimate.active_parameters(program) == pytest.approx(12.9e9, rel=0.002)  # Jiang et al. 2024, p. 2


def test_the_cnn_by_hand():
    config = config_lib.load(f"{ROOT}/configs/cnn.py:classes=10")
    count = (9 * 1 * 64 + 64) + (9 * 64 * 128 + 128) + (4 * 4 * 128 * 256 + 256) + (256 * 10 + 10)
    assert estimate.parameters(models.define(config, batch_spec(config)).params_spec) == count


@pytest.mark.parametrize(
    ("family", "size"),
    [("gpt", size) for size in sizes("gpt")] + [(f, sizes(f)[-1]) for f in ("bert", "t5", "vit")],
)
def test_every_size_builds_without_an_array(family, size):
    program = build(sized(size, family, microbatches=1))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(program.state_spec))
    assert flops.model_flops(program) > 0


@pytest.mark.parametrize("spec", ["gpt.py:size=llama-toy", "cnn.py:classes=10"])
def test_a_toy_compiles(spec):
    program = build(config_lib.load(f"{ROOT}/configs/{spec}", {"microbatches": 1}))
    assert planner.of_run(program, program.compile())["temporary_bytes"] > 0


# ---------------------------------------------------------------------------------------- scan and remat


@functools.cache
def gradients(**overrides: Any) -> tuple[float, dict[str, np.ndarray]]:
    """(loss, gradients) of a tiny Llama on one batch."""
    config = tiny("gpt", **LLAMA, **overrides)
    params, run = forward(config)
    batch = random_batch(config)

    @jax.jit
    def loss(params: Any) -> jax.Array:
        return jnp.square(run(params, batch)).mean()

    value, grads = jax.value_and_grad(loss)(params)
    return float(value), by_path(jax.device_get(grads))


@pytest.mark.parametrize(
    "keys", [{"model__scan": False}, {"remat": "full"}, {"remat": "minimal"}, {"remat": "dots"}], ids=str
)
def test_scan_and_remat_change_nothing(keys):
    value, grads = gradients(**keys)
    expected_value, expected = gradients()
    assert value == pytest.approx(expected_value, rel=1e-6)
    assert grads.keys() == expected.keys()
    for path, grad in grads.items():
        np.testing.assert_allclose(grad, expected[path], rtol=1e-4, atol=1e-7, err_msg=path)


def test_remat_policies_recompute_more_and_more():
    def step_flops(policy: str) -> float:
        program = build(tiny("gpt", remat=policy))
        return flops.count(program.train_step, program.state_spec, program.batch_spec)

    none, dots, minimal, qkv, everything, full = map(
        step_flops, ("none", "dots", "minimal", "offload-qkv", "offload-all", "full")
    )
    assert none == dots < minimal < everything < qkv < full  # offload-all leaves the MLP to be computed again
    model = flops.model_flops(build(tiny("gpt")))
    assert model <= none < 1.1 * model  # on a CPU, attention computes its weights again
    assert full < 4 / 3 * model  # a whole forward pass more, less the head


# -------------------------------------------------------------------------------------- who sees whom


def documents(config: Config, lengths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """One row: documents of these lengths, then padding."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((1, config.seq_len), np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    at = 0
    for number, length in enumerate(lengths, 1):
        where = slice(at, at + length)
        tokens[0, where] = rng.integers(0, config.model.vocab_size, length)
        segments[0, where], positions[0, where] = number, np.arange(length)
        at += length
    return {"tokens": tokens, "segments": segments, "positions": positions}


@STYLES
def test_a_document_sees_only_itself_and_its_past(style):
    config = tiny("gpt", batch_size=1, **style)
    params, run = forward(config)
    packed = documents(config, [6, 7])
    logits = np.asarray(run(params, packed))

    first = {name: value.copy() for name, value in packed.items()}
    first["tokens"][0, 2] += 1
    changed = np.asarray(run(params, first))
    np.testing.assert_array_equal(changed[0, :2], logits[0, :2])  # the past
    np.testing.assert_array_equal(changed[0, 6:13], logits[0, 6:13])  # the other document
    assert (changed[0, 2:6] != logits[0, 2:6]).any(-1).all()

    for start, length in ((0, 6), (6, 7)):
        alone = documents(config, [length])
        alone["tokens"][0, :length] = packed["tokens"][0, start : start + length]
        expected = run(params, alone)[0, :length]
        np.testing.assert_allclose(logits[0, start : start + length], expected, rtol=1e-5, atol=1e-6)


def heads(groups: int, length: int = 128, dim: int = 64, dtype: Any = np.float32) -> list[np.ndarray]:
    """q [2, L, 4, K], k and v [2, L, G, K], segments [2, L] of three documents."""
    rng = np.random.default_rng(groups)
    shapes = [(2, length, 4, dim)] + [(2, length, groups, dim)] * 2
    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1).astype(np.int32)
    return [*(rng.normal(size=shape).astype(dtype) for shape in shapes), segments]


def out_and_grads(function: Callable[..., jax.Array], *qkv: np.ndarray) -> list[np.ndarray]:
    """The output, and the gradients of a sum of its entries with fixed weights."""
    weights = np.random.default_rng(9).normal(size=qkv[0].shape).astype(np.float32)

    def weighted(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(*qkv)
        return (out * weights).sum(), out

    grads, out = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return [np.asarray(x) for x in (out, *grads)]


@pytest.mark.parametrize("size", [(4, 12), (12, 4)], ids=["wide", "tall"])
@pytest.mark.parametrize("rows", [(3,), (5, 6)], ids=["few", "many"])
def test_a_products_gradients_are_those_of_jax(rows, size):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(*rows, size[0])).astype(np.float32), rng.normal(size=size).astype(np.float32)
    weights = rng.normal(size=(*rows, size[1])).astype(np.float32)

    def grads(product: Callable[..., jax.Array]) -> list[np.ndarray]:
        return jax.jit(jax.grad(lambda x, w: (product(x, w) * weights).sum(), argnums=(0, 1)))(x, w)

    for a, b in zip(grads(products.dense), grads(jnp.matmul), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_plain_attention_is_that_of_jax(groups, causal):
    q, k, v, segments = heads(groups, length=32, dim=16)
    mask = attention.visible(jnp.asarray(segments), 32, 32, causal)
    ours = out_and_grads(lambda *qkv: attention.attend_xla(*qkv, mask), q, k, v)
    theirs = out_and_grads(lambda *qkv: jax.nn.dot_product_attention(*qkv, mask=mask), q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("groups", "causal", "window"), [(4, False, 0), (2, True, 0), (2, True, 7)])
def test_attention_in_blocks_is_plain_attention(groups, causal, window):
    q, k, v, segments = heads(groups, length=24, dim=8)
    mask = attention.visible(jnp.asarray(segments), 24, 24, causal, window=window)
    if window:
        seen = np.asarray(attention.visible(None, 24, 24, True, window=window))[0, 0]
        assert (seen.sum(1) == np.minimum(np.arange(24) + 1, window)).all()
    plain = out_and_grads(lambda *qkv: attention.attend_xla(*qkv, mask), q, k, v)
    blocks = out_and_grads(
        lambda *qkv: attend_blocks(*qkv, jnp.asarray(segments), causal, window, block=10),
        q,
        k,
        v,
    )
    for a, b in zip(blocks, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_attention_with_a_bias_over_a_memory():
    q, k, v, segments = heads(2, length=32, dim=16)
    rng = np.random.default_rng(1)
    bias = rng.normal(size=(4, 32, 24)).astype(np.float32)
    k, v, key_segments = k[:, :24], v[:, :24], rng.integers(1, 4, (2, 24))
    key_segments[:, :3] = 1, 2, 3  # each query sees something
    keys = {"causal": False, "key_segments_BS": jnp.asarray(key_segments), "bias_HLS": jnp.asarray(bias)}
    qkv = [jnp.asarray(x) for x in (q, k, v)]
    ours = attention.attend(*qkv, segments_BL=jnp.asarray(segments), scale=1.0, **keys)
    mask = (segments[:, :, None] == key_segments[:, None])[:, None]
    theirs = jax.nn.dot_product_attention(q, k, v, bias=bias[None], mask=mask, scale=1.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_grouped_queries_are_repeated_heads():
    q, k, v, segments = heads(2, length=32, dim=16)
    mask = attention.visible(jnp.asarray(segments), 32, 32, True)
    grouped = jax.jit(attention.attend_xla)(q, k, v, mask)
    repeated = jax.jit(attention.attend_xla)(q, np.repeat(k, 2, 2), np.repeat(v, 2, 2), mask)
    np.testing.assert_allclose(grouped, repeated, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("groups", "length", "dim", "causal"), [(4, 256, 64, True), (2, 128, 128, True), (4, 128, 64, False)]
)
def test_the_tpu_kernel_is_plain_attention(groups, length, dim, causal):
    q, k, v, segments = heads(groups, length, dim)
    mask = attention.visible(jnp.asarray(segments), length, length, causal)
    plain = out_and_grads(lambda *qkv: attention.attend_xla(*qkv, mask), q, k, v)
    kernel = out_and_grads(
        lambda *qkv: attention.attend_splash(*qkv, jnp.asarray(segments), causal, interpret=True), q, k, v
    )
    for a, b in zip(kernel, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_each_platform_gets_its_kernel():
    assert attention.pick(1024, 64, jnp.bfloat16, "tpu") == "splash"
    assert attention.pick(1000, 64, jnp.bfloat16, "tpu") == "xla"
    assert attention.pick(1024, 64, jnp.bfloat16, "gpu") == "cudnn"
    assert attention.pick(1024, 64, jnp.float32, "gpu") == "xla"
    assert attention.pick(1024, 64, jnp.bfloat16, "cpu") == "blocks"


def test_rope_depends_on_distances_only():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 8, 1, 16)).astype(np.float32)
    positions = np.arange(8, dtype=np.int32)[None]

    @jax.jit
    def scores(shift: int) -> jax.Array:
        a, b = (layers.rope(x, positions + shift, 10_000.0) for x in (q, k))
        return jnp.einsum("BLHK,BSHK->BLS", a, b)

    np.testing.assert_allclose(scores(0), scores(37), atol=1e-4)
    assert np.abs(np.asarray(scores(0)) - np.einsum("BLHK,BSHK->BLS", q, k)).max() > 0.1
    np.testing.assert_allclose(jnp.linalg.norm(layers.rope(q, positions, 1e4)), np.linalg.norm(q), rtol=1e-5)


# -------------------------------------------------------------------------------- dropout and precision


def test_every_dropout_has_its_own_key(monkeypatch):
    """Over layers, microbatches and steps; and evaluation has none."""
    seen: list[tuple[int, ...]] = []
    drop = layers.dropout

    def watched(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
        if key is not None:
            jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))
        return drop(x, rate, key)

    monkeypatch.setattr(layers, "dropout", watched)
    program = build(tiny("gpt", model__dropout=0.5, microbatches=2, optim__name="sgd", optim__lr=0.0))
    state = program.init(jax.random.key(0))
    batch = random_batch(program.config)
    same = [jax.device_get(program.eval_step(state, program.put(batch)))["loss"][0] for _ in range(2)]
    jax.effects_barrier()
    assert seen == []
    assert same[0] == same[1]
    _, rows = steps(program, state, 2, [batch])
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 2 * 2 * (1 + 2 * 2)  # steps, pieces, embedding and two a layer
    assert rows["loss"][0] != rows["loss"][1]  # the parameters did not move


def test_dropout_keeps_the_mean():
    x = jnp.full((400, 400), 2.0)
    out = np.asarray(layers.dropout(x, 0.25, jax.random.key(0)))
    assert out.mean() == pytest.approx(2.0, rel=0.01)
    assert (out == 0).mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("family", "style"),
    [("gpt", LLAMA), ("moe", {"model__experts_per_token": 4})],  # a choice of experts may turn on a rounding
    ids=["llama", "moe"],
)
def test_outputs_in_bfloat16_are_close_to_float32(family, style):
    config = tiny(family, **style)
    params, run = forward(config)
    _, half = forward(config.replace(compute_dtype="bfloat16"))
    batch = random_batch(config)
    exact, rounded = np.asarray(run(params, batch)), np.asarray(half(params, batch))
    assert rounded.dtype == jnp.bfloat16
    # Each rounding is 2^-9, and two layers make a few dozen in a row.
    error = rounded.astype(np.float32) - exact
    assert np.sqrt(np.square(error).mean()) < 0.02 * exact.std()
