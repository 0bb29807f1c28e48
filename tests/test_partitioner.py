"""XLA's partitioner computes another function where layouts are left to it: the smallest case, for upstream.

Two dense layers of plain JAX. The batch lies over ("data", "fsdp"), each kernel over ("fsdp", "tensor"). With
data > 1 and fsdp = tensor > 1, and rows between the hidden width and data times it, the gradient is wrong by
its own size, with Shardy and with GSPMD, in jax 0.10.2 to 0.12.0.1. It is right where each kernel is gathered
over fsdp before its product, which is what `bigmodel.models.products.dense` states.

The wrong program exchanges tiles of an activation between devices, and not back. Compiled programs show that
one exchange on a CPU and on an H100, and not on a TPU v5e.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bigmodel.plan import target

INPUTS, CLASSES = 64, 16
SHAPES = {"x": ("rows", INPUTS), "y": ("rows", CLASSES), "w1": (INPUTS, "hidden"), "w2": ("hidden", CLASSES)}


def gradient(devices: Any, rows: int, hidden: int, gather: bool) -> tuple[Any, dict[str, Any]]:
    """The jitted gradient of relu(x w1) w2, cross-entropy, on 2 x 2 x 2 devices, and its arguments' specs."""
    mesh = Mesh(
        np.array(devices).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )

    def loss(params, x, y):
        def used(w):
            whole = NamedSharding(mesh, PartitionSpec(None, "tensor"))
            return jax.lax.with_sharding_constraint(w, whole) if gather else w

        logits = jax.nn.relu(x @ used(params["w1"])) @ used(params["w2"])
        return -(jax.nn.log_softmax(logits) * y).sum() / rows

    kernel, batch = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp", "tensor"), (("data", "fsdp"),))
    )
    sizes = {"rows": rows, "hidden": hidden}
    specs = {
        name: jax.ShapeDtypeStruct(
            tuple(sizes.get(n, n) for n in shape), np.float32, sharding=batch if name in "xy" else kernel
        )
        for name, shape in SHAPES.items()
    }
    stored = {"w1": kernel, "w2": kernel}
    return jax.jit(jax.grad(loss), in_shardings=(stored, batch, batch), out_shardings=stored), specs


def error(rows: int, hidden: int, gather: bool) -> float:
    """The gradient's relative error on 8 CPU devices, beside float64 numpy."""
    function, specs = gradient(jax.devices()[:8], rows, hidden, gather)
    rng = np.random.default_rng(0)
    x, w1, w2 = (rng.normal(size=specs[name].shape) for name in ("x", "w1", "w2"))
    w1, w2 = w1 * INPUTS**-0.5, w2 * hidden**-0.5
    y = np.eye(CLASSES)[rng.integers(0, CLASSES, rows)]
    h = np.maximum(x @ w1, 0)
    p = np.exp(h @ w2)
    g = (p / p.sum(1, keepdims=True) - y) / rows
    expected = {"w1": x.T @ ((g @ w2.T) * (h > 0)), "w2": h.T @ g}
    narrow = [a.astype(np.float32) for a in (w1, w2, x, y)]
    found = function({"w1": narrow[0], "w2": narrow[1]}, *narrow[2:])
    return max(float(jnp.linalg.norm(found[k] - expected[k]) / np.linalg.norm(expected[k])) for k in expected)


def exchanges(devices: Any, gather: bool) -> int:
    """Counts the compiled program's collective-permutes."""
    function, specs = gradient(devices, 64, 64, gather)
    text = function.lower({k: specs[k] for k in ("w1", "w2")}, specs["x"], specs["y"]).compile().as_text()
    return text.count("collective-permute(") + text.count("collective-permute-start(")


@pytest.mark.parametrize(("rows", "hidden"), [(32, 32), (64, 32), (64, 64), (128, 64)])
def test_a_gathered_kernel_gives_the_right_gradient(rows, hidden):
    assert error(rows, hidden, gather=True) < 1e-5


@pytest.mark.xfail(strict=True, reason="XLA's partitioner; when it passes, a new JAX no longer has the fault")
def test_the_partitioner_is_right_by_itself():
    assert error(64, 64, gather=False) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "plugin", "count"),
    [("", "jax", 1), ("v5e:2x4", "libtpu", 0), ("h100:1x8", "jax_plugins.xla_cuda13", 1)],
    ids=["cpu", "v5e", "h100"],
)
def test_which_compilers_exchange_tiles(spec, plugin, count):
    """Where the count of 1 falls to 0, a new JAX no longer has the fault there."""
    pytest.importorskip(plugin)
    devices = target.make(spec).devices if spec else jax.devices()[:8]
    assert exchanges(devices, gather=False) == count
    assert exchanges(devices, gather=True) == 0
