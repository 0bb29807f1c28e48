"""Config files and overrides -> one frozen `Config`; every error names the key and the fix.

A config file defines `get_config(arg) -> ml_collections.ConfigDict` and sets only what differs from the
defaults. `load` reads it, applies the overrides, checks every value and returns frozen dataclasses: no
ConfigDict goes further than this file."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from bigmodel.config import parsing, reference
from bigmodel.config.parsing import InputError
from bigmodel.config.run import Config, check, flatten, to_dict
from bigmodel.config.task import keys_of


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """`size=124m,seq_len=1024` -> ConfigDict over `defaults`, whose types the values take.

    Raises:
        InputError: an argument that `defaults` does not name, or a value of another type.
    """
    out = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, eq, text = item.partition("=")
        if key not in defaults:
            raise InputError(f"--config argument {key!r} is unknown{parsing.nearest(key, defaults)}")
        kind = type(defaults[key])
        if not eq and kind is not bool:
            raise InputError(f"--config argument {key!r} has no value; write {key}=VALUE")
        out[key] = parsing.parse(text if eq else "true", kind, f"--config argument {key!r}")
    return ml_collections.ConfigDict(out)


def load(spec: str | pathlib.Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Reads a config file and applies overrides.

    Args:
        spec: `configs/gpt.py` or `configs/gpt.py:size=124m,seq_len=1024`.
        overrides: `["optim.lr=3e-4", ...]` (values parsed by the key's type) or `{"optim.lr": 3e-4}`.

    Raises:
        InputError: a missing file, an unknown key (with the nearest known one), a value of the wrong
            type or out of range.
    """
    return from_dict(_overridden(_read(spec), overrides))


def describe(spec: str | pathlib.Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> list[str]:
    """Lines with every key, its value, type, default and comment; a star marks what the file or an override
    sets. Arguments and errors as `load`."""
    tree = _overridden(_read(spec), overrides)
    return reference.table(from_dict(tree), list(flatten(tree)))


def sweep(spec: str | pathlib.Path) -> list[dict[str, Any]]:
    """Settings of several runs that a config file's `sweep()` returns, [] without one. Raises as `load`.

    A `sweep` with a parameter is given the arguments of the config, as `get_config` is.
    """
    path, arg = pathlib.Path(str(spec).partition(":")[0]), str(spec).partition(":")[2]
    _read(spec)  # with its errors
    function = getattr(parsing.read_file(path, "--config file"), "sweep", None)
    given = (arg or None,) if function and inspect.signature(function).parameters else ()
    return [] if function is None else [dict(each) for each in function(*given)]


def _read(spec: str | pathlib.Path) -> dict[str, Any]:
    path_text, _, arg = str(spec).partition(":")
    return dict(_get_config(pathlib.Path(path_text), arg or None).to_dict())


def override(config: Config, overrides: Iterable[str] | Mapping[str, Any]) -> Config:
    """`config` with other values for some keys; `overrides` and errors as `load`."""
    return from_dict(_overridden(to_dict(config), overrides))


def _overridden(tree: dict[str, Any], overrides: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    items = overrides.items() if isinstance(overrides, Mapping) else map(_split_override, overrides)
    for key, value in sorted(items, key=lambda item: item[0] != "task.name"):
        if key == "task.name" and (known := keys_of(str(value))):  # the file's keys of another task
            tree["task"] = {k: v for k, v in tree.get("task", {}).items() if k in known}
        _set(tree, key.split("."), value)
    return tree


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Nested dict (a ConfigDict's, or what `to_dict` made) -> checked `Config`.

    Raises:
        InputError: as `load`.
    """
    try:
        config = parsing.build(Config, tree, "")
    except parsing.UnknownKey as error:
        raise parsing.UnknownKey(error.key, reference.meant(error.key, tree)) from error
    groups = {  # text becomes values
        name: {key: getattr(group, key) for key in config.optim.groups[name]}
        for name, group in config.optim.every_group.items()
    }
    optim = dataclasses.replace(config.optim, groups=groups)
    config = config.replace(model=config.model.resolve(), optim=optim)
    check(config)
    return config


def difference(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in a, value in b), for every key that differs."""
    flat_a, flat_b = flatten(to_dict(a)), flatten(to_dict(b))
    keys = sorted(flat_a.keys() | flat_b.keys())
    pairs = {key: (flat_a.get(key), flat_b.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _get_config(path: pathlib.Path, arg: str | None) -> ml_collections.ConfigDict:
    if not path.is_file():
        raise InputError(f"--config file {str(path)!r} does not exist; give one such as configs/gpt.py")
    if path.suffix != ".py":
        raise InputError(f"--config file {str(path)!r} is not a Python file; give one such as configs/gpt.py")
    try:
        return parsing.read_file(path, "--config file").get_config(arg)
    except AttributeError as error:
        raise InputError(f"--config file {str(path)!r} cannot be read: {error}") from error


def _split_override(item: str) -> tuple[str, str]:
    key, eq, text = item.partition("=")
    if not eq:
        raise InputError(f"override {item!r} has no value; write {item}=VALUE")
    return key, text


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1], 1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise InputError(f"{'.'.join(keys[:depth])} is a single value and has no key {keys[depth]!r}")
    tree[keys[-1]] = value
