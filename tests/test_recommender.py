"""Recommenders: who is held out, negatives, metrics by hand, one device == eight, resume, learning."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, by_path, mesh_keys, steps

from bigmodel import config as config_lib
from bigmodel import evaluate, log, mesh, models, program, tasks, train
from bigmodel.config import Config, InputError
from bigmodel.data import ratings
from bigmodel.data.builders import clicks
from bigmodel.plan import estimate
from bigmodel.tasks import batch_spec, make_pipeline, rank

SGD = {"optim.name": "sgd", "optim.lr": 0.1, "optim.schedule": "constant", "optim.warmup_steps": 0}
SMALL = {
    "model.users": 64,
    "model.items": 32,
    "batch_size": 16,
    "steps": 10,
    "microbatches": 1,
    "task.top_k": 5,
}
PAIRS = ["mf", "ncf", "two_tower"]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 users, each with 6 of 20 films and a last one; columns in an order of their own."""
    rng = np.random.default_rng(0)
    lines = ["rating,timestamp,item,user"]
    for user in range(40):
        for time, item in enumerate(rng.permutation(20)[:7]):
            lines.append(
                f"{1 + (user * item) % 5},{1000 - time if user == 3 else 1000 + time},film {item},u{user}"
            )
    path = tmp_path_factory.mktemp("films") / "films.csv"
    path.write_text("\n".join([lines[0], *rng.permutation(lines[1:])]) + "\n")
    return f"ratings:{path}"


def config(kind: str, name: str = "lowrank_ratings", **keys: Any) -> Config:
    changes = {key.replace("__", "."): value for key, value in keys.items()}
    return config_lib.load(
        f"{ROOT}/configs/recommender.py:kind={kind}", {**SMALL, "data.name": name, **changes}
    )


def build(c: Config) -> program.Program:
    c = tasks.sized(c)
    size = math.prod(max(n, 1) for n in c.mesh.sizes().values())
    return program.build(c, mesh.make_mesh(c, jax.devices()[:size]), batch_spec(c))


def start(built: program.Program) -> Any:
    one = build(built.config.replace(mesh=config_lib.Mesh(data=1)))
    state = jax.device_get(one.init(jax.random.key(0)))
    return jax.device_put(state, jax.tree.map(lambda s: s.sharding, built.state_spec))


# --------------------------------------------------------------------------------------------------- data


def test_the_last_rating_of_each_user_is_held_out(films):
    found = ratings.load(config("mf", films))
    assert found.is_test.sum() == 40
    path = pathlib.Path(films.partition(":")[2])
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    users = sorted({row[3] for row in rows})
    items = sorted({row[2] for row in rows})
    for index in np.flatnonzero(found.is_test):
        mine = [row for row in rows if row[3] == users[found.user[index] - 1]]
        last = max(mine, key=lambda row: int(row[1]))
        assert items[found.item[index] - 1] == last[2]
        assert found.rating[index] == float(last[0])


def test_validation_holds_out_the_last_but_one_and_never_shows_the_last(films):
    whole, part = (ratings.load(config("mf", films, data__eval_split=s)) for s in ("test", "validation"))
    assert len(part.user) == len(whole.user) - 40
    assert part.is_test.sum() == 40
    for user in range(1, 41):
        mine = np.flatnonzero(whole.user == user)
        np.testing.assert_array_equal(part.rating[part.user == user], whole.rating[mine[:-1]])
        assert part.is_test[part.user == user].tolist() == [False] * (len(mine) - 2) + [True]
    prints = [make_pipeline(config("mf", films, data__eval_split=s), "train").fingerprint() for s in
              ("test", "validation")]  # fmt: skip
    assert prints[0] != prints[1]


