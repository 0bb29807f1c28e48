"""Fingerprints of what decides a run's results, its config and its data, saved in every checkpoint.

Compared on resume (`refuse_other_config`, `refuse_other_data`), when a checkpoint is loaded for inference,
and between the hosts of a job before the first step (`same_on_all_hosts`). One rule says what may change from
one session of a run to the next: MAY_CHANGE. Whatever it does not name, a new key too, is refused.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bigmodel import config as config_lib
from bigmodel.config import Config, InputError, parsing

PACKAGES = (
    "bigmodel", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tensorstore",
)  # fmt: skip
# Keys of the config that a resumed run may have otherwise: how long and where it trains, what it reports, how
# it steps from here. The parameters and the optimizer's state mean the same with any value of them.
SETTINGS = (
    "lr",
    "schedule",
    "warmup_steps",
    "decay_steps",
    "end_lr",
    "weight_decay",
    "l1",
    "l2",
    "clip_norm",
)
MAY_CHANGE = (
    "steps", "budget", "microbatches", "remat", "compiler_options.*",
    "mesh.*", "check.*", "checkpoint.*", "eval.*", "log.*", "train.*", "assume.*",
    *(f"optim.{key}" for key in SETTINGS), *(f"optim.groups.*.{key}" for key in SETTINGS),
    # where the data lie and how they are read; that they are the same the pipeline's fingerprint says
    "data.data_dir", "data.cache", "data.prefetch", "data.max_skipped",
    # evaluation alone
    "data.eval_split", "data.eval_crop", "task.top_k", "task.eval_negatives", "task.most_detections",
    "task.least_score", "task.nms_overlap",
    "model.attention_block", "init.skip",
)  # fmt: skip
# Keys that a model which is loaded, and not trained, may have otherwise too: they change nothing it computes.
OF_TRAINING = ("data.name", "data.split", "data.shuffle", "batch_size", "seed", "init.*")
MOST_NAMED = 5


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def of(config: Config, pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """A run's part of a checkpoint's meta; `pipeline` is the training pipeline's fingerprint."""
    return {"pipeline": dict(pipeline), "config": config_lib.to_dict(config), "own_files": own_files(config)}


def own_files(config: Config) -> dict[str, str]:
    """Fingerprints of the files of the user's own classes, by key of the config."""
    names = {"model.name": config.model.name, "task.name": config.task.name}
    return {key: parsing.digest_of(name) for key, name in names.items() if ":" in name}


def changed_files(meta: Mapping[str, Any], config: Config) -> list[str]:
    """A sentence for each file of the user's own classes that is not as it was at the checkpoint."""
    was, now = meta.get("own_files", {}), own_files(config)
    return [
        f"{key}: the file of {name} has changed since the checkpoint; its arrays may mean something else now"
        for key, name in (("model.name", config.model.name), ("task.name", config.task.name))
        if key in was and was[key] != now.get(key)
    ]


def changes(was: Mapping[str, Any], now: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in a checkpoint's config, value now), for every key that differs.

    A key that the checkpoint's version did not have counts as its default, one that is no more as nothing.
    """
    tree = config_lib.to_dict(now)
    before, after = config_lib.flatten(was), config_lib.flatten(tree)
    free = ("optim.groups.", "compiler_options.", "eval.sets.")  # what is below has no fixed keys
    new = [key for key in after if key not in before and not key.startswith(free)]
    defaults = (
        config_lib.flatten(config_lib.to_dict(config_lib.from_dict(_without(tree, new)))) if new else {}
    )
    before = {**{key: defaults[key] for key in new}, **before}
    keys = [key for key in sorted(before.keys() | after.keys()) if key in after or key.startswith(free)]
    pairs = {key: (before.get(key), after.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _without(tree: Mapping[str, Any], keys: list[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if prefix + key not in keys or prefix + key == "model.name"
    }


def may_change(key: str, now: Any, also: tuple[str, ...] = ()) -> bool:
    """True for a key of the config that may have another value in a resumed run."""
    if key == "init.from" and not now:  # of the first start alone: it may be left out later
        return True
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in (*MAY_CHANGE, *also))


def refuse_other_config(
    was: Mapping[str, Any], now: Config, path: pathlib.Path, also: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """-> the differences that are allowed, as `changes`.

    Args:
        also: patterns of further keys that may differ.

    Raises:
        InputError: another one; it names the keys.
    """
    found = changes(was, now)
    if refused := {key: pair for key, pair in found.items() if not may_change(key, pair[1], also)}:
        takes = (
            ""
            if any(key.startswith("model.") for key in refused)
            else (f" (init.from={path} takes over its parameters)")
        )
        raise InputError(
            f"--workdir={path} was trained with other settings, under which its arrays mean something else: "
            f"{_listed(refused)}; set them back, or use a new --workdir{takes}"
        )
    return found


def refuse_other_data(was: Mapping[str, Any], now: Mapping[str, Any], path: pathlib.Path) -> None:
    """Compares two fingerprints of training data. Raises InputError, which names the first difference."""
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            raise InputError(
                f"--workdir={path} was trained on other data: {key} was {was.get(key)}, "
                f"now {now.get(key)}; use the same data, seed and batch_size, or a new --workdir"
            )


def same_on_all_hosts(values: Mapping[str, Any]) -> None:
    """Every host of the job calls it alike, with JSON values by name.

    Raises:
        InputError: on every host, where one has another value than the first; it names the keys.
    """
    if jax.process_count() == 1:
        return
    hosts = [json.loads(text) for text in gathered(json.dumps(dict(values)))]
    for index, other in enumerate(hosts):
        keys = sorted(hosts[0].keys() | other.keys())
        pairs = {key: (hosts[0].get(key), other.get(key)) for key in keys}
        if differing := {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}:
            listed = _listed(differing, f"is {{}} on host 0, {{}} on host {index}")
            raise InputError(f"the hosts of this job differ: {listed}; give all the same command and data")


def gathered(text: str) -> list[str]:
    """The text of each process, on every process."""
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(raw)))).ravel()
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(raw)] = raw
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes.tolist(), strict=True)]


def _listed(pairs: Mapping[str, tuple[Any, Any]], form: str = "was {}, now {}") -> str:
    listed = [f"{key} {form.format(*map(_short, pair))}" for key, pair in list(pairs.items())[:MOST_NAMED]]
    others = len(pairs) - len(listed)
    return "; ".join(listed) + (f"; and {others} more" if others > 0 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
