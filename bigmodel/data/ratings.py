"""Who rated what: `ratings:GLOB` (CSV with user, item, rating, timestamp) or a dataset with these features.

Each user's last rating is held out (`test`), the others are `train` (leave-one-out, He et al. 2017, section
4.1). With data.eval_split=validation the last ones are left out altogether, and of the rest each user's last
is held out: for choosing settings. Users and items are numbered from 1 as the training ratings name them; 0
is whoever is not among them.

A training batch holds `user`, `item` int32 [B] and, by task.rank_loss, `negatives` int32 [B, N], `log_q`
float32 [B] (the log of the item's share of the ratings) or `rating` float32 [B]. One of evaluation also holds
what the item is ranked among: `negatives`, or all items but `seen` int32 [B, K] (what the user rated before,
0 for none), and `known` int32 [B], how many ids there are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bigmodel.config import Config, InputError, Rank
from bigmodel.data import delimited, labels, sources
from bigmodel.data.facts import Facts
from bigmodel.data.sizes import Size, Sizes, short
from bigmodel.data.source import TEST_FRACTION
from bigmodel.data.transforms import Batch

KEYS = ("user", "item", "rating", "timestamp")
NEGATIVES = 9  # a stream of draws
EVAL_SEED = 0


class Ratings(NamedTuple):
    """All ratings of both splits, by user and time."""

    user: np.ndarray  # int32 (n,), from 1; above `users`: one whom training did not know, 0 in a batch
    item: np.ndarray  # int32 (n,), from 1; 0: no training rating is of it
    rating: np.ndarray  # float32 (n,)
    is_test: np.ndarray  # bool (n,)
    users: int  # the largest id that the model knows
    items: int
    fingerprint: str
    names: dict[str, dict[str, int]]  # of users and items, by what the ratings call them: their ids

    def pairs(self, train: bool) -> np.ndarray:
        """int64, sorted: user * (items + 1) + item of what was rated, in the training split or in both."""
        pair = self.user.astype(np.int64) * (self.items + 1) + self.item
        return np.unique(pair[~self.is_test] if train else pair)


def load(config: Config, facts: Facts | None = None) -> Ratings:
    """Reads all ratings, and numbers them as the facts say (None: as these ratings do).

    Raises:
        InputError: a file without one of the columns, or with a bad line; more users or items than the model
            has rows for; nobody with two ratings; in training, other users or items than are kept.
    """
    facts = facts or Facts(config)
    d = config.data
    columns, fingerprint = _columns(config)
    order = np.lexsort(
        (columns["timestamp"], columns["user"])
    )  # stable: of equal times, the later line is last
    if d.eval_split not in ("test", "validation"):
        raise InputError(f"data.eval_split={d.eval_split!r}: ratings are held out as test or validation")
    if d.split_by != "auto" or d.test_fraction != TEST_FRACTION:
        raise InputError(
            "data.split_by and data.test_fraction divide no ratings: each user's last is held out"
        )
    if d.eval_split == "validation":
        order = order[~_is_last(columns["user"][order])]
    user, item, rating = (columns[key][order] for key in KEYS[:3])
    is_test = _is_last(user)
    if not is_test.any():
        raise InputError(f"data.name={d.name!r} has nobody with two ratings or more; give more ratings")
    names = {
        "user": _ids(facts.get("users", lambda: _names(user))),
        "item": _ids(facts.get("items", lambda: _names(item[~is_test]))),
    }
    user_id, item_id = _numbered(user, names["user"]), _numbered(item, names["item"])
    by_id = np.argsort(user_id, kind="stable")
    found = Ratings(
        user=user_id[by_id],
        item=np.where(item_id > len(names["item"]), 0, item_id)[by_id],
        rating=rating.astype(np.float32)[by_id],
        is_test=is_test[by_id],
        users=len(names["user"]),
        items=len(names["item"]),
        fingerprint=fingerprint,
        names=names,
    )
    model = config.model
    for key, room, largest in (("users", model.users, found.users), ("items", model.items, found.items)):
        if 0 < room <= largest:
            raise InputError(
                f"model.{key} is {room}, but data.name={d.name!r} has {largest} and "
                f"the unknown one; set model.{key} to {-(-(largest + 1) // 128) * 128} or more"
            )
    return found


def ids(config: Config, facts: Facts) -> dict[str, dict[str, int]]:
    """The ids of users and items by name. Reads no ratings where the facts are kept."""

    found = functools.cache(lambda: load(config).names)
    return {
        "user": _ids(facts.get("users", lambda: list(found()["user"]))),
        "item": _ids(facts.get("items", lambda: list(found()["item"]))),
    }


def sizes(config: Config, facts: Facts) -> Sizes:
    """Returns what reads how many users and items there are, and the unknown one."""
    known = functools.cache(lambda: ids(config, facts))

    def count(key: str) -> Size:
        number = len(known()[key])
        return Size(number + 1, f"{number:,} of {short(config.data.name)} and the unknown one")

    return {"users": lambda: count("user"), "items": lambda: count("item")}


def _names(values: np.ndarray) -> list[str]:
    return list(map(labels.as_text, np.unique(values).tolist()))


def _ids(names: Sequence[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(names, 1)}


def _numbered(values: np.ndarray, ids: Mapping[str, int]) -> np.ndarray:
    """int32 (n,): each value's id; those of unknown ones follow, so that these are told apart."""
    different, at = np.unique(values, return_inverse=True)
    names = map(labels.as_text, different.tolist())
    unknown = itertools.count(len(ids) + 1)
    each = [ids[name] if name in ids else next(unknown) for name in names]
    return np.array(each, np.int32)[at]


