"""A workdir keeps what training fitted: predictions need no training data, and nothing is numbered anew."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, build, run_script, saved, tiny

from bigmodel import config as config_lib
from bigmodel import evaluate
from bigmodel.checkpoint import teachers, transfer
from bigmodel.compress import recipe, report, stages
from bigmodel.config import Config, InputError
from bigmodel.config.adapt import Distill
from bigmodel.data import Facts, fitted, ratings, tfds, tokenizers
from bigmodel.infer import export, generate, loading
from bigmodel.infer.predict import Predictor
from bigmodel.tasks import make_pipeline


def write(path: pathlib.Path, rows: list[list[Any]]) -> pathlib.Path:
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def kept(directory: pathlib.Path, config: Config) -> pathlib.Path:
    """A run that keeps its facts."""
    run = saved(directory, config)
    make_pipeline(config, "train", run, process_index=0, process_count=1).keep_facts()
    return run


def elsewhere(config: Config, name: str) -> Config:
    return config.replace(data=dataclasses.replace(config.data, name=name))


# -------------------------------------------------------------------------------------------------- tables

HEADER = ["town", "age", "plan"]
PEOPLE = [[("Rom", "Bern")[i % 2], 20 + i % 50, ("gold", "none", "silver")[i % 3]] for i in range(120)]


def table(path: pathlib.Path, rows: list[list[Any]] = PEOPLE, header: list[str] = HEADER) -> Config:
    name = f"table:{write(path, [header, *rows])}"
    keys: dict[str, Any] = {"model__rows": 128, "model__embed_width": 4, "model__num_classes": 3}
    return tiny("mlp", data__name=name, data__label="plan", batch_size=4, **keys)


def test_a_table_needs_no_training_file_after_training(tmp_path):
    config = table(tmp_path / "people.csv")
    run = kept(tmp_path / "run", config)
    asked = [{"town": "Rom", "age": "33"}, {"town": "Oslo", "age": ""}]
    before, _ = Predictor.load(run).predict(asked)
    (tmp_path / "people.csv").unlink()
    after, _ = Predictor.load(run).predict(asked)
    assert after == before
    assert set(after[0]["top"]) == {"gold", "none", "silver"}


def test_other_rows_are_encoded_and_numbered_as_the_training_rows_were(tmp_path):
    config = table(tmp_path / "people.csv")
    run = kept(tmp_path / "run", config)
    scale = fitted.read(run)["columns"]["numeric"]["age"]
    kinds = [["Oslo", 50, "silver"], ["Rom", "", "none"], ["Bern", 1000, "silver"]]  # no "gold"
    rows = [[town, age and age + i / 1000, plan] for i in range(40) for town, age, plan in kinds]
    other = elsewhere(config, f"table:{write(tmp_path / 'other.csv', [HEADER, *rows])}")
    (tmp_path / "people.csv").unlink()
    batch = make_pipeline(other, "eval", run)[0]
    assert set(batch["label"].tolist()) <= {1, 2}
    for label, numeric, town in zip(batch["label"], batch["numeric"], batch["categorical"], strict=True):
        age = numeric[0] * scale[2] + scale[1]
        expected = {50: (2, 0), 1000: (2, 1)}.get(round(float(age)), (1, 2))  # Oslo: unknown, 0
        assert (int(label), int(town[0])) == expected


@pytest.mark.parametrize(
    ("header", "row", "problem"),
    [
        (HEADER, ["Rom", 3, "bronze"], r"other\.csv line \d+ has plan 'bronze', which no"),
        (["town", "years", "plan"], ["Rom", 3, "gold"], r"'age' is missing"),
        ([*HEADER, "extra"], ["Rom", 3, "gold", 1], r"'extra' is new"),
        (HEADER, ["Rom", "old", "gold"], r"other\.csv line 2 has 'old' in 'age', a column of numbers"),
    ],
)
def test_other_data_that_disagree_are_refused_by_name(tmp_path, header, row, problem):
    config = table(tmp_path / "people.csv")
    run = kept(tmp_path / "run", config)
    rows = [[*row[:1], row[1] if isinstance(row[1], str) else row[1] + i, *row[2:]] for i in range(60)]
    other = elsewhere(config, f"table:{write(tmp_path / 'other.csv', [header, *rows])}")
    with pytest.raises(InputError, match=problem):
        make_pipeline(other, "eval", run)[0]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([row for row in PEOPLE if row[2] != "gold"], r"names of plan: 'gold' is missing"),
        ([*PEOPLE, *[["Rom", 30 + i, "bronze"] for i in range(20)]], r"names of plan: 'bronze' is new"),
    ],
)
def test_training_data_that_lost_or_gained_a_class_are_refused_by_name(tmp_path, rows, problem):
    config = table(tmp_path / "people.csv")
    run = kept(tmp_path / "run", config)
    table(tmp_path / "people.csv", rows)
    with pytest.raises(InputError, match=problem):
        make_pipeline(config, "train", run)


def test_a_column_of_digits_stays_text_where_training_saw_text(tmp_path):
    rows = [[f"{i % 7:03}" if i % 3 else "none", 20 + i % 50, ("a", "b", "c")[i % 3]] for i in range(120)]
    config = table(tmp_path / "people.csv", rows)
    run = kept(tmp_path / "run", config)
    known = fitted.read(run)["columns"]["categories"]["town"]
    other = write(tmp_path / "other.csv", [HEADER, *[["005", 30 + i, "a"] for i in range(60)]])
    batch = make_pipeline(elsewhere(config, f"table:{other}"), "eval", run)[0]
    assert (batch["categorical"] == known.index("005") + 1).all()


def test_groups_are_numbered_once_and_a_new_one_is_unknown(tmp_path):
    header, values = ["x", "site", "label"], [2**40, 0.25, 7, 2**40 + 1]
    rows = [[i % 11, values[i % 4], i % 2] for i in range(160)]
    name = f"table:{write(tmp_path / 't.csv', [header, *rows])}"
    config = tiny(
        "mlp", data__name=name, data__group="site", model__num_classes=2, batch_size=40, mesh__data=1
    )
    run = kept(tmp_path / "run", config)
    names = fitted.read(run)["names of site"]
    assert sorted(names) == sorted(["1099511627776", "0.25", "7", "1099511627777"])
    rows = [[i % 11, [7, 9.5][i % 2], i % 2] for i in range(400)]
    other = write(tmp_path / "other.csv", [header, *rows])
    batch = make_pipeline(elsewhere(config, f"table:{other}"), "eval", run)[0]
    assert set(batch["group"][batch["mask"] > 0].tolist()) == {names.index("7"), 4}


# ------------------------------------------------------------------------------------------------- ratings


def films(path: pathlib.Path, users: list[str], items: list[str]) -> Config:
    lines = [
        [user, items[(at + i) % len(items)], 1 + i, i] for at, user in enumerate(users) for i in range(5)
    ]
    write(path, [["user", "item", "rating", "timestamp"], *lines])
    changes = {"data.name": f"ratings:{path}", "model.users": 64, "model.items": 32, "batch_size": 4}
    return config_lib.load(f"{ROOT}/configs/recommender.py:kind=mf", {**changes, "optim.warmup_steps": 0})


def test_users_and_items_have_the_ids_of_training(tmp_path):
    users, items = [f"u{i:02}" for i in range(12)], [f"film {i}" for i in range(9)]
    config = films(tmp_path / "films.csv", users, items)
    run = kept(tmp_path / "run", config)
    asked = [{"user": "u03", "item": "film 2"}, {"user": "u11", "item": "film 8"}, {"user": "?", "item": "?"}]
    before, _ = Predictor.load(run).predict(asked)
    films(tmp_path / "films.csv", ["another", *users[2:]], ["a film", *items[1:]])
    found = ratings.load(config, generate.data.Facts(config, run))
    assert (found.users, found.items) == (12, 9)
    for user in users[2:]:
        assert found.names["user"][user] == users.index(user) + 1
    batches = list(make_pipeline(config, "eval", run))
    real = np.concatenate([batch["user"][batch["mask"] > 0] for batch in batches])
    assert sorted(real.tolist()) == [0, *range(3, 13)]  # the new one is the unknown one
    with pytest.raises(InputError, match=r"users: 'u00' is missing, 'another' is new and 1 more"):
        make_pipeline(config, "train", run)
    (tmp_path / "films.csv").unlink()
    assert Predictor.load(run).predict(asked)[0] == before


def test_what_an_unknown_user_rated_is_not_mixed_with_another_ones(tmp_path):
    users, items = [f"u{i}" for i in range(6)], [f"film {i}" for i in range(12)]
    config = films(tmp_path / "films.csv", users, items)
    run = kept(tmp_path / "run", config)
    films(tmp_path / "films.csv", ["x", "y"], items)
    batch = make_pipeline(config, "eval", run)[0]
    real = batch["mask"] > 0
    assert batch["user"][real].tolist() == [0, 0]
    seen = [set(row.tolist()) - {0} for row in batch["seen"][real]]
    assert [len(each) for each in seen] == [4, 4]
    assert seen[0] != seen[1]


# -------------------------------------------------------------------------------------------- texts, images


def test_labeled_texts_need_no_training_file_after_training(tmp_path):
    rows = [[f"film number {i}", ("bad", "good")[i % 2]] for i in range(80)]
    name = f"table:{write(tmp_path / 'r.csv', [['review', 'verdict'], *rows])}"
    keys = {"data__text": "review", "data__label": "verdict", "task__name": "classify"}
    config = tiny("rnn", data__name=name, model__vocab_size=300, model__num_classes=2, batch_size=4,
                  data__tokenizer="bpe:280", **keys)  # fmt: skip
    run = saved(tmp_path / "run", config)
    make_pipeline(config, "train", run).keep_facts()
    before, _ = Predictor.load(run).predict(["a film", "no film"])
    (tmp_path / "r.csv").unlink()
    assert Predictor.load(run).predict(["a film", "no film"])[0] == before
    assert before[0]["name"] in ("bad", "good")
    tokenizers.BPE.train(iter(["other words than those"] * 9), 280).save(run / "tokenizer.json")
    with pytest.raises(InputError, match=r"was trained with bpe:\d+ sha256"):
        Predictor.load(run)


def described(directory: pathlib.Path, config: Config) -> pathlib.Path:
    """A run that keeps what its dataset says of itself; no record is made or read."""
    run = saved(directory, config)
    facts = Facts(config, run)
    assert facts.features
    facts.keep()
    return run


@pytest.mark.parametrize(
    ("name", "family", "outputs"),
    [
        ("digits", "cnn", ("label", "name")),
        pytest.param("shapes", "detector", ("labels", "names"), marks=pytest.mark.slow),
    ],
)
def test_image_models_ask_no_dataset_for_names_and_shapes(tmp_path, monkeypatch, name, family, outputs):
    config = tiny(family, data__name=name, batch_size=2, mesh__data=1)
    run = described(tmp_path / "run", config)
    picture = np.random.default_rng(3).integers(0, 256, (8, 8, 1 if family == "cnn" else 3)).tolist()
    before = Predictor.load(run).predict([picture])[0]

    def gone(*_: Any) -> None:
        raise InputError("no dataset is here")

    monkeypatch.setattr(tfds, "find", gone)
    assert Predictor.load(run).predict([picture])[0] == before
    assert set(outputs) <= before[0].keys()


def test_images_of_another_kind_or_with_other_classes_are_refused(tmp_path):
    run = described(tmp_path / "run", tiny("cnn", data__name="digits", batch_size=8))
    facts = Facts(tiny("cnn", data__name="digits"), run)
    feature = facts.features
    for key, changes, problem in (
        ("image", {"shape": (10, 10, 1)}, r"column 'image' 'shape': 10 is new, 8 is missing|'shape': .*10"),
        (
            "label",
            {"names": ("no", *map(str, range(1, 10)))},
            r"column 'label' 'names': '0' is missing, 'no'",
        ),
        ("label", {"num_classes": 12}, r"column 'label' 'num_classes': was 10, now 12"),
    ):
        other = {**feature, key: dataclasses.replace(feature[key], **changes)}
        with pytest.raises(InputError, match=problem):
            facts.check(other, feature)
    facts.check(feature, feature)


def test_a_damaged_fact_is_refused(tmp_path):
    run = kept(tmp_path / "run", table(tmp_path / "people.csv"))
    path = run / fitted.FILE
    tree = json.loads(path.read_text())
    tree["names of plan"]["value"] = ["none", "gold", "silver"]
    path.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"fitted\.json: 'names of plan' is not what training wrote"):
        Predictor.load(run)
    for content in ("", "[1]", "null", '{"columns": 3}', "[" * 5000):
        path.write_text(content)
        with pytest.raises(InputError, match=r"fitted\.json cannot be read"):
            Predictor.load(run)


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        (["a", "b"], ["b"], "x: 'a' is missing"),
        (["a"], ["a", "b", "c"], "x: 'b' is new and 1 more"),
        (["a", "b"], ["b", "a"], "x: in another order"),
        ({"k": {"n": 1}}, {"k": {"n": 2}}, "x 'k' 'n': was 1, now 2"),
        ({"k": 1}, {}, "x: 'k' is missing"),
        (1, 1, ""),
    ],
)
def test_the_first_difference_is_named(was, now, words):
    assert fitted.difference(was, now, "x") == words


# --------------------------------------------------------------------------- what a run is used for later


@pytest.fixture(scope="module")
def orphan(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of a table whose file is gone."""
    folder = tmp_path_factory.mktemp("orphan")
    config = config_lib.override(table(folder / "people.csv"), {"mesh.data": 1, "batch_size": 16})
    run = kept(folder / "run", config)
    (folder / "people.csv").unlink()
    return run


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch):
    monkeypatch.setattr(report, "ROUND_S", 1e-3)
    monkeypatch.setattr(report, "ROUNDS", 2)


