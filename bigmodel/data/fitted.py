"""Values that training fitted to its data, kept in the workdir so that predictions need no training data.

fitted.json holds facts by name, each with the SHA-256 of its JSON; `data/facts.py` says which there are. An
imported model's directory holds what its files say, under the same names.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from bigmodel import workdir as workdir_lib
from bigmodel.config import InputError

FILE = "fitted.json"
Values = Mapping[str, Any]  # name -> JSON


def read(workdir: str | os.PathLike[str] | None) -> Values:
    """The facts of a workdir by name; {} where there are none.

    Raises:
        InputError: the file cannot be read, or a fact is not what its digest says.
    """
    path = pathlib.Path(workdir) / FILE if workdir else None
    if path is None or not path.is_file():
        return {}
    stat = path.stat()
    return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)  # loading a model asks several times
def _read(path: pathlib.Path, mtime_ns: int, size: int) -> Values:
    fix = "restore it from a copy, or train in a new --workdir"
    try:
        tree = json.loads(path.read_text("utf-8"))
        values = {name: entry["value"] for name, entry in tree.items()}
        damaged = [name for name, entry in tree.items() if entry["sha256"] != digest(entry["value"])]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}); {fix}") from error
    if damaged:
        raise InputError(f"{path}: {damaged[0]!r} is not what training wrote (SHA-256 differs); {fix}")
    return values


def write(workdir: str | os.PathLike[str], values: Values) -> None:
    """Adds facts to those of a workdir; one of the same name is replaced.

    Raises:
        InputError: those that are there are damaged.
    """
    path = pathlib.Path(workdir) / FILE
    merged = {**read(workdir), **values}
    if merged != read(workdir):
        tree = {name: {"sha256": digest(value), "value": value} for name, value in merged.items()}
        workdir_lib.write_json(path, tree)


def forget(workdir: str | os.PathLike[str]) -> None:
    """Removes all facts, of a run that saved nothing yet."""
    (pathlib.Path(workdir) / FILE).unlink(missing_ok=True)


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value; the order of keys counts, since columns have one."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def disagreement(a: Values, b: Values) -> str:
    """Returns the first difference between two models' facts, such as the name of class 1; "" for none.

    What only one of them keeps is not compared, nor what the datasets hold beside classes.
    """
    for name in sorted(a.keys() & b.keys() - {"features"}, reverse=True):  # names before numbers
        if found := difference(a[name], b[name], name):
            return found
    mine, others = a.get("features", {}), b.get("features", {})
    for key in sorted(mine.keys() & others.keys()):
        names = mine[key]["names"], others[key]["names"]
        if all(names) and (found := difference(*names, f"classes of {key}")):
            return found
    return ""


def difference(was: Any, now: Any, what: str = "") -> str:
    """The first difference between two JSON values in words; "" where there is none.

    >>> difference(["no", "yes"], ["yes"], "classes")
    "classes: 'no' is missing"
    """
    if was == now:
        return ""
    prefix = f"{what}: " if what else ""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in (*was, *(key for key in now if key not in was)):
            if key not in now or key not in was:
                return f"{prefix}{key!r} is {'missing' if key in was else 'new'}"
            if was[key] != now[key]:
                return difference(was[key], now[key], f"{what} {key!r}".strip())
    if isinstance(was, list) and isinstance(now, list):
        before, after = set(map(json.dumps, was)), set(map(json.dumps, now))
        gone, new = sorted(before - after), sorted(after - before)
        parts = [f"{json.loads(gone[0])!r} is missing"] if gone else []
        parts += [f"{json.loads(new[0])!r} is new"] if new else []
        added = len(gone) + len(new) - len(parts)
        return prefix + (", ".join(parts) + (f" and {added} more" if added else "") or "in another order")
    return f"{prefix}was {was!r}, now {now!r}"
