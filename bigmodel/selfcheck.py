"""A run's check of its own gradient and outputs, on its own mesh and shapes, before it spends its budget.

A compiler can partition a program into another function without a word, and whether it does depends on the
mesh and on every shape. So a run measures what must hold whatever the model is: the loss changes along the
gradient as the gradient says, and an example's outputs and a batch's gradient do not depend on the order of
the rows.

Legend: B batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel import mesh as mesh_lib
from bigmodel import optim, trees
from bigmodel import program as program_lib
from bigmodel.config import Config
from bigmodel.program import Batch, Program, State


class WrongProgram(RuntimeError):
    """The compiled program computes another function than the model does. The run must not go on."""


class Tolerance(NamedTuple):
    """The largest relative differences that rounding explains, and by how much the loss is moved."""

    along: float
    gradient: float
    outputs: float
    moved: float


TOLERANCES = {
    "float32": Tolerance(along=0.02, gradient=1e-3, outputs=1e-3, moved=3e-3),
    "bfloat16": Tolerance(along=0.10, gradient=0.05, outputs=0.05, moved=0.03),
    "float16": Tolerance(along=0.10, gradient=0.05, outputs=0.05, moved=0.03),
}


@dataclass(frozen=True)
class Check:
    """Measured relative differences; None: not measured, for the reason in `left_out`."""

    along: float | None  # between the loss's change along the gradient and what the gradient says it is
    gradient: float | None  # between a batch's gradient and that of the batch in another row order
    outputs: float | None  # between an example's outputs in two row orders
    left_out: str = ""
    loss: float | None = None  # of the batch, and its gradient's norm, as the checked program has them
    norm: float | None = None

    def problems(self, tolerance: Tolerance) -> list[str]:
        """Differences beyond rounding, one phrase each."""
        said = {
            "along": "the loss changes along the gradient by {:.1%} less or more than the gradient says",
            "gradient": "the gradient of the same rows in another order differs by {:.1%}",
            "outputs": "rows have other outputs in another order, by {:.1%}",
        }
        values = {name: getattr(self, name) for name in said}
        return [
            text.format(values[name])
            for name, text in said.items()
            if values[name] is not None and not values[name] <= getattr(tolerance, name)
        ]

    def line(self) -> str:
        """For the log: "gradient checked on this mesh: 0.2 % off along itself; ..."."""
        parts = []
        if self.along is not None:
            parts.append(f"{self.along:.2%} off along itself")
        if self.gradient is not None:
            parts.append(f"{self.gradient:.1e} off in another row order")
        if self.outputs is not None:
            parts.append(f"outputs {self.outputs:.1e}")
        text = f"gradient checked on this mesh: {', '.join(parts)}"
        return f"{text} ({self.left_out})" if self.left_out else text


def is_due(config: Config, mesh: jax.sharding.Mesh) -> bool:
    """True if a run on this mesh checks itself: by `check.gradient`, whose default is to check where two or
    more axes of the mesh are above 1."""
    if config.check.gradient == "auto":
        return sum(size > 1 for size in mesh.shape.values()) > 1
    return config.check.gradient == "always"


def check(program: Program, state: State, rows: Mapping[str, np.ndarray]) -> Check:
    """Measures the Program on one training batch.

    Costs the compilation of a gradient and of two forward passes, and one run of each or a few; the state
    stays as it is.

    Args:
        rows: this host's rows of a batch, as the pipeline gives them.
    """
    config = program.config
    left_out = []
    batch, other = program.put(rows), program.put(reordered(program, rows))
    gradient_of = _on(program, _gradient(program))
    loss, grads = jax.block_until_ready(gradient_of(state, batch))  # XLA:CPU runs one program at a time
    norm = float(optim.norm(grads))
    along = None
    if program.task.several_passes or (config.quantize.weights != "none" and config.quantize.aware):
        left_out.append("not along itself: it is not the slope of the loss alone")
    elif norm == 0 or not math.isfinite(norm) or not math.isfinite(float(loss)):
        left_out.append(f"not along itself: the loss is {float(loss):.3g}, the gradient norm {norm:.3g}")
    else:
        along = _along(program, state, batch, grads, float(loss), norm)
    shift = None
    if config.model.dropout > 0:
        left_out.append("its row order not: dropout depends on it")
    elif math.isfinite(norm):
        _, again = jax.block_until_ready(gradient_of(state, other))
        shift = float(_difference(grads, again)) / max(norm, 1e-30)
    outputs = rows_differ(_on(program, _digests(program)), state, rows, batch, other, program)
    return Check(along, shift, outputs, "; ".join(left_out), float(loss), norm)


def check_outputs(program: Program, state: State) -> None:
    """Raises WrongProgram where a loaded model gives rows other outputs in another order of the rows.

    Its rows are made up: integers that every input takes, and random floats.
    """
    if not is_due(program.config, program.mesh):
        return
    rng = np.random.default_rng(0)
    hosts = mesh_lib.host_rows(program.mesh, program.config.batch_size)["process_count"]

    def made_up(s: jax.ShapeDtypeStruct) -> np.ndarray:
        shape = (s.shape[0] // hosts, *s.shape[1:])
        is_integer = np.issubdtype(s.dtype, np.integer)
        return (rng.integers(0, 2, shape) if is_integer else rng.normal(size=shape)).astype(s.dtype)

    rows = {name: made_up(s) for name, s in program.batch_spec.items()}
    batch, other = program.put(rows), program.put(reordered(program, rows))
    outputs = rows_differ(_on(program, _digests(program)), state, rows, batch, other, program)
    refuse_wrong(Check(None, None, outputs), program.config)


def refuse_wrong(found: Check, config: Config) -> None:
    """Raises WrongProgram where a difference is more than rounding."""
    if problems := found.problems(TOLERANCES[config.compute_dtype]):
        raise WrongProgram(
            f"the program compiled for this mesh is wrong: {'; '.join(problems)}; choose other mesh sizes or "
            "another batch_size, and report it; config.check.gradient=never goes on all the same"
        )


def refuse_other_step(found: Check, step: Mapping[str, float], config: Config) -> None:
    """Raises WrongProgram where the train step, on the batch that was checked, has another loss or gradient
    norm than the checked program: it is compiled on its own."""
    limit = TOLERANCES[config.compute_dtype].gradient
    for name, checked, trained in (
        ("loss", found.loss, step["loss"]),
        ("norm", found.norm, step["grad_norm"]),
    ):
        if checked is None or not (math.isfinite(checked) or math.isfinite(trained)):
            continue  # float16 may overflow at first, alike in both
        if not abs(trained - checked) <= limit * max(abs(checked), 1e-6):
            raise WrongProgram(
                f"the train step compiled for this mesh has a {name} of {trained:.6g} where the checked "
                f"program has {checked:.6g}; report it; config.check.gradient=never goes on all the same"
            )


def reordered(program: Program, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows in another order, each in the microbatch that it was in."""
    order = _order(program, len(next(iter(rows.values()))))
    return {name: x[order] for name, x in rows.items()}