def test_a_run_is_compressed_and_exported_without_its_data(orphan, tmp_path, capsys):
    asked = [{"town": "Rom", "age": "33"}]
    dense = Predictor.load(orphan).predict(asked)[0][0]
    rows = stages.run(orphan, recipe.parse("quantize:int8"), tmp_path / "small")
    said = capsys.readouterr().out
    assert "the stages have no metrics, without held-out data: data.name='table:" in said
    assert [row["metrics"] for row in rows] == [{}, {}]
    small = Predictor.load(tmp_path / "small").predict(asked)[0][0]
    assert small["name"] == dense["name"]
    assert abs(small["probability"] - dense["probability"]) < 0.05
    assert fitted.read(tmp_path / "small") == fitted.read(orphan)
    assert "weights.safetensors" in export.stablehlo(orphan, tmp_path / "hlo")
    assert json.loads((tmp_path / "hlo" / "model.json").read_text())["fitted"] == fitted.read(orphan)
    transfer.export_safetensors(orphan, tmp_path / "safetensors")
    assert fitted.read(tmp_path / "safetensors") == fitted.read(orphan)
    with pytest.raises(InputError, match=r"looks at the training data \(calibration\): .* matches no file"):
        stages.run(orphan, recipe.parse("quantize:int8:gptq"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("how", ["here", pytest.param("script", marks=pytest.mark.slow)])
def test_other_data_are_evaluated_without_the_training_file(orphan, tmp_path, how):
    rows = [["Bern", 20 + i % 50 + i / 100, ("none", "silver")[i % 2]] for i in range(30)]
    other = write(tmp_path / "other.csv", [HEADER, *rows])
    flags = [f"data.name=table:{other}", "data.eval_split=all"]
    if how == "script":
        ran = run_script("evaluate.py", f"--workdir={orphan}", *(f"--config.{flag}" for flag in flags))
        assert ran.code == 0, ran.err
        accuracy = json.loads(ran.out)["accuracy"]
    else:
        program, state = loading.load(orphan)
        config = config_lib.override(program.config, flags)
        accuracy = evaluate.run(program, state, make_pipeline(config, "eval", orphan))["accuracy"]
    asked = [{"town": town, "age": str(age)} for town, age, _ in rows]
    found = [row["name"] for row in Predictor.load(orphan).predict(asked)[0]]
    share = np.mean([name == row[2] for name, row in zip(found, rows, strict=True)])
    np.testing.assert_allclose(accuracy, share, rtol=1e-6)
    with pytest.raises(InputError, match=r"people\.csv' matches no file"):
        make_pipeline(loading.load(orphan)[0].config, "eval", orphan)


def test_teachers_of_other_classes_are_refused(orphan, tmp_path):
    config = table(tmp_path / "t.csv", [[town, age, plan.upper()] for town, age, plan in PEOPLE])
    student = kept(tmp_path / "run", config)
    facts = fitted.read(orphan), fitted.read(student)
    assert fitted.disagreement(*facts).startswith("names of plan: 'gold' is missing, 'GOLD' is new")
    assert fitted.disagreement(facts[0], facts[0]) == ""
    with pytest.raises(InputError, match=r"distill\.teacher=.* predicts something else .*'gold'"):
        teachers.taught(build(config.replace(distill=Distill(teacher=str(orphan), weight=0.5))), student)


def test_all_is_every_record_and_never_trained_on(tmp_path):
    config = table(tmp_path / "t.csv")
    everything = config_lib.override(config, {"data.eval_split": "all", "eval.batches": -1})
    assert make_pipeline(everything, "eval").num_examples == len({tuple(row) for row in PEOPLE})
    with pytest.raises(InputError, match=r"data\.split=all would train on what is held out"):
        make_pipeline(config_lib.override(config, {"data.split": "all"}), "train")
