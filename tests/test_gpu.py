"""On an NVIDIA GPU: what a CPU computes, cuDNN's attention, and the planned memory. See CONTRIBUTING.md."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import batch_spec, by_path, random_batch, start, steps, tiny
from test_models import heads, out_and_grads

from bigmodel import mesh, program
from bigmodel.config import Config
from bigmodel.models import attention
from bigmodel.plan import planner
from bigmodel.program import Program

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> jax.Device:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("JAX has no GPU here; on a machine with one: JAX_PLATFORMS=cuda,cpu pytest -m gpu")


def build_on(device: jax.Device, config: Config) -> Program:
    return program.build(config, mesh.make_mesh(config, [device]), batch_spec(config))


@pytest.mark.parametrize("family", ["gpt", "cnn"])
def test_a_gpu_steps_as_a_cpu_does(gpu, family):
    config = tiny(family, optim__name="sgd", optim__lr=0.1, optim__schedule="constant")
    there, here = build_on(gpu, config), build_on(jax.devices("cpu")[0], config)
    state = jax.device_get(start(there))
    ends = []
    with jax.default_matmul_precision("float32"):  # not TF32, which rounds to 10 bits
        for part in (there, here):
            placed = jax.device_put(state, jax.tree.map(lambda s: s.sharding, part.state_spec))
            end, rows = steps(part, placed, 1)
            ends.append((jax.device_get(end["params"]), rows))
    (params, rows), (expected, expected_rows) = ends
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(rows[name], expected_rows[name], rtol=1e-4, err_msg=name)
    before = by_path(state["params"])
    for path, value in by_path(expected).items():
        np.testing.assert_allclose(by_path(params)[path], value, rtol=0, atol=1e-5, err_msg=path)
        assert np.any(value != before[path]), path


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2])
def test_the_gpu_kernel_is_plain_attention(gpu, groups, causal):
    *qkv, segments = heads(groups, length=128, dim=64, dtype=jnp.bfloat16)
    segments = jnp.asarray(segments)
    mask = attention.visible(segments, 128, 128, causal)
    assert attention.pick(128, 64, jnp.bfloat16, mesh.platform()) == "cudnn"

    def kernel(*qkv: jax.Array) -> jax.Array:
        return attention.attend(*qkv, segments_BL=segments, causal=causal).astype(jnp.float32)

    def plain(*qkv: jax.Array) -> jax.Array:
        return attention.attend_xla(*(x.astype(jnp.float32) for x in qkv), mask)

    for ours, exact in zip(out_and_grads(kernel, *qkv), out_and_grads(plain, *qkv), strict=True):
        ours, exact = ours.astype(np.float32), exact.astype(np.float32)
        # Scores, weights and results are each rounded to 8 bits, by 0.2 % on average.
        assert np.linalg.norm(ours - exact) < 0.02 * np.linalg.norm(exact)


def test_planned_peak_is_what_the_gpu_holds(gpu):
    config = tiny("gpt", model__width=256, model__vocab_size=1024, seq_len=512, batch_size=32)
    part = build_on(gpu, config)
    compiled = part.compile()
    planned = planner.of_run(part, compiled)["peak_bytes"]
    before = gpu.memory_stats()
    assert before["peak_bytes_in_use"] < planned, "the peak of something before hides this one"
    state, batch = part.init(jax.random.key(0)), part.put(random_batch(config))
    for _ in range(2):
        state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    measured = gpu.memory_stats()["peak_bytes_in_use"] - before["bytes_in_use"]
    assert measured == pytest.approx(planned, rel=0.2)
