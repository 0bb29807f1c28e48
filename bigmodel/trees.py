"""Paths of nested dicts of arrays: `blocks/attention/q/kernel`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """{"blocks/attention/q/kernel": leaf, ...}; `is_leaf` as in `jax.tree.map`."""
    return {path_str(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def with_leaves(tree: Any, changes: Mapping[str, Any]) -> Any:
    """The tree with other leaves at the paths of `changes`."""
    return jax.tree_util.tree_map_with_path(lambda path, x: changes.get(path_str(path), x), tree)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `by_path`, as nested dicts; a list's places are whole numbers."""
    tree: dict[Any, Any] = {}
    for path, x in flat.items():
        *keys, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        inner = tree
        for key in keys:
            inner = inner.setdefault(key, {})
        inner[last] = x
    return tree


def path_str(path: tuple[Any, ...]) -> str:
    """A `jax.tree_util` key path as `blocks/attention/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