def test_negatives_are_never_positives_and_depend_on_seed_and_place_alone(films):
    c = config("ncf", films, task__negatives=6)
    data, found = make_pipeline(c, "train"), ratings.load(c)
    held = found.is_test
    liked = set(zip(found.user[~held].tolist(), found.item[~held].tolist(), strict=True))
    last = set(zip(found.user[held].tolist(), found.item[held].tolist(), strict=True))
    drawn = set()
    seen = np.zeros(found.items + 1, int)
    for step in range(40):
        batch = data[step]
        for user, row in zip(batch["user"], batch["negatives"], strict=True):
            drawn |= {(user, item) for item in row.tolist()}
            seen[row] += 1
    assert not liked & drawn
    assert last & drawn  # to spare what is held out would tell which it is
    assert seen[0] == 0
    assert seen[1:].min() > 0.5 * seen[1:].mean()
    parts = [make_pipeline(c, "train", process_index=i, process_count=2)[7] for i in range(2)]
    for key, value in make_pipeline(c, "train")[7].items():
        np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)
    other = make_pipeline(config("ncf", films, task__negatives=6, seed=1), "train")[7]
    assert (other["negatives"] != data[7]["negatives"]).any()


def test_negatives_of_evaluation_are_distinct_and_the_same_for_every_seed(films):
    configs = [config("ncf", films, task__eval_negatives=12, seed=seed) for seed in (0, 1)]
    pipelines, found = [make_pipeline(c, "eval") for c in configs], ratings.load(configs[0])
    for a, b in zip(*pipelines, strict=True):
        np.testing.assert_array_equal(a["negatives"], b["negatives"])
        real = a["negatives"][a["mask"] > 0]
        assert all(len(set(row)) == 12 for row in real.tolist())
        for user, row in zip(a["user"], real, strict=False):
            assert not set(row.tolist()) & set(found.item[found.user == user].tolist())


@pytest.mark.parametrize("kind", PAIRS)
def test_the_spec_is_that_of_the_batches(films, kind):
    c = config(kind, films)
    assert make_pipeline(c, "train").spec() == batch_spec(c)


GOOD = "user,item,rating,timestamp\n" + "".join(f"{u},{i},3,{i}\n" for u in range(6) for i in range(u, u + 4))


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (GOOD.replace("timestamp", "when"), {}, r"has no column 'timestamp'.*user, item, rating, timestamp"),
        (GOOD + "1,2,good,9\n", {}, r"t\.csv line 26 has 'good' in 'rating', a column of numbers"),
        (GOOD + "1,2,,9\n", {}, r"t\.csv line 26 has no rating"),
        (GOOD + "1,2,3\n", {}, r"t\.csv line 26 has 3 cells, but the header 4"),
        (GOOD.encode() + b"\xff,2,3,4\n", {}, r"t\.csv line 26 is not UTF-8"),
        (
            GOOD,
            {"model__items": 4},
            r"model\.items is 4, but.* has \d and the unknown one; set model\.items to 128",
        ),
        (GOOD, {"model__users": 6}, r"model\.users is 6.*set model\.users to 128"),
        (GOOD, {"data__eval_split": "valid"}, r"data\.eval_split='valid': .* test or validation"),
        (GOOD, {"task__eval_negatives": 99}, r"task\.eval_negatives is 99.*set it to 0"),
        ("user,item,rating,timestamp\n1,1,3,1\n2,1,3,1\n", {}, r"nobody with two ratings"),
    ],
)
def test_bad_ratings_are_named(tmp_path, content, keys, message):
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        make_pipeline(config("ncf", f"ratings:{path}", **keys), "eval")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ metrics


def test_hits_and_gains_by_hand():
    own = jnp.array([3.0, 1.0, 2.0])
    others = jnp.array([[1.0, 2.0, 2.5, 9.0], [5.0, 6.0, 7.0, 8.0], [2.0, 1.0, 0.0, 9.0]])
    real = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]], bool)
    out = jax.jit(rank.at_k, static_argnums=3)(own, others, real, 2)
    np.testing.assert_allclose(out["hr@2"], [1, 0, 1])
    np.testing.assert_allclose(out["ndcg@2"], [1, 0, (1 + 1 / np.log2(3)) / 2], rtol=1e-6)