def _is_last(user: np.ndarray) -> np.ndarray:
    """bool (n,): which ratings, sorted by user, are the last of a user who has others."""
    new = user[1:] != user[:-1]
    return np.append(new, True) & ~np.insert(new, 0, True)


def _columns(config: Config) -> tuple[Mapping[str, np.ndarray], str]:
    """The four columns, users and items as what they are called; and a fingerprint."""
    d = config.data
    if d.name.startswith("ratings:"):
        table = delimited.read(
            d.name,
            numbers=KEYS[2:],
            only=KEYS[2:],
            required=KEYS,
            decimal=d.decimal,
            max_skipped=d.max_skipped,
            columns=d.columns,
        )
        _require(config, table.columns)
        names = {key: table.columns[key].astype(str) for key in KEYS[:2]}
        numbers = {key: table.columns[key] for key in KEYS[2:]}
        return {**names, **numbers}, f"ratings records={len(table.line)} sha256={table.digest()}"
    source = sources.open_source(d.name, d.split, d.data_dir, keys=KEYS)
    _require(config, source.features)
    columns = {key: labels.column(source, key) for key in KEYS}
    for key in KEYS[2:]:
        if len(bad := np.flatnonzero(~np.isfinite(columns[key].astype(np.float64)))):
            raise InputError(
                f"data.name={d.name!r} record {bad[0]} has {key} {columns[key][bad[0]]}, no finite number"
            )
    return columns, source.fingerprint


def _require(config: Config, there: Mapping[str, object]) -> None:
    missing = [key for key in KEYS if key not in there]
    if missing:
        raise InputError(
            f"data.name={config.data.name!r} has no column {missing[0]!r}; task.name=rank needs "
            f"{', '.join(KEYS)}, in any order, but it has {', '.join(there)}; correct it, or set data.columns"
        )


class Split:
    """One split's ratings by index."""

    def __init__(self, ratings: Ratings, test: bool) -> None:
        self._at = np.flatnonzero(ratings.is_test == test)
        self._ratings = ratings

    def __len__(self) -> int:
        return len(self._at)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        at, r = self._at[indices], self._ratings
        return {"user": r.user[at], "item": r.item[at], "rating": r.rating[at]}


def finisher(config: Config, ratings: Ratings, train: bool) -> Callable[..., Batch]:
    """-> (rows, serials) -> the batch; its negatives depend on the seed and a row's serial alone.

    No negative is a positive of its user, in evaluation of either split. In training only that split's count:
    no more is known then, and sparing the held-out item would tell the model which one it is.
    """
    assert isinstance(config.task, Rank)
    loss, task = config.task.rank_loss, config.task
    seed, count = (config.seed, task.negatives) if train else (EVAL_SEED, task.eval_negatives)
    counts = np.bincount(ratings.item[~ratings.is_test], minlength=ratings.items + 1)
    log_q = np.log(np.maximum(counts, 1) / counts.sum()).astype(np.float32)
    draws = count if loss == "binary" or not train else 0
    pairs = ratings.pairs(train)
    _check_room(config, ratings, pairs, draws, distinct=not train)
    starts, rated, widest = _rated_before(ratings)

    def finish(batch: Mapping[str, np.ndarray], serials: np.ndarray) -> Batch:
        known = np.where(batch["user"] > ratings.users, 0, batch["user"])
        out = {"user": known, "item": batch["item"]}
        if loss == "rating":
            out["rating"] = batch["rating"]
        if loss == "softmax":
            out["log_q"] = log_q[batch["item"]]
        if draws:
            draw = functools.partial(negatives, pairs, ratings.items, seed=seed, count=draws)
            out["negatives"] = draw(batch["user"], serials, distinct=not train)
        if not train and not draws:
            at = starts[batch["user"]][:, None] + np.arange(widest)
            inside = at < starts[batch["user"] + 1][:, None]
            out["seen"] = np.where(inside, rated[np.minimum(at, len(rated) - 1)], 0).astype(np.int32)
            out["known"] = np.full(len(serials), ratings.items + 1, np.int32)
        return out

    return finish


