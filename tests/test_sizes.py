"""Sizes of a model that its data decide: taken from them, said, stored, and checked where they are set."""

from __future__ import annotations

import re

import jax
import pytest
from conftest import ROOT, tiny

from bigmodel import config as config_lib
from bigmodel import tasks, train, workdir
from bigmodel.config import InputError
from bigmodel.data.sizes import Size
from bigmodel.models import define
from bigmodel.plan import planner, target

FAST = {"eval__batches": 1, "log__tensorboard": False, "steps": 1}


def table(path, rows=80, classes=3):
    lines = ["town,age,verdict", *(f"t{n % 7},{n},{'abcdef'[n % classes]}" for n in range(rows))]
    path.write_text("\n".join(lines) + "\n")
    return f"table:{path}"


def ratings(path, users=30, items=20):
    rows = (f"u{user},i{(user + 3 * n) % items},{n % 5},{n}" for user in range(users) for n in range(9))
    path.write_text("\n".join(["user,item,rating,timestamp", *rows]) + "\n")
    return f"ratings:{path}"


@pytest.mark.parametrize(
    ("least", "value"), [(257, 264), (357, 384), (9032, 9088), (2048, 2048), (1, 8), (640, 640)]
)
def test_tables_are_cut_evenly_at_little_cost(least, value):
    assert Size(least, "").value == value
    assert Size(least, "", rounded=False).value == least


@pytest.mark.parametrize(
    ("spec", "keys", "sizes"),
    [
        ("gpt.py:size=toy", {}, {"vocab_size": 264, "num_classes": 0}),
        ("gpt.py:size=toy", {"data.tokenizer": "bpe:2048", "data.name": "text:/none"}, {"vocab_size": 2048}),
        ("gpt.py:size=124m", {}, {"vocab_size": 50_257}),
        ("bert.py", {"data.tokenizer": "bpe:2048"}, {"vocab_size": 2112}),
        ("t5.py", {}, {"vocab_size": 384}),
        ("cnn.py:data=cifar100", {}, {"num_classes": 100}),
        ("cnn.py:data=cifar100,classes=128", {}, {"num_classes": 128}),
        ("gan.py", {}, {"num_classes": 0}),
        ("recommender.py:users=64,items=32", {"data.name": "ratings:/none"}, {"users": 64, "items": 32}),
    ],
)
def test_sizes_without_the_data(spec, keys, sizes):
    config = tasks.sized(config_lib.load(f"{ROOT}/configs/{spec}", keys))
    assert {key: getattr(config.model, key) for key in sizes} == sizes
    assert tasks.sized(config) == config


def test_a_table_decides_classes_and_rows(tmp_path):
    keys = {"data.name": table(tmp_path / "t.csv"), "data.label": "verdict"}
    config = config_lib.load(f"{ROOT}/configs/mlp.py", keys)
    said: list[str] = []
    model = tasks.sized(config, say=said.append).model
    assert (model.num_classes, model.rows) == (3, 8)
    (line,) = said
    assert "model.num_classes 3 (classes of t.csv)" in line
    assert "model.rows 8 (8 categories of t.csv, each column's unknown one among them)" in line
    number = {**keys, "data.label": "age", "task.name": "regress"}
    assert tasks.sized(config_lib.override(config, number)).model.num_classes == 1
    (tmp_path / "n.csv").write_text("x,label\n" + "".join(f"{n},{n % 4}\n" for n in range(60)))
    numbers = config_lib.override(config, {"data.name": f"table:{tmp_path}/n.csv", "data.label": "label"})
    assert tasks.sized(numbers).model.num_classes == 4
    assert tasks.sized(numbers).model.rows == 0
    with pytest.raises(InputError, match=r"model\.num_classes is too small.*set it to 3"):
        tasks.make_pipeline(config_lib.override(config, {"model.num_classes": 2}), "train")


def test_ratings_decide_users_and_items(tmp_path):
    name = ratings(tmp_path / "r.csv")
    config = config_lib.load(f"{ROOT}/configs/recommender.py", {"data.name": name})
    said: list[str] = []
    model = tasks.sized(config, say=said.append).model
    assert (model.users, model.items) == (32, 24)
    assert "model.users 32 (30 of r.csv and the unknown one, rounded up to a multiple of 8)" in said[0]
    with pytest.raises(InputError, match=r"model\.items is 16, but .* has 20 and the unknown one"):
        tasks.make_pipeline(config_lib.override(config, {"model.items": 16}), "train")


def test_a_size_is_never_nothing(tmp_path):
    config = config_lib.load(f"{ROOT}/configs/gpt.py")
    with pytest.raises(InputError, match=r"model\.vocab_size.*0 makes embed/table empty.*tasks\.sized"):
        define(config, tasks.batch_spec(config))


def test_a_plan_is_of_the_program_that_a_run_trains(tmp_path, capsys):
    """The sizes are said once, stored in config.json, and those of a run stay when it goes on."""
    keys = {"data__name": table(tmp_path / "t.csv"), "data__label": "verdict", **FAST}
    config = tiny("mlp", **keys, model__num_classes=0, batch_size=8)
    spec = target.here(tuple(jax.devices()))
    result = train.run(config, tmp_path / "run")
    assert len(re.findall(r"^sizes ", capsys.readouterr().out, re.MULTILINE)) == 1
    assert planner.build(config, spec).config.model == result.program.config.model
    stored = workdir.read_config(tmp_path / "run")
    assert (stored.model.num_classes, stored.model.rows) == (3, 8)
    again = train.run(config.replace(steps=2), tmp_path / "run")
    assert again.step == 2
    assert "sizes" not in capsys.readouterr().out


def test_sizes_of_a_run_that_set_them_stay(tmp_path):
    keys = {"data__name": table(tmp_path / "t.csv"), "data__label": "verdict", **FAST}
    config = tiny("mlp", **keys, model__num_classes=7, model__rows=40, batch_size=8)
    train.run(config, tmp_path / "run")
    open_again = config_lib.override(config, {"model.num_classes": 0, "model.rows": 0, "steps": 2})
    model = train.run(open_again, tmp_path / "run").program.config.model
    assert (model.num_classes, model.rows) == (7, 40)


def test_a_run_is_not_resumed_on_other_classes(tmp_path):
    keys = {"data__name": table(tmp_path / "t.csv"), "data__label": "verdict", **FAST}
    config = tiny("mlp", **keys, model__num_classes=0, batch_size=8)
    train.run(config, tmp_path / "run")
    table(tmp_path / "t.csv", classes=4)
    with pytest.raises(InputError, match=r"is not what .* was trained on: names of verdict: 'd' is new"):
        train.run(config.replace(steps=2), tmp_path / "run")


def test_an_earlier_start_that_saved_nothing_decides_nothing(tmp_path):
    keys = {"data__name": table(tmp_path / "t.csv"), "data__label": "verdict", **FAST}
    config = tiny("mlp", **keys, model__num_classes=0, batch_size=8)
    (tmp_path / "run").mkdir()
    workdir.write_config(tmp_path / "run", config_lib.override(config, {"model.num_classes": 7}))
    assert train.run(config, tmp_path / "run").program.config.model.num_classes == 3
