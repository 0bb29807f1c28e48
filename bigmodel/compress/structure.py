"""Whole parts taken out: attention heads, hidden units, channels, layers. What is left is a smaller config.

A unit's importance is Molchanov et al. 2019, eq. 8: (sum over its weights of weight x gradient)^2, the loss
that goes with it to first order, averaged over batches. A layer's is the loss without it, measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel import families, mesh
from bigmodel.compress import observe, recipe, trained
from bigmodel.compress.trained import Trained
from bigmodel.config import Config, InputError
from bigmodel.families import RESNET_STAGES, VGG_STAGES

EVEN = 8  # widths above eight times this stay multiples of it, which matrix units like


@dataclass(frozen=True)
class Cut:
    """Where units lie in an array: `axis` (from the end) holds [..., units, `inner` entries of each]."""

    path: str
    axis: int
    inner: int = 1


@dataclass(frozen=True)
class Units:
    """Units that are alike, and every array that has a slice of each. `lead` leading dimensions (a stack's
    depth, experts) keep different ones, as many in each."""

    key: str  # of config.model
    index: int | None  # in the key's tuple
    count: int
    cuts: tuple[Cut, ...]
    lead: int = 0


def apply(model: Trained, op: recipe.Prune) -> Trained:
    """The model without `op.amount` of its units, each layer keeping the most important of its own.

    Raises:
        InputError: the family has no such units, or the model is quantized.
    """
    if model.config.quantize.weights != "none":
        raise InputError("recipe step prune: the model is quantized already; prune it before")
    if op.unit == "layers":
        return _without_layers(model, op.amount)
    groups = list(units(model, op.unit))
    flat = {
        f"{part}/{name}": x
        for part in ("params", "rest")
        for name, x in mesh.by_path(getattr(model, part)).items()
    }
    kept = {}
    for group, score in zip(groups, _importance(model, groups), strict=True):
        count = _left(group.count, op.amount)
        best = np.argsort(-score, axis=-1, kind="stable")[..., :count]
        kept[group.key, group.index] = count
        for cut in group.cuts:
            flat[cut.path] = _take(flat[cut.path], cut, group, np.sort(best, axis=-1))
    config = _smaller(model.config, kept)
    parts = {
        part: mesh.with_leaves(
            getattr(model, part),
            {n.removeprefix(part + "/"): x for n, x in flat.items() if n.startswith(part + "/")},
        )
        for part in ("params", "rest")
    }
    return trained.changed(model, config, parts["params"], parts["rest"])


def _left(count: int, amount: float) -> int:
    left = max(round(count * (1 - amount)), 1)
    return round(left / EVEN) * EVEN if left >= EVEN * EVEN else left


def _smaller(config: Config, kept: Mapping[tuple[str, int | None], int]) -> Config:
    values: dict[str, Any] = {}
    for (key, index), count in kept.items():
        if index is None:
            values[key] = count
        else:
            old = values.get(key, getattr(config.model, key))
            values[key] = (*old[:index], count, *old[index + 1 :])
    if "kv_heads" in values:  # the query heads of a group go with its keys and values
        values["heads"] = values["kv_heads"] * config.model.heads // config.model.kv_heads  # type: ignore[union-attr]
    return config.replace(model=dataclasses.replace(config.model, **values))


def _importance(model: Trained, groups: list[Units]) -> list[np.ndarray]:
    """For each group [lead..., units]."""
    params = mesh.by_path(model.params)

    @jax.jit
    def of_batch(params: dict[str, jax.Array], slope: Any) -> list[jax.Array]:
        slopes, out = mesh.by_path(slope), []
        for group in groups:
            total = jnp.float32(0)
            for cut in group.cuts:
                name = cut.path.removeprefix("params/")
                if name in params:  # statistics in `rest` have no gradient
                    total += _per_unit((params[name] * slopes[name]).astype(jnp.float32), cut, group)
            out.append(jnp.square(total))
        return out

    batches = [jax.device_get(of_batch(params, slope)) for slope in observe.slopes(model)]
    return [np.mean(scores, axis=0) for scores in zip(*batches, strict=True)]


def _split(x: jax.Array, cut: Cut, group: Units) -> tuple[int, tuple[int, ...]]:
    """-> (the axis of the units, x's shape with that axis apart)."""
    axis = x.ndim + cut.axis
    outer = x.shape[axis] // (group.count * cut.inner)
    return axis + 1, (*x.shape[:axis], outer, group.count, cut.inner, *x.shape[axis + 1 :])


def _per_unit(x: jax.Array, cut: Cut, group: Units) -> jax.Array:
    """Sums over everything but the leading dimensions and the units."""
    axis, shape = _split(x, cut, group)
    apart = x.reshape(shape)
    return apart.sum(tuple(i for i in range(group.lead, apart.ndim) if i != axis))


def _take(x: jax.Array, cut: Cut, group: Units, best: np.ndarray) -> jax.Array:
    """x with the slices of the units in `best` [lead..., kept] alone."""
    axis, shape = _split(x, cut, group)
    apart = x.reshape(shape)
    lead = (1,) * (axis - group.lead)
    index = best.reshape(*best.shape[:-1], *lead, best.shape[-1], *(1,) * (apart.ndim - axis - 1))
    taken = jnp.take_along_axis(apart, jnp.asarray(index), axis)
    return taken.reshape(*x.shape[: axis - 1], -1, *x.shape[x.ndim + cut.axis + 1 :])


# --------------------------------------------------------------------------------------- what is made of what


def units(model: Trained, unit: str) -> Iterable[Units]:
    """The units of a model. Raises InputError if its family has none of this kind."""
    c, there = model.config.model, {f"params/{n}" for n in mesh.by_path(model.params)}
    there |= {f"rest/{n}" for n in mesh.by_path(model.rest)}
    found: list[Units] = []
    if isinstance(c, families.Transformer) and unit in ("heads", "mlp"):
        found = list(_heads(c, there) if unit == "heads" else _hidden(c, there))
    elif unit == "channels" and c.name in CHANNELS:
        found = list(CHANNELS[c.name](c))
    if not found:
        known = ["weights", *(("heads", "mlp", "layers") if isinstance(c, families.Transformer) else ())]
        known += ["channels"] if c.name in CHANNELS else []
        raise InputError(
            f"recipe step prune: a {c.name} has no unit={unit} that can be taken out; choose "
            f"{', '.join(known)}"
        )
    return [
        dataclasses.replace(group, cuts=tuple(cut for cut in group.cuts if cut.path in there))
        for group in found
    ]


STACKS = ("params/blocks", "params/encoder/blocks", "params/decoder/blocks")


def _heads(c: families.Transformer, there: set[str]) -> Iterable[Units]:
    """Key and value heads with the query heads that read them. A stack with relative positions keeps the same
    heads in all its layers, which share the table."""
    ratio = c.heads // c.kv_heads
    for stack in STACKS:
        for name in ("attention", "cross"):
            at = f"{stack}/{name}"
            if f"{at}/q/kernel" not in there:
                continue
            wide = ratio * c.head_dim
            cuts = [Cut(f"{at}/q/{kind}", -1, wide) for kind in ("kernel", "bias")]
            cuts += [
                Cut(f"{at}/{part}/{kind}", -1, c.head_dim) for part in "kv" for kind in ("kernel", "bias")
            ]
            cuts += [Cut(f"{at}/out/kernel", -2, wide)]
            table = f"{stack.removesuffix('/blocks')}_bias/buckets"
            shared = name == "attention" and table in there
            yield Units(
                "kv_heads",
                None,
                c.kv_heads,
                (*cuts, *([Cut(table, -1, ratio)] if shared else [])),
                int(not shared),
            )


def _hidden(c: families.Transformer, there: set[str]) -> Iterable[Units]:
    """Hidden units of the MLPs, or of each expert's."""
    for stack in STACKS:
        at, lead = (f"{stack}/mlp/experts", 2) if c.experts else (f"{stack}/mlp", 1)
        if f"{at}/up/kernel" in there:
            cuts = [Cut(f"{at}/{part}/{kind}", -1) for part in ("up", "gate") for kind in ("kernel", "bias")]
            yield Units("mlp_width", None, c.mlp_width, (*cuts, Cut(f"{at}/down/kernel", -2)), lead)


def _made(layer: str) -> tuple[Cut, ...]:
    """The arrays of a layer that have an entry for each of its outputs."""
    return Cut(f"params/{layer}/kernel", -1), Cut(f"params/{layer}/bias", -1)


def _read(layer: str) -> Cut:
    """A layer's kernel, by its inputs; of a flattened image, channels are the innermost."""
    return Cut(f"params/{layer}/kernel", -2)


def _normed(layer: str) -> tuple[Cut, ...]:
    """A BatchNorm's arrays."""
    return tuple(
        Cut(f"{part}/{layer}/{name}", -1)
        for part, names in (("params", ("scale", "bias")), ("rest", ("mean", "var")))
        for name in names
    )


def _chain(key: str, counts: tuple[int, ...], layers: list[str], then: str) -> Iterable[Units]:
    """Layers one after another; `then` reads the last."""
    for index, (count, layer, reader) in enumerate(zip(counts, layers, [*layers[1:], then], strict=True)):
        yield Units(key, index, count, (*_made(layer), _read(reader)))


def _cnn(c: Any) -> Iterable[Units]:
    yield from _chain("channels", c.channels, [f"convs/{i}" for i in range(len(c.channels))], "hidden")
    yield Units("width", None, c.width, (*_made("hidden"), _read("head")))


def _mlp(c: Any) -> Iterable[Units]:
    layers = [f"classifier/layers/{i}" for i in range(len(c.widths))]
    yield from _chain("widths", c.widths, layers, "classifier/head")


def _classifier(c: Any) -> Iterable[Units]:
    """Two dense layers of one width."""
    first, second = "classifier/layers/0", "classifier/layers/1"
    yield Units("width", None, c.width, (*_made(first), _read(second)))
    yield Units("width", None, c.width, (*_made(second), _read("classifier/head")))


def _alexnet(c: Any) -> Iterable[Units]:
    yield from _chain("channels", c.channels, [f"convs/{i}" for i in range(5)], "classifier/layers/0")
    yield from _classifier(c)


def _vgg(c: Any) -> Iterable[Units]:
    """A stage's convolutions have one number of channels, but each keeps its own."""
    stages = [stage for stage, count in enumerate(VGG_STAGES[c.depth]) for _ in range(count)]
    readers = [*(f"convs/{i}" for i in range(1, len(stages))), "classifier/layers/0"]
    for i, (stage, reader) in enumerate(zip(stages, readers, strict=True)):
        cuts = (*_made(f"convs/{i}"), *_normed(f"norms/{i}"), _read(reader))
        yield Units("channels", stage, c.channels[stage], cuts)
    yield from _classifier(c)


def _resnet(c: Any) -> Iterable[Units]:
    """A stage's stream runs through all its blocks, so all keep the same of its channels; a block's inner
    channels are its own. A bottleneck's stream is four times as wide: four units go together."""
    bottleneck, block = c.depth >= 50, 0
    before: list[Cut] = [
        *_made("stem/conv"),
        *_normed("stem/norm"),
    ]  # what makes the stream that a stage reads
    streams: list[list[Cut]] = []
    stem_apart = bottleneck
    for stage, count in enumerate(RESNET_STAGES[c.depth]):
        stream: list[Cut] = []
        for index in range(count):
            at = f"blocks/{block}"
            last = 2 if bottleneck else 1
            entering = streams[-1] if stage and not index else (before if not stage and not index else stream)
            entering.append(_read(f"{at}/convs/0/conv"))
            projected = (stage > 0 and not index) or (bottleneck and not index)
            if projected:
                entering.append(_read(f"{at}/project/conv"))
                stream += [*_made(f"{at}/project/conv"), *_normed(f"{at}/project/norm")]
            elif not stage and not index:
                stream = before  # a basic block's first stage goes on in the stem's stream
            for j in range(last):
                inner = (*_made(f"{at}/convs/{j}/conv"), *_normed(f"{at}/convs/{j}/norm"))
                yield Units("channels", stage, c.channels[stage], (*inner, _read(f"{at}/convs/{j + 1}/conv")))
            stream += [*_made(f"{at}/convs/{last}/conv"), *_normed(f"{at}/convs/{last}/norm")]
            block += 1
        streams.append(stream)
    streams[-1].append(_read("head"))
    if stem_apart:
        yield Units("channels", 0, c.channels[0], tuple(before))
    for stage, stream in enumerate(streams):
        wide = tuple(dataclasses.replace(cut, inner=4 if bottleneck else 1) for cut in stream)
        yield Units("channels", stage, c.channels[stage], wide)


CHANNELS = {"cnn": _cnn, "mlp": _mlp, "alexnet": _alexnet, "vgg": _vgg, "resnet": _resnet}


# ---------------------------------------------------------------------------------------------------- layers


def _without_layers(model: Trained, amount: float) -> Trained:
    """One layer after another goes: each time the one without which the loss is lowest."""
    c = model.config.model
    if not isinstance(c, families.Transformer):
        raise InputError(
            f"recipe step prune: a {c.name} has no unit=layers that can be taken out; choose channels"
        )
    for key in ("depth", "decoder_depth"):
        depth = getattr(c, key, 0)
        target = max(round(depth * (1 - amount)), 1)
        for _ in range(depth - target):
            model = _without_one(model, key)
    return model


def _without_one(model: Trained, key: str) -> Trained:
    depth = getattr(model.config.model, key)
    two = hasattr(model.config.model, "decoder_depth")
    stack = "blocks" if not two else ("decoder/blocks" if key == "decoder_depth" else "encoder/blocks")
    config = model.config.replace(model=dataclasses.replace(model.config.model, **{key: depth - 1}))
    flat = {name: x for name, x in mesh.by_path(model.params).items() if name.startswith(stack + "/")}

    def without(layer: int) -> Any:
        kept = np.delete(np.arange(depth), layer)
        return mesh.with_leaves(model.params, {name: x[kept] for name, x in flat.items()})

    smaller = trained.changed(model, config, without(0), model.rest)
    losses = [_loss(dataclasses.replace(smaller, params=without(layer))) for layer in range(depth)]
    return trained.changed(model, config, without(int(np.argmin(losses))), model.rest)


def _loss(model: Trained) -> float:
    """Of the calibration batches."""
    state = {"params": model.params, "rest": model.rest}
    terms = [jax.device_get(model.program.eval_step(state, b)["loss"]) for b in observe.batches(model)]
    total, weight = np.sum(terms, axis=0)
    return float(total / weight)
