"""FLOPs counted on the jaxpr, where loops have lengths; XLA's own total counts a scan's body once.

Only matrix products and convolutions count, a multiply and an add as two, as everyone does for MFU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from bigmodel import mesh, optim
from bigmodel.config import Config
from bigmodel.models.attention import SEES
from bigmodel.models.module import Definition
from bigmodel.program import Program, Step, define, gradients


def count(function: Callable[..., Any], *specs: Any) -> float:
    """FLOPs of one call of `function` on arguments of these shapes, recomputation (remat) included."""
    return _jaxpr_flops(jax.make_jaxpr(function)(*specs).jaxpr)


def forward_flops(program: Program) -> float:
    """FLOPs of evaluation's forward pass over one global batch, attention counted in full (causal would halve
    it, a window is counted as a window)."""
    return _forward(program, program.model, program.state_spec["params"], program.state_spec["rest"])


def teacher_flops(program: Program) -> float:
    """FLOPs of the other models that training runs forward, over one global batch."""
    rest = program.state_spec["rest"]
    return sum(_forward(program, model, **rest[part]) for part, model in program.model.frozen.items())


def _forward(program: Program, model: Definition, params: Any, rest: Any) -> float:
    shapes, batch = _shapes((params, rest)), _shapes(program.batch_spec)

    def forward(params: Any, rest: Any, batch: Any) -> Any:
        with mesh.plain():  # kernels hide their FLOPs; the plain form shows them
            return model.apply(params, rest, batch, key=None, train=False)[0]

    return count(forward, *shapes, batch)


def model_flops(program: Program) -> float:
    """FLOPs that training on one global batch needs: the loss, forward, and twice that backward (PaLM,
    appendix B).

    The training pass is counted: a classifier's auxiliary heads, scores of every pair in a batch, a teacher.
    What is recomputed (remat) does not count, so that MFU measures useful work. Where a step passes through
    its networks several times (a GAN's), parameters or codes are frozen, or a teacher's hidden states or
    attention are compared with the model's own, the gradient itself is counted.
    """
    config = program.config
    frozen = optim.split(config, program.state_spec["params"])[1]
    codes = set(program.model.storage.parts) - program.model.frozen.keys()
    compared = config.distill.hidden or config.distill.attention
    if frozen or codes or compared or program.task.several_passes:
        return gradient_flops(program)
    teacher = teacher_flops(program)
    return 3 * (loss_flops(program) - teacher) + teacher


def loss_flops(program: Program) -> float:
    """FLOPs of training's forward pass to its loss, over one global batch; a teacher's included."""
    task, key = program.task, jax.random.key(0)
    pieces, batch = _piece(program)

    def loss(params: Any, rest: Any, batch: Any) -> Any:
        with mesh.plain():
            outputs, _ = program.model.apply(params, rest, batch, key=key, train=True)
            return task.terms(outputs, batch, True)["loss"][0]

    state = program.state_spec
    traced = jax.make_jaxpr(loss)(*_shapes((state["params"], state["rest"])), batch)
    return pieces * _needed_flops(traced.jaxpr)


def gradient_flops(program: Program) -> float:
    """FLOPs of the loss and its gradient over one global batch, nothing computed again (remat)."""
    config, (pieces, batch_spec) = program.config.replace(remat="none"), _piece(program)
    step = Step(config, define(config, batch_spec), program.task, pieces=1)

    def gradient(state: Any, batch: Any) -> Any:
        with mesh.plain():
            return gradients(step, state, batch)[0]

    return pieces * _needed_flops(jax.make_jaxpr(gradient)(_shapes(program.state_spec), batch_spec).jaxpr)


def _piece(program: Program) -> tuple[int, Any]:
    """-> (how many microbatches, the specs of one): in pieces a loss over a batch's pairs has fewer."""
    pieces = program.pieces
    return pieces, {
        name: jax.ShapeDtypeStruct((s.shape[0] // pieces, *s.shape[1:]), s.dtype)
        for name, s in program.batch_spec.items()
    }


def _shapes(spec: Any) -> Any:
    """The specs without their shardings."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), spec)


def by_formula(config: Config) -> float | None:
    """Training FLOPs a token by the family's formula; None: it has none for this task, or some parameters are
    frozen."""
    frozen = config.optim.freeze or config.lora.rank
    known = not frozen and config.task.predicts_tokens
    return config.model.flops_per_token(config.seq_len) if known else None


def masked_per_token(config: Config) -> float:
    """The part of `by_formula` that a causal mask takes away: half of attention; of a window what the first
    tokens lack."""
    sees = min(config.model.window or config.seq_len, config.seq_len)
    return config.model.attention_flops(config.seq_len) * sees / (2 * config.seq_len)


def _jaxpr_flops(jaxpr: Any, windowed: bool = False) -> float:
    return sum(_equation_flops(equation, windowed) for equation in jaxpr.eqns)


def _needed_flops(jaxpr: Any) -> float:
    """FLOPs that the outputs need, in loops too: no compiler keeps computations without a use."""
    return _jaxpr_flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _equation_flops(equation: Any, windowed: bool = False) -> float:
    """FLOPs of one call; of attention with a window, only those of its keys (`windowed`: counted already)."""
    window = None if windowed else SEES.search(str(equation.source_info.name_stack))
    if window:
        return _equation_flops(equation, True) * int(window.group(1)) / int(window.group(2))
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        inputs = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(inputs[i] for i in contracting)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        # Of an input that is spread out by zeros (the gradient of strides), only what is no zero counts.
        spread = math.prod(params["lhs_dilation"])
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / out_features / spread
    inner = [_jaxpr_flops(sub, windowed) for sub in _subjaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner, default=0)
    if name == "while" and sum(inner):
        raise ValueError("a while loop with matrix products has no known length; write it as a scan")
    if name == "shard_map":
        return params["mesh"].size * sum(inner)
    if name == "pallas_call":
        raise ValueError("a Pallas kernel hides its FLOPs; count the plain form")
    return sum(inner)


def _subjaxprs(params: dict[str, Any]) -> list[Any]:
    """Jaxprs among an equation's parameters (of custom rules, only the function itself)."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