def test_ties_are_ranked_by_chance_and_nan_is_no_hit():
    """Scores of few values, against the mean over every order of the items that are equal."""
    rng = np.random.default_rng(0)
    scores, real = rng.integers(0, 3, (40, 7)).astype(np.float32), rng.random((40, 6)) < 0.8
    scores[:2], real[0] = 1, True
    out = jax.jit(rank.at_k, static_argnums=3)(scores[:, 0], scores[:, 1:], real, 3)
    for row in range(40):
        rivals = scores[row, 1:][real[row]]
        places = (rivals > scores[row, 0]).sum() + np.arange((rivals == scores[row, 0]).sum() + 1)
        np.testing.assert_allclose(out["hr@3"][row], (places < 3).mean(), rtol=1e-6)
        gains = np.where(places < 3, 1 / np.log2(places + 2), 0)
        np.testing.assert_allclose(out["ndcg@3"][row], gains.mean(), rtol=1e-6)
    assert out["hr@3"][0] == pytest.approx(3 / 7)  # a constant model does as well as chance
    bad = scores.copy()
    bad[:, 0] = np.nan
    assert not np.any(rank.at_k(bad[:, 0], bad[:, 1:], real, 9)["hr@9"])
    lost = jnp.full((40, 6), jnp.nan)  # others that are NaN stand before
    np.testing.assert_array_equal(rank.at_k(scores[:, 0], lost, real, 3)["hr@3"], real.sum(1) < 3)


@pytest.mark.parametrize("kind", PAIRS)
def test_ranks_among_all_items_are_those_of_a_plain_sort(films, kind):
    c = config(kind, films)
    built = build(c.replace(mesh=config_lib.Mesh(data=1)))
    state, data = start(built), make_pipeline(c, "eval")
    state["params"] = jax.tree.map(lambda p: p * 8, state["params"])  # scores that differ
    found = ratings.load(c)
    hits, gains, count = 0.0, 0.0, 0
    for batch in data:
        scores = np.asarray(built.predict(state, built.put(batch))["all"])
        assert scores.shape == (16, 32)
        for row in np.flatnonzero(batch["mask"] > 0):
            user, item = batch["user"][row], batch["item"][row]
            before = set(found.item[(found.user == user) & ~found.is_test].tolist())
            ids = [i for i in range(1, found.items + 1) if i not in before and i != item]
            place = sum(scores[row, i] > scores[row, item] for i in ids)
            hits, gains = hits + (place < 5), gains + (place < 5) / np.log2(place + 2)
            count += 1
    values = evaluate.run(built, state, data)
    assert count == 40
    assert values["hr@5"] == pytest.approx(hits / 40, abs=1e-6)
    assert values["ndcg@5"] == pytest.approx(gains / 40, abs=1e-5)
    many = build(config(kind, films, **mesh_keys({"data": 2, "fsdp": 2, "tensor": 2})))
    placed = jax.device_put(jax.device_get(state), jax.tree.map(lambda s: s.sharding, many.state_spec))
    for name, value in evaluate.run(many, placed, data).items():
        assert value == pytest.approx(values[name], rel=1e-5), name


def test_factors_start_at_the_mean_rating(films, tmp_path):
    keys = {"optim__lr": 1e-9, "optim__ema_decay": 0.9, "eval__batches": 1, "log__tensorboard": False}
    run = train.run(config("mf", films, steps=1, **keys), tmp_path)
    found = ratings.load(run.program.config)
    mean = found.rating[~found.is_test].mean()
    assert [float(run.state[part]["mean"]) for part in ("params", "ema")] == pytest.approx(
        [mean] * 2, abs=1e-5
    )
    (loss,) = (row["train/loss"] for row in log.read_metrics(tmp_path) if "train/loss" in row)
    assert loss < 2 * found.rating.var()  # not the square of the mean