def rows_differ(
    digest: Callable[[State, Batch], Any],
    state: State,
    rows: Mapping[str, np.ndarray],
    batch: Batch,
    other: Batch,
    program: Program,
) -> float:
    """The largest difference between an example's digest in `batch` and in `other`, relative to the largest
    digest; `other` is `batch` as `reordered` orders this host's rows."""
    first, second = (jax.block_until_ready(digest(state, each)) for each in (batch, other))
    return float(np.max([0.0, *(_shift(a, b, program, rows) for a, b in zip(first, second, strict=True))]))


def _order(program: Program, count: int) -> np.ndarray:
    pieces = program.pieces
    order = np.random.default_rng(0).permutation(count // pieces)
    return (order[:, None] * pieces + np.arange(pieces)).reshape(-1)


def _shift(a: jax.Array, b: jax.Array, program: Program, rows: Mapping[str, np.ndarray]) -> float:
    """Both [B, ...] on every device; b's rows are a's in each host's order."""
    count = len(next(iter(rows.values())))
    hosts = program.config.batch_size // count
    order = np.concatenate([_order(program, count) + host * count for host in range(hosts)])
    first, second = np.asarray(a, np.float64)[order], np.asarray(b, np.float64)
    if (np.isnan(first) != np.isnan(second)).any():
        return math.nan
    off, largest = np.nan_to_num(np.abs(first - second)), np.nan_to_num(np.abs(first))
    return float(off.max(initial=0) / max(largest.max(initial=0), 1e-30))


def _on(program: Program, function: Callable[..., Any], **options: Any) -> Any:
    return jax.jit(program.on_mesh(function), **options)


def _gradient(program: Program) -> Callable[[State, Batch], tuple[jax.Array, Any]]:
    """(state, batch) -> (the mean loss, its gradient), as the train step computes them."""

    def gradient(state: State, batch: Batch) -> tuple[jax.Array, Any]:
        grads, _, terms = program_lib.gradients(program, state, batch)
        loss, weight = terms["loss"]
        return loss / jnp.maximum(weight, 1e-9), _pinned(program, grads)

    return gradient


def _pinned(program: Program, grads: Any) -> Any:
    """Gradients, laid out as their parameters are, as the optimizer of the train step finds them."""

    def leaf(path: Any, g: jax.Array) -> jax.Array:
        where = mesh_lib.param_sharding(program.mesh, program.model.rules, trees.path_str(path), g.shape)
        return jax.lax.with_sharding_constraint(g, where.spec)

    return jax.tree_util.tree_map_with_path(leaf, grads)


def _along(program: Program, state: State, batch: Batch, grads: Any, loss: float, norm: float) -> float:
    """The relative difference between a change of the loss along the gradient, by two forward passes, and the
    gradient's inner product with the way; the least of three ways' lengths, as curvature and rounding differ.
    """
    forward = _on(program, _moved(program))
    least = math.inf
    for factor in (1.0, 0.25, 4.0):
        length = (
            factor * TOLERANCES[program.config.compute_dtype].moved * max(abs(loss), 1e-6) / (2 * norm**2)
        )
        ends = [jax.device_get(forward(state, grads, np.float32(sign * length), batch)) for sign in (1, -1)]
        (high, said_high), (low, said_low) = ((float(x), float(y)) for x, y in ends)
        if said_high != said_low:
            off = abs((high - low) / (said_high - said_low) - 1)
            least = min(least, off) if math.isfinite(off) else least
        if least <= TOLERANCES[program.config.compute_dtype].along / 4:
            break
    return least


def _moved(program: Program) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(state, grads, length, batch) -> the mean loss after a step of `length` times the gradient, and the
    gradient's inner product with what that changed, rounding included."""

    def moved(state: State, grads: Any, length: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        trained, frozen = optim.split(program.config, state["params"])
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (trained, grads))
        there = jax.tree.map(lambda p, w, g: (w + length * g).astype(p.dtype), trained, *wide)
        said = jax.tree.map(lambda q, w, g: ((q.astype(jnp.float32) - w) * g).sum(), there, *wide)
        loss = program_lib.objective(program.model, program.task, None, batch, frozen)
        if program.pieces == 1:
            value, _ = loss(there, state["rest"], batch, program_lib.step_key(state))
            return value, sum(jax.tree.leaves(said), jnp.float32(0))

        def body(carry: tuple[jax.Array, Any], x: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            value, (rest, _) = loss(there, carry[1], *x)
            return (carry[0] + value, rest), None

        start = (jnp.float32(0), state["rest"])
        (value, _), _ = jax.lax.scan(body, start, program_lib.cut(state, batch, program.pieces))
        return value, sum(jax.tree.leaves(said), jnp.float32(0))

    return moved


def _digests(program: Program) -> Callable[[State, Batch], list[jax.Array]]:
    """(state, batch) -> float32 [B] of each output of evaluation: a sum of its numbers with signs that differ
    from place to place, so that no other row's numbers give the same."""

    def digests(state: State, batch: Batch) -> list[jax.Array]:
        params = program.evaluated(state)
        outputs, _ = program.model.apply(params, state["rest"], batch, key=None, train=False)
        return [
            jax.lax.with_sharding_constraint(digest(x), jax.sharding.PartitionSpec())
            for x in jax.tree.leaves(outputs)
            if x.ndim and x.shape[0] == program.config.batch_size
        ]

    return digests


def digest(x: jax.Array) -> jax.Array:
    """x [B, ...] -> float32 [B]."""
    weight = jnp.ones((), jnp.float32)
    for axis in range(1, x.ndim):
        at = jax.lax.broadcasted_iota(jnp.float32, x.shape, axis)
        weight = weight * jnp.cos(at * (axis + 0.7) + 0.3)
    wide = x.astype(jnp.float32)
    wide = jnp.where(jnp.abs(wide) >= 1e30, 0, wide)  # what is masked with the lowest number; not NaN
    return (wide * weight).reshape(x.shape[0], -1).sum(1)


_difference = jax.jit(
    lambda a, b: jnp.sqrt(
        sum(
            (
                jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)).sum()
                for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
            ),
            jnp.float32(0),
        )
    )
)