def _rated_before(ratings: Ratings) -> tuple[np.ndarray, np.ndarray, int]:
    """Training items by user: user u's are rated[starts[u] : starts[u + 1]]; and the most that one has."""
    train = ~ratings.is_test
    counts = np.bincount(ratings.user[train], minlength=int(np.max(ratings.user)) + 1)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return starts, ratings.item[train], int(np.max(counts))  # sorted by user already


def _check_room(config: Config, ratings: Ratings, pairs: np.ndarray, draws: int, distinct: bool) -> None:
    """Raises InputError where a user has rated so much that negatives are short."""
    liked = np.bincount(pairs[pairs % (ratings.items + 1) > 0] // (ratings.items + 1))
    most = int(np.max(liked))
    needed = draws if distinct else min(draws, 1)
    if draws and ratings.items - most < needed:
        key = "eval_negatives" if distinct else "negatives"
        raise InputError(
            f"task.{key} is {draws}, but a user of data.name={config.data.name!r} has rated {most} of "
            f"{ratings.items} items; lower it"
            + (", or set it to 0 to rank among all items" if distinct else "")
        )


def negatives(
    pairs: np.ndarray,
    items: int,
    user: np.ndarray,
    serials: np.ndarray,
    *,
    seed: int,
    count: int,
    distinct: bool,
) -> np.ndarray:
    """int32 [B, N]: drawn evenly among the items 1..`items` that the user did not rate.

    Args:
        pairs: what was rated, as `Ratings.pairs` gives it.
        distinct: no item twice in a row.
    """
    out = np.zeros((len(user), count), np.int32)
    open_BN, attempt = np.ones(out.shape, bool), 0
    while open_BN.any():
        row, column = np.nonzero(open_BN)
        drawn = 1 + _mixed(seed, serials[row], column, attempt) % np.uint64(items)
        out[row, column] = drawn
        pair = user[row].astype(np.int64) * (items + 1) + out[row, column]
        at = np.minimum(np.searchsorted(pairs, pair), len(pairs) - 1)
        open_BN[row, column] = pairs[at] == pair
        if distinct:
            open_BN |= _repeated(out, ~open_BN)
        attempt += 1
    return out


def _repeated(ids_BN: np.ndarray, real_BN: np.ndarray) -> np.ndarray:
    """bool [B, N]: which real ids stand further left in their row, too."""
    key = np.where(real_BN, ids_BN, -1 - np.arange(ids_BN.shape[1]))  # what is not real repeats nothing
    order = np.argsort(key, axis=1, kind="stable")
    ordered = np.take_along_axis(key, order, 1)
    same = np.concatenate([np.zeros((len(key), 1), bool), ordered[:, 1:] == ordered[:, :-1]], 1)
    out = np.zeros_like(same)
    np.put_along_axis(out, order, same, 1)
    return out


def _mixed(seed: int, serial: np.ndarray, column: np.ndarray, attempt: int) -> np.ndarray:
    """uint64: the rounds of SplitMix64 (Steele et al. 2014) over all that a draw depends on."""
    with np.errstate(over="ignore"):
        x = np.full(len(serial), NEGATIVES, np.uint64)
        for part in (np.uint64(seed), serial.astype(np.uint64), column.astype(np.uint64), np.uint64(attempt)):
            x = (x ^ part) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
    return x


def shapes(config: Config, _: Facts) -> labels.Shapes:
    """Returns the arrays of a training batch but `mask`."""
    assert isinstance(config.task, Rank)
    out: labels.Shapes = {"user": ((), np.int32), "item": ((), np.int32)}
    extra: dict[str, labels.Shapes] = {
        "binary": {"negatives": ((config.task.negatives,), np.int32)},
        "softmax": {"log_q": ((), np.float32)},
        "rating": {"rating": ((), np.float32)},
    }
    return out | extra[config.task.rank_loss]