def test_the_softmax_over_a_batch_by_hand():
    scores = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    batch = {"item": np.array([3, 5, 3, 7]), "log_q": np.log(np.array([0.5, 0.1, 0.5, 0.2], np.float32))}
    batch["mask"] = np.array([1, 1, 1, 0], np.float32)
    corrected = scores - batch["log_q"]
    expected = []
    for row, others in ((0, [0, 1]), (1, [0, 1, 2]), (2, [1, 2])):  # 3 is no negative of 3, row 3 is padding
        expected.append(np.log(np.exp(corrected[row, others]).sum()) - corrected[row, row])
    np.testing.assert_allclose(jax.jit(rank.in_batch)(scores, batch)[:3], expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", PAIRS)
def test_rows_of_a_table_lie_on_all_devices(kind):
    built = build(config(kind, **mesh_keys({"data": 2, "fsdp": 2, "tensor": 2})))
    rows = by_path(built.state_spec["params"])["items/rows"]
    assert rows.sharding.shard_shape(rows.shape)[0] == 32 // 8


def test_dlrm_on_a_mesh_computes_what_one_device_computes(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["town,age,kind,label"]
    lines += [f"t{rng.integers(5)},{rng.integers(80)},k{rng.integers(3)},{at % 2}" for at in range(200)]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    sgd, runs = {k.replace(".", "__"): v for k, v in SGD.items()}, []
    for keys in ({"mesh__data": 1}, mesh_keys({"data": 2, "fsdp": 2, "tensor": 2})):
        c = config("dlrm", f"table:{tmp_path}/t.csv", model__rows=32, model__widths=(16, 8), **sgd, **keys)
        built, data = build(c), make_pipeline(c, "train")
        runs.append(steps(built, start(built), 4, [data[i] for i in range(4)]))
    (a, a_rows), (b, b_rows) = runs
    for name in a_rows:
        np.testing.assert_allclose(b_rows[name], a_rows[name], rtol=1e-5, err_msg=name)
    for path, value in by_path(a["params"]).items():
        np.testing.assert_allclose(by_path(b["params"])[path], value, rtol=0, atol=2e-6, err_msg=path)


def test_dlrm_has_the_papers_size():
    """Naumov et al. 2019, section 5.2: the model of the Criteo Kaggle data has "about 540M parameters"."""
    keys = {"model.kind": "dlrm", "model.rows": 33_762_577, "model.width": 16, "model.num_classes": 1}
    keys |= {"model.bottom": (512, 256, 64), "model.widths": (512, 256), "task.name": "multilabel"}
    c = config_lib.load(f"{ROOT}/configs/recommender.py:kind=dlrm", keys)
    spec = {"numeric": jax.ShapeDtypeStruct((2, 13), np.float32)}
    spec |= {"categorical": jax.ShapeDtypeStruct((2, 26), np.int32)}
    count = estimate.parameters(models.define(c, spec).params_spec)
    sizes = [(13, 512), (512, 256), (256, 64), (64, 16), (16 + 27 * 26 // 2, 512), (512, 256), (256, 1)]
    assert count == 33_762_577 * 16 + sum(i * o + o for i, o in sizes)
    assert count == pytest.approx(540e6, rel=0.003)


@pytest.mark.slow
def test_the_best_possible_scores_of_clicks():
    """Those that the documentation tells."""
    odds, clicked = clicks.rows("test")[2:]
    chance = 1 / (1 + np.exp(-odds))
    nats = -np.where(clicked, np.log(chance), np.log1p(-chance)).mean()
    positive, negative = odds[clicked], np.sort(odds[~clicked])
    area = np.searchsorted(negative, positive).mean() / len(negative)
    assert (round(area, 3), round(nats, 4)) == (0.903, 0.0915)


def test_neumf_by_hand():
    """He et al. 2017, section 4.1: 8 factors, a tower 32 -> 16 -> 8 over two vectors of 16."""
    keys = {"model.width": 8, "model.widths": (16, 16, 8), "model.users": 6040, "model.items": 3706}
    c = config_lib.load(f"{ROOT}/configs/recommender.py:kind=ncf", keys)
    count = estimate.parameters(models.define(c, batch_spec(c)).params_spec)
    tower = (2 * 16 * 16 + 16) + (16 * 16 + 16) + (16 * 8 + 8)
    assert count == (6040 + 3706) * (8 + 16) + tower + (8 + 8)
