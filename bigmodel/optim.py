"""Optimizers as optax chains, schedules, masks by path regex, and loss scaling for float16."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bigmodel import trees
from bigmodel.config import OTHERS, Config, InputError, Optim

Tree = Any


def make(config: Config) -> optax.GradientTransformation:
    """Returns the optimizer of all parameters, or one for each of `optim.groups` and one for the others.

    Its `init` raises InputError for a group without parameters, or a parameter of two groups.
    """
    tx = _chain(config)
    if config.optim.groups:
        groups = config.optim.every_group
        each = {name: _chain(config.replace(optim=group)) for name, group in groups.items()}
        patterns = {name: group.on for name, group in groups.items()}
        tx = optax.partition({OTHERS: tx, **each}, functools.partial(group_names, patterns))
    return optax.GradientTransformation(_standard_promotion(tx.init), _standard_promotion(tx.update))


def _chain(config: Config) -> optax.GradientTransformation:
    """Chains penalties, clipping, the optimizer, decoupled weight decay and the learning rate."""
    o = config.optim
    decay_mask = _mask(o.weight_decay_on)
    parts = [
        *([_penalty(o)] if o.l1 or o.l2 else []),
        *([optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm else []),
        _direction(o),
        # Before the decay, which stays as strong for all.
        *([_scaled(config.model.rate_scales)] if config.model.rate_scales else []),
        *([optax.add_decayed_weights(o.weight_decay, decay_mask)] if o.weight_decay else []),
    ]
    if o.every > 1:  # updates on the last of every `every` steps
        parts = [optax.conditionally_mask(optax.chain(*parts), lambda step: (step + 1) % o.every == 0)]
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule(config)))


def split(config: Config, params: Tree) -> tuple[Tree, Tree]:
    """Splits parameters into trained and frozen ones, each with the same nesting and without the others.

    With adapters (`lora.rank`), only they and what `lora.train` matches are trained.

    Raises:
        InputError: `optim.freeze` or `lora.train` finds no parameter, or nothing is left to train.
    """
    freeze, lora = config.optim.freeze, config.lora
    if not freeze and not lora.rank:
        return params, {}
    flat = {tuple(entry.key for entry in path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    names = {keys: "/" + "/".join(map(str, keys)) for keys in flat}
    for key, pattern in (("optim.freeze", freeze), ("lora.train", lora.train if lora.rank else "")):
        if pattern and not any(re.search(pattern, name) for name in names.values()):
            tops = ", ".join(f"/{key}/" for key in params)
            raise InputError(f"{key}={pattern!r} matches no parameter; paths begin with {tops}")
    parts: tuple[Tree, Tree] = ({}, {})
    for keys, name in names.items():
        frozen = bool(freeze and re.search(freeze, name))
        if lora.rank and not name.startswith("/lora/"):
            frozen |= not (lora.train and re.search(lora.train, name))
        inner = parts[frozen]
        for part in keys[:-1]:
            inner = inner.setdefault(part, {})
        inner[keys[-1]] = flat[keys]
    if not parts[0]:
        raise InputError(f"optim.freeze={freeze!r} matches every parameter; narrow it, or nothing is trained")
    return parts


def join(a: Tree, b: Tree) -> Tree:
    """Merges two nested dicts, the inverse of `split`; where both have a leaf, takes that of `a`."""
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return a
    return {**b, **{key: join(value, b[key]) if key in b else value for key, value in a.items()}}


def group_names(patterns: Mapping[str, str], params: Tree) -> Tree:
    """Returns a tree like `params` with the name of each parameter's group.

    Args:
        patterns: group -> regex on its parameters' "/path".

    Raises:
        InputError: a group without parameters, or a parameter of two groups.
    """
    found: set[str] = set()

    def name(path: Any, _: Any) -> str:
        where = "/" + trees.path_str(path)
        names = [name for name, pattern in patterns.items() if re.search(pattern, where)]
        if len(names) > 1:
            raise InputError(f"optim.groups: {where} is in {' and in '.join(names)}; narrow one's `on`")
        found.update(names)
        return names[0] if names else OTHERS

    names = jax.tree_util.tree_map_with_path(name, params)
    if empty := sorted(patterns.keys() - found):
        tops = ", ".join(f"/{key}/" for key in params)
        raise InputError(
            f"optim.groups.{empty[0]}.on={patterns[empty[0]]!r} matches no parameter; paths begin with {tops}"
        )
    return names


def _standard_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function of optax, which mixes dtypes (`decay ** count`), for strict dtype promotion."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return wrapped


norm = _standard_promotion(optax.tree.norm)  # the gradients' dtypes may differ


def schedule(config: Config) -> Callable[[jax.Array], jax.Array]:
    """Returns a function from step to learning rate: linear warm-up from 0, then a decay to lr * end_lr.

    `rsqrt` is lr * sqrt(warmup / step) (Vaswani et al. 2017, eq. 3); `wsd`, warmup-stable-decay, stays at lr
    and decays linearly over the last `decay_steps` (Hu et al. 2024).
    """
    o, steps = config.optim, config.steps
    warmup, end = o.warmup_steps, o.lr * o.end_lr
    left = max(steps - warmup, 1)
    if o.schedule == "wsd":
        decay = o.decay_steps or max(left // 10, 1)
        stable = max(left - decay, 0)
        main = optax.join_schedules(
            [optax.constant_schedule(o.lr), optax.linear_schedule(o.lr, end, decay)], [stable]
        )
    elif o.schedule == "rsqrt":
        knee = float(max(warmup, 1))

        def main(step: jax.Array) -> jax.Array:
            return o.lr * jnp.sqrt(knee / (knee + step))
    else:
        main = {
            "cosine": optax.cosine_decay_schedule(o.lr, left, o.end_lr),
            "linear": optax.linear_schedule(o.lr, end, left),
            "constant": optax.constant_schedule(o.lr),
        }[o.schedule]
    if warmup:
        # Starts one step past zero, so that the first update is not wasted.
        rise = optax.linear_schedule(o.lr / warmup, o.lr, max(warmup - 1, 1))
        main = optax.join_schedules([rise, main], [warmup])
    return _standard_promotion(main)


def learning_rates(config: Config, count: jax.Array) -> dict[str, jax.Array]:
    """Returns `lr`, and `lr_<group>` for each of `optim.groups`, after `count` updates."""
    rates = {"lr": schedule(config)(count)}
    for name, group in config.optim.every_group.items():
        rates[f"lr_{name}"] = schedule(config.replace(optim=group))(count)
    return rates


def updates(state: Tree) -> jax.Array:
    """Returns the number of updates that an optimizer's state counts, for schedules, bias corrections,
    `every` and pruning. Steps that float16's loss scale skips do not count."""

    def counts(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    found = [x.count for x in jax.tree.leaves(state, is_leaf=counts) if counts(x)]
    return found[0]  # all groups have the same


def _direction(o: Optim) -> optax.GradientTransformation:
    """Returns the optimizer without learning rate, decay or sign: maps gradients to directions."""
    if o.name in ("adamw", "adam"):
        return optax.scale_by_adam(o.b1, o.b2, o.eps, nesterov=o.nesterov)
    if o.name == "sgd":
        return optax.trace(o.b1, o.nesterov) if o.b1 else optax.identity()
    if o.name == "rmsprop":
        momentum = [optax.trace(o.b1, o.nesterov)] if o.b1 else []
        return optax.chain(optax.scale_by_rms(o.b2, o.eps, eps_in_sqrt=False), *momentum)  # as PyTorch's
    if o.name == "lion":
        return optax.scale_by_lion(o.b1, o.b2)
    if o.name == "adafactor":  # Shazeer and Stern 2018, algorithm 4
        return optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
        )
    # Muon (Jordan et al. 2024) for matrices, Adam with Nesterov's momentum for the rest; steps as large as
    # AdamW's (Liu et al. 2025).
    muon = optax.contrib.muon(
        1.0, beta=o.b1, eps=o.eps, adam_b1=o.b1, adam_b2=o.b2, consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )  # fmt: skip
    return optax.chain(muon, optax.scale(-1.0))


