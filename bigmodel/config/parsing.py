"""Nested dicts and text -> frozen dataclasses, checked against their type hints; errors name key and fix."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal


class InputError(ValueError):
    """Bad input. The message is one line that names the key, file or record, and the fix; exit code 2."""


class UnknownKey(InputError):
    """A key that no dataclass has."""

    def __init__(self, key: str, hint: str) -> None:
        super().__init__(f"config key {key!r} is unknown{hint}")
        self.key = key


def build(cls: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    """Dataclass `cls` from a nested dict; text is parsed by the field's type.

    A field typed as `Annotated[B, union of dataclasses]` takes the one whose `name` the dict gives, or, by a
    name such as `path/to/file.py:Class` or `package.module:Class`, a class of one's own: a frozen dataclass
    derived from B, which keeps that name.

    Args:
        prefix: the dotted path before this level's keys, for messages.

    Raises:
        InputError: an unknown key (with the nearest known one), or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {key_of(field.name): field.name for field in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            raise UnknownKey(prefix + key, nearest(key, fields, prefix))
    return cls(
        **{fields[key]: _value(hints[fields[key]], value, prefix + key) for key, value in tree.items()}
    )


def key_of(field: str) -> str:
    """A field's key: its name, without the underscore that parts it from a word of Python's (`from_`)."""
    return field.removesuffix("_")


def _value(hint: Any, value: Any, key: str) -> Any:
    if typing.get_origin(hint) is typing.Annotated:
        base, classes = typing.get_args(hint)
        hint = _by_name(typing.get_args(classes), base, value, key)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{key} is a group of keys, not a value; set one of them, e.g. {key}.name")
        return build(hint, value, key + ".")
    if isinstance(value, str):
        return parse(value, hint, key)
    return _typed(value, hint, key)


def _by_name(classes: tuple[Any, ...], base: type, value: Any, key: str) -> Any:
    """The one of several dataclasses whose `name` the value gives; the first one's if it gives none."""
    known = {cls.name: cls for cls in classes}
    name = value.get("name", classes[0].name) if isinstance(value, Mapping) else value
    if isinstance(name, str) and ":" in name:
        return _own_class(name, base, f"{key}.name={name!r}")
    if not isinstance(name, str) or name not in known:
        raise InputError(f"{key}.name={name!r} is unknown{nearest(str(name), known)}")
    return known[name]


def _own_class(reference: str, base: type, setting: str) -> Any:
    """The class that `reference` names, if it can hold a group's keys."""
    found = refer(reference, setting)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"{setting} is no {base.__name__}; derive it from {base.__module__}.{base.__name__}")
    if "__dataclass_params__" not in vars(found):
        raise InputError(f"{setting} holds no keys; put @dataclass(frozen=True) before the class")
    return found


def refer(reference: str, setting: str) -> Any:
    """The attribute that `path/to/file.py:name` or `package.module:name` means; reading it runs that file.

    Args:
        setting: where the reference stands, for messages.

    Raises:
        InputError: no such file, module or attribute, or a file that cannot be read.
    """
    where, _, name = reference.rpartition(":")
    if where.endswith(".py"):
        module = read_file(where, setting)
    else:
        try:
            module = importlib.import_module(where)
        except (ImportError, ValueError, SyntaxError) as error:
            fix = "give path/to/file.py:Class, or a module that is installed or on PYTHONPATH"
            raise InputError(f"{setting}: {where!r} cannot be imported ({error}); {fix}") from error
    if not hasattr(module, name):
        classes = [key for key, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
        raise InputError(f"{setting}: {where} has no {name!r}{nearest(name, classes)}")
    return getattr(module, name)


def read_file(path: str | pathlib.Path, setting: str) -> types.ModuleType:
    """A Python file as a module; it runs once, and again when its text has changed.

    Raises:
        InputError: a missing file, or one that cannot be read.
    """
    file = pathlib.Path(path).absolute()
    if not file.is_file():
        raise InputError(f"{setting}: {str(path)!r} does not exist in {pathlib.Path.cwd()}; correct the path")
    try:
        return _run_file(file, digest(file))
    except InputError:
        raise
    except Exception as error:
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == str(file)]
        at = f"line {lines[-1]}: " if lines else ""
        raise InputError(f"{setting} {str(path)!r} cannot be read: {at}{error!r}") from error


def digest_of(reference: str) -> str:
    """Fingerprint of the file that a reference, which `refer` has read, is defined in."""
    where = reference.rpartition(":")[0]
    return digest(where if where.endswith(".py") else str(sys.modules[where].__file__))


def digest(path: str | pathlib.Path) -> str:
    """Fingerprint of a file's text."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


@functools.cache
def _run_file(path: pathlib.Path, digest: str) -> types.ModuleType:
    name = f"{path.stem}_{digest[:12]}"  # dataclasses look up their type hints in sys.modules
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def parse(text: str, hint: Any, key: str) -> Any:
    """Text -> a value of type `hint`; the error says what was expected."""
    options = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        if type(None) in options and text.lower() in ("none", "null"):
            return None
        return text if str in options[1:] and not _is_number(text) else parse(text, options[0], key)
    if typing.get_origin(hint) is Literal:
        if text not in options:
            raise InputError(f"{key}={text!r} is unknown; choose one of {', '.join(map(str, options))}")
        return text
    if typing.get_origin(hint) is tuple:
        return tuple(parse(part, options[0], key) for part in text.strip("()[] ").split(",") if part.strip())
    parsers: dict[Any, tuple[Callable[[str], Any], str]] = {
        int: (int, "a whole number such as 1000"),
        float: (float, "a number such as 3e-4"),
        bool: (_parse_bool, "true or false"),
        str: (str, "text"),
    }
    read, expected = parsers.get(hint, (json.loads, 'JSON such as {"option": "value"}'))
    try:
        return _typed(read(text), hint, key)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{key}={text!r} is not {expected}") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_bool(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _typed(value: Any, hint: Any, key: str) -> Any:
    """A Python value, checked against `hint`; a whole number may stand for a float, nothing else may."""
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
        if (value is None and type(None) in options) or (isinstance(value, str) and str in options):
            return value
        return _typed(value, options[0], key)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(item, typing.get_args(hint)[0], key) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key}={value} is not a finite number; give one such as 3e-4")
    if typing.get_origin(hint) is Literal:
        hint = str
    kind = typing.get_origin(hint) or hint
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{key}={value!r} is {type(value).__name__}; it must be {kind.__name__.lower()}")
    return value


def nearest(key: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown key: the likeliest one meant, or all that are known."""
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix + close[0]!r}?" if close else f"; known: {', '.join(sorted(names))}"


def regex_problems(group: Any, *keys: str) -> Iterable[tuple[str, str]]:
    """Those of `keys` (a missing one is none) whose text is no regular expression."""
    for key in keys:
        try:
            re.compile(getattr(group, key, ""))
        except re.error as error:
            yield key, f"is {getattr(group, key)!r}, which is no regular expression ({error})"
