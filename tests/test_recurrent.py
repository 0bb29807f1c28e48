"""LSTM and GRU: PyTorch's values and gradients, documents apart, one device == eight, resume, learning."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ROOT,
    batch_spec,
    built,
    random_batch,
    tiny,
)  # fmt: skip

from bigmodel import config as config_lib
from bigmodel import models
from bigmodel.models import recurrent
from bigmodel.plan import estimate, flops

SGD = {"optim__name": "sgd", "optim__lr": 0.1, "optim__weight_decay": 0.01, "optim__schedule": "constant"}
CELLS = ["lstm", "gru"]


def define(config: config_lib.Config) -> tuple[Any, Any]:
    model = models.define(config, batch_spec(config))
    run = jax.jit(lambda params, batch: model.apply(params, {}, batch, key=None, train=False)[0]["logits"])
    return jax.jit(model.init)(jax.random.key(0))[0], run


@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients_are_those_of_reverse_mode(cell):
    """The loop's own backward pass against JAX's through a plain Python loop."""
    rng = np.random.default_rng(0)
    step, gates, arrays = recurrent.CELLS[cell]
    sums = jnp.asarray(rng.normal(size=(5, 3, gates, 4)), jnp.float32)
    apart = jnp.asarray(rng.normal(size=(5, 3, 4)), jnp.float32) if cell == "gru" else None
    keep = jnp.asarray(rng.random((5, 3)) < 0.7, jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(4, gates, 4)), jnp.float32)

    def plain(sums: Any, apart: Any, kernel: Any) -> Any:
        state, out = (jnp.zeros((3, 4)),) * arrays, []
        for t in range(5):
            state = tuple(part * keep[t][:, None] for part in state)
            u = sums[t] + jnp.einsum("bh,hgk->bgk", state[0], kernel)
            state = step(state, u, None if apart is None else apart[t])
            out.append(state[0])
        return jnp.sin(jnp.stack(out)).sum()

    def ours(sums: Any, apart: Any, kernel: Any) -> Any:
        return jnp.sin(recurrent.unroll(step, arrays, sums, apart, keep, kernel)).sum()

    at = (0, 2) if apart is None else (0, 1, 2)
    a, b = (jax.jit(jax.value_and_grad(f, at))(sums, apart, kernel) for f in (plain, ours))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_pytorch_computes_the_same(cell):
    torch = pytest.importorskip("torch")
    config = tiny("rnn", model__cell=cell)
    params, _ = define(config)
    layer = jax.tree.map(np.asarray, params["layers"][0])
    theirs = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](32, 32, batch_first=True)
    with torch.no_grad():
        for name, part in (("ih", "inputs"), ("hh", "state")):
            kernel = layer[part]["kernel"].reshape(32, -1)
            getattr(theirs, f"weight_{name}_l0").copy_(torch.from_numpy(kernel.T.copy()))
            bias = layer[part]["bias"].reshape(-1) if "bias" in layer[part] else np.zeros(len(kernel.T), "f4")
            getattr(theirs, f"bias_{name}_l0").copy_(torch.from_numpy(bias.copy()))
    x = np.random.default_rng(0).normal(size=(3, 7, 32)).astype(np.float32)
    x_torch = torch.from_numpy(x).requires_grad_()
    y_torch = theirs(x_torch)[0]
    torch.sin(y_torch).sum().backward()
    from flax import nnx

    module = recurrent.Layer(config.model, 32, dtype="float32", rngs=nnx.Rngs(0))
    nnx.update(module, layer)

    def ours(x: Any) -> Any:
        y = module(x, jnp.ones((3, 7)))
        return jnp.sin(y).sum(), y

    grad, y = jax.grad(ours, has_aux=True)(jnp.asarray(x))
    np.testing.assert_allclose(y, y_torch.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(grad, x_torch.grad.numpy(), atol=5e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_documents_do_not_see_each_other_nor_the_future(cell):
    config = tiny("rnn", model__cell=cell)
    batch = random_batch(config)
    params, run = define(config)
    before = np.asarray(run(params, batch))
    at = int(np.flatnonzero(batch["segments"][0] == 1)[-1])
    for place, seen in ((0, batch["segments"][0] == 1), (at + 1, batch["segments"][0] == 2)):
        tokens = batch["tokens"].copy()
        tokens[0, place] = (tokens[0, place] + 1) % 40
        changed = (np.asarray(run(params, {**batch, "tokens": tokens})) != before).any(-1)
        real = batch["segments"][0] > 0
        np.testing.assert_array_equal(changed[0][real], (seen & (np.arange(16) >= place))[real])
        assert not changed[1:].any()


def test_flops_on_the_jaxpr_are_the_formula():
    for keys in ({}, {"model__cell": "gru", "model__tie_embeddings": True, "model__embed_width": 16}):
        part = built("rnn", **SGD, **keys)
        tokens = part.config.batch_size * part.config.seq_len
        assert flops.model_flops(part) == part.config.model.flops_per_token(16) * tokens


def test_a_published_parameter_count():
    """Zaremba et al. 2014's large LSTM: two layers of 1500, 10,000 words, "66M parameters" (section 4.1)."""
    keys = {"model.depth": 2, "model.width": 1500, "model.vocab_size": 10_000}
    config = config_lib.load(f"{ROOT}/configs/rnn.py", keys)
    count = estimate.parameters(models.define(config, batch_spec(config)).params_spec)
    gates = 2 * (4 * 1500 * (1500 + 1500) + 4 * 1500)
    assert count == gates + 10_000 * 1500 + (1500 * 10_000 + 10_000)
    assert count == pytest.approx(66e6, rel=0.01)
