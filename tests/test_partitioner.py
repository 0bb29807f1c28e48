"""XLA's partitioner computes another function where layouts are left to it: the smallest case, for upstream.

Two dense layers of plain JAX. The batch lies over ("data", "fsdp"), each kernel over ("fsdp", "tensor"). With
data > 1 and fsdp = tensor > 1, and rows between the hidden width and data times it, the gradient is wrong by
its own size, with Shardy and with GSPMD, in jax 0.10.2 to 0.12.0.1. It is right where each kernel is gathered
over fsdp before its product, which is what `bigmodel.models.products.dense` states.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

INPUTS, CLASSES = 64, 16


def gradient_error(rows: int, hidden: int, gather: bool) -> float:
    """Relative error of the gradient of relu(x w1) w2, cross-entropy, on 2 x 2 x 2 devices."""
    devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, INPUTS)).astype(np.float32)
    y = np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, rows)]
    shapes = {"w1": (INPUTS, hidden), "w2": (hidden, CLASSES)}
    params = {k: (rng.normal(size=s) * s[0] ** -0.5).astype(np.float32) for k, s in shapes.items()}

    def loss(params, x, y, gather):
        def used(w):
            whole = NamedSharding(mesh, PartitionSpec(None, "tensor"))
            return jax.lax.with_sharding_constraint(w, whole) if gather else w

        logits = jax.nn.relu(x @ used(params["w1"])) @ used(params["w2"])
        return -(jax.nn.log_softmax(logits) * y).sum() / rows

    stored = {k: NamedSharding(mesh, PartitionSpec("fsdp", "tensor")) for k in params}
    batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    grad = jax.grad(loss)
    expected = jax.jit(lambda *args: grad(*args, False))(params, x, y)
    found = jax.jit(
        lambda *args: grad(*args, gather), in_shardings=(stored, batch, batch), out_shardings=stored
    )(params, x, y)
    return max(float(jnp.linalg.norm(found[k] - expected[k]) / jnp.linalg.norm(expected[k])) for k in params)


@pytest.mark.parametrize(("rows", "hidden"), [(32, 32), (64, 32), (64, 64), (128, 64)])
def test_a_gathered_kernel_gives_the_right_gradient(rows, hidden):
    assert gradient_error(rows, hidden, gather=True) < 1e-5


@pytest.mark.xfail(
    strict=True, reason="XLA's partitioner; when this passes, a new JAX no longer has the fault"
)
def test_the_partitioner_is_right_by_itself():
    assert gradient_error(64, 64, gather=False) < 1e-5
