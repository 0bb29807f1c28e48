"""The only bridge between Flax modules and plain dicts of arrays.

A module is split once, from its abstract value, into a static graph and two nested dicts: `params`
(nnx.Param) and `rest` (everything else: batch statistics, spectral norms). It is merged again only while a
step is traced, so a compiled step sees nothing but dicts, and Flax costs nothing at run time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from bigmodel import mesh
from bigmodel.models import weights

Batch = Mapping[str, Any]  # arrays; while decoding a cache too
Outputs = dict[
    str, Any
]  # such as {"logits": ..., "features": what they are read from, "losses": {name: ...}}
Taps = dict[str, Any]  # what a model is asked to give beside its outputs, written into by its layers
Tree = dict[str, Any]  # nested dict of arrays, or of ShapeDtypeStructs


@dataclass(frozen=True)
class Storage:
    """Where a model's parameters are: among `params`, which training sees, and in parts of `rest`.

    The default stores them as they are. A storage composes by calling another's `encode` and `decode`.
    """

    parts: tuple[str, ...] = ()  # of `rest`
    encode: Callable[[jax.Array, Tree], tuple[Tree, Tree]] = lambda key, plain: (plain, {})
    decode: Callable[[Tree, Tree], Tree] = lambda params, parts: params  # to weights as layers read them


@dataclass(frozen=True)
class Definition:
    """A model before any array exists. `apply` must be called under `jax.jit`."""

    graph: Any
    params_spec: Tree
    rest_spec: Tree
    construct: Callable[[jax.Array], nnx.Module]
    plain_spec: Tree  # the module's parameters as plain arrays, however they are stored
    products: Mapping[
        str, tuple[int, ...]
    ]  # path of each product's weight -> axes (from the end) it sums over
    storage: Storage = Storage()
    # Models that training runs forward too: part of `rest` -> definition, whose params and rest are there.
    frozen: Mapping[str, Definition] = field(default_factory=dict)
    rules: mesh.Rules = mesh.RULES  # where parameters lie on a mesh

    def stored(self, storage: Storage) -> Definition:
        """The same model with its plain parameters stored so."""
        params_spec, parts_spec = jax.eval_shape(storage.encode, jax.random.key(0), self.plain_spec)
        rest_spec = {**self.rest_spec, **parts_spec}
        return dataclasses.replace(self, params_spec=params_spec, rest_spec=rest_spec, storage=storage)

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """key -> (params, rest)."""
        _, plain, rest = _split(self.construct(key))
        params, parts = self.storage.encode(jax.random.fold_in(key, 1), plain)
        return params, {**rest, **parts}

    def divide(self, rest: Tree) -> tuple[Tree, Tree]:
        """-> (the parts of `rest` that store weights, the module's own)."""
        parts = {part: rest[part] for part in self.storage.parts}
        return parts, {part: value for part, value in rest.items() if part not in parts}

    def unpacked(self, params: Tree, rest: Tree) -> tuple[Tree, Tree]:
        """-> (the module's parameters, with weights as they are stored; the module's own rest)."""
        parts, rest = self.divide(rest)
        return self.storage.decode(params, parts), rest

    def parameters_only(self) -> Definition:
        """The same model, which takes what `unpacked` returns."""
        return dataclasses.replace(self, storage=Storage())

    def plain(self, params: Tree, rest: Tree) -> Tree:
        """The module's own parameters as plain arrays, however they are stored."""
        params, _ = self.unpacked(params, rest)
        return jax.tree.map(lambda s, w: w.astype(s.dtype), self.plain_spec, params)

    def apply(
        self,
        params: Tree,
        rest: Tree,
        batch: Batch,
        *,
        key: jax.Array | None,
        train: bool,
        taps: Taps | None = None,
    ) -> tuple[Any, Tree]:
        """-> (the model's outputs, rest as this call left it). `key` feeds dropout; None: no dropout.

        `taps`, an empty dict for a Transformer, gets "attention": the `Attended` of each stack's last layer.
        """
        model, parts = self.merge(params, rest)
        outputs = model(batch, key=key, train=train, **({} if taps is None else {"taps": taps}))
        _, _, rest = _split(model)
        return outputs, {**rest, **parts}

    def merge(self, params: Tree, rest: Tree) -> tuple[Any, Tree]:
        """-> (the module, the parts of `rest` that are not its own)."""
        parts, _ = self.divide(rest)
        params, rest = self.unpacked(params, rest)
        return nnx.merge(self.graph, weights.lay_out(params, self.rules), rest), parts


def read_out(head: Callable[[jax.Array], jax.Array], x: jax.Array) -> Outputs:
    """The output layer's answer, and what it read: x [..., D] -> {"logits": [..., V], "features": x}."""
    return {"logits": head(x), "features": x}


def define(construct: Callable[[nnx.Rngs], nnx.Module]) -> Definition:
    """Splits the module that `construct` makes, without making its arrays."""

    def from_key(key: jax.Array) -> nnx.Module:
        return construct(nnx.Rngs(key))

    abstract = jax.eval_shape(from_key, jax.random.key(0))
    graph, params, rest = _split(abstract)
    return Definition(graph, params, rest, from_key, params, _products(abstract))


def _products(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The weights that layers name in `SUMS`, by path."""
    return {
        "/".join(map(str, (*path, name))): axes
        for path, layer in nnx.iter_graph(model)
        for name, axes in getattr(type(layer), "SUMS", {}).items()
    }


def _split(model: nnx.Module) -> tuple[Any, Tree, Tree]:
    states: Any = nnx.split(model, nnx.Param, ...)
    graph, params, rest = states
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def stack(construct: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` independently initialized modules as one, every parameter with a leading [depth]."""
    return nnx.vmap(lambda key: construct(nnx.Rngs(key)))(jax.random.split(rngs.params(), depth))


@jax.tree_util.register_pytree_node_class
class Layers(tuple[Any, ...]):
    """A stack's array as one array for each layer, in place of one with a leading [depth].

    Decoding reads every parameter once a token: cutting a layer out of a stack would read it twice.
    """

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return tuple(self), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Layers:
        return cls(children)


def unstack(tree: Tree, name: str = "blocks") -> Tree:
    """A tree of arrays or specs with `Layers` as the leaves of the dicts called `name`, wherever they are."""

    def cut(x: Any) -> Layers:
        return Layers(_layer(x, index) for index in range(x.shape[0]))

    return {
        key: jax.tree.map(cut, value)
        if key == name
        else unstack(value, name)
        if isinstance(value, dict)
        else value
        for key, value in tree.items()
    }


def _layer(x: Any, index: int) -> Any:
    """One layer of a stack's array, or of a spec with its sharding."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x[index]
    where = NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=where)


def depth(stacked: nnx.Module) -> int:
    """Number of layers of a `stack`."""
    leaf = jax.tree.leaves(_params(stacked), is_leaf=_is_layers)[0]
    return len(leaf) if _is_layers(leaf) else leaf.shape[0]


def scan(
    stacked: nnx.Module,
    call: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda body: body,
    unroll: bool = False,
) -> tuple[Any, Any]:
    """carry, y = call(layer, carry, x) for each layer of a `stack`, compiled once or unrolled -> (carry, ys).

    Args:
        xs: a pytree with a leading [depth], or of `Layers`, or None; ys are of the same kind.
        wrap: around the body, e.g. `jax.checkpoint`.
    """
    graph, _ = nnx.split(stacked)
    params = _params(stacked)

    def body(carry: Any, layer: tuple[Tree, Any]) -> tuple[Any, Any]:
        params, x = layer
        return call(nnx.merge(graph, params), carry, x)

    if not any(map(_is_layers, jax.tree.leaves((params, xs), is_leaf=_is_layers))):
        return jax.lax.scan(wrap(body), carry, (params, xs), unroll=unroll)
    ys = []
    for index in range(depth(stacked)):
        layer = jax.tree.map(lambda x, index=index: x[index], (params, xs), is_leaf=_is_layers)
        carry, y = wrap(body)(carry, layer)
        ys.append(y)
    return carry, jax.tree.map(lambda *y: Layers(y), *ys)


def _params(stacked: nnx.Module) -> Tree:
    return nnx.to_pure_dict(nnx.split(stacked)[1])


def _is_layers(x: Any) -> bool:
    return isinstance(x, Layers)