def _matrices(params: Tree) -> Tree:
    """Returns the axes of each matrix that Muon makes orthogonal: (contracted axes, output axes).

    These are kernels [..., inputs, outputs], possibly stacked; a convolution's window counts as inputs, a
    recurrent cell's gates as outputs; adapters are two matrices. Tables, the output layer and all that is no
    matrix have None, and so use Adam.
    """

    def numbers(path: Any, x: Any) -> optax.contrib.MuonDimensionNumbers | None:
        name = trees.path_str(path)
        if not re.search("/kernel(/[ab])?$", name) or name.removeprefix("lora/").startswith("head/"):
            return None
        if re.search(r"(^|/)layers/\d+/(inputs|state)/kernel$", name):  # [inputs, gates, width]
            return optax.contrib.MuonDimensionNumbers(x.ndim - 3, (x.ndim - 2, x.ndim - 1))
        window = (0, 1) if x.ndim == 4 and "/experts/" not in name else ()
        return optax.contrib.MuonDimensionNumbers((*window, x.ndim - 2), x.ndim - 1)

    return jax.tree_util.tree_map_with_path(numbers, params)


def _penalty(o: Optim) -> optax.GradientTransformation:
    """Adds the gradient of l1 * |p| + l2 * p^2 / 2, for the parameters that `penalty_on` matches."""

    def add(g: jax.Array, p: jax.Array) -> jax.Array:
        return g + (o.l1 * jnp.sign(p) + o.l2 * p).astype(g.dtype)

    penalize = optax.stateless(lambda updates, params: jax.tree.map(add, updates, params))
    return optax.masked(penalize, _mask(o.penalty_on))


def _scaled(scales: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the steps of parameters by the factor of the regex that finds them."""

    def scaled(path: Any, x: Any) -> Any:
        where = trees.path_str(path)
        factor = next((factor for pattern, factor in scales.items() if re.search(pattern, where)), 1.0)
        return x * jnp.asarray(factor, x.dtype) if factor != 1 else x

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def _mask(pattern: str) -> Any:
    """Returns a function that maps parameters to a tree of bool: true where the regex matches "/path"."""

    def mask(params: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: bool(re.search(pattern, "/" + trees.path_str(path))), params
        )

    return mask


# ------------------------------------------------------------------------------------ float16 scaling

LEAST_SCALE = 1.0  # if this overflows, no scale can help
GROWTH_STEPS = 2000  # steps without overflow before the scale doubles (Micikevicius et al. 2018, 3.2)


def loss_scale_init() -> dict[str, jax.Array]:
    return {"scale": jnp.float32(2.0**15), "good_steps": jnp.int32(0)}


def loss_scale_update(state: dict[str, jax.Array], finite: jax.Array) -> dict[str, jax.Array]:
    """Halves the scale after an overflow, doubles it after `GROWTH_STEPS` steps without one."""
    grow = state["good_steps"] + 1 >= GROWTH_STEPS
    grown = jnp.where(grow, jnp.minimum(state["scale"] * 2, 2.0**24), state["scale"])
    return {
        "scale": jnp.where(finite, grown, jnp.maximum(state["scale"] / 2, LEAST_SCALE)),
        "good_steps": jnp.where(finite & ~grow, state["good_steps"] + 1, 0),
    }
