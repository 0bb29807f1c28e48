"""scripts/predict.py on files, as each kind of model reads them: right, resumable, and strict."""

from __future__ import annotations

import base64
import json
import pathlib
from collections.abc import Callable
from typing import Any

import cv2
import jax
import numpy as np
import pytest
from conftest import ROOT, batch_spec, run_script, saved, tiny

from bigmodel import config as config_lib
from bigmodel import mesh, program
from bigmodel.config import Config, InputError
from bigmodel.data import ratings, tables, transforms
from bigmodel.infer import loading, predict
from bigmodel.infer.predict import Predictor
from bigmodel.program import Program, State

Rows = list[dict[str, Any]]
Case = tuple[Config, list[list[Any]], Callable[[Program, State, Rows], None]]


def write(path: pathlib.Path, rows: list[list[Any]]) -> pathlib.Path:
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def image(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


# Each case: a config, the CSV's rows below its header, and what its predictions must be.


def recommender(folder: pathlib.Path) -> Case:
    lines = [[f"u{u}", f"film {(u + i) % 9}", 1 + u * i % 5, i] for u in range(12) for i in range(5)]
    films = write(folder / "films.csv", [["user", "item", "rating", "timestamp"], *lines])
    changes = {"data.name": f"ratings:{films}", "model.users": 64, "model.items": 32, "batch_size": 4}
    config = config_lib.load(f"{ROOT}/configs/recommender.py:kind=mf", {**changes, "optim.warmup_steps": 0})

    def check(built: Program, state: State, rows: Rows) -> None:
        split = ratings.Split(ratings.load(config), test=False).read(np.arange(60 - 12))
        at = [int(np.flatnonzero((split["user"] == 1) & (split["item"] == 1))[0])]
        batch = {key: np.resize(split[key][at], 4) for key in ("user", "item", "rating")}
        batch["mask"] = np.ones(4, np.float32)
        own = jax.device_get(built.predict(state, built.put(batch)))["scores"][0, 0]
        np.testing.assert_allclose(rows[0]["score"], own, rtol=1e-5)
        assert len({row["score"] for row in rows}) > 3
        assert [row["known"] for row in rows] == [True, True, True, False, False]

    pairs = [["u0", "film 0"], ["u1", "film 3"], ["u7", "film 0"], ["nobody", "film 0"], ["u0", "nothing"]]
    return config, [["user", "item"], *pairs], check


def table(folder: pathlib.Path) -> Case:
    rng = np.random.default_rng(0)
    people = [[rng.choice(["Rom", "Bern"]), rng.choice(["", "7", "40"]), int(i % 3)] for i in range(40)]
    name = f"table:{write(folder / 'people.csv', [['town', 'age', 'kind'], *people])}"
    keys: dict[str, Any] = {"data__label": "kind", "model__rows": 128, "model__embed_width": 4}
    config = tiny("mlp", data__name=name, model__num_classes=3, batch_size=4, **keys)

    def check(built: Program, state: State, rows: Rows) -> None:
        columns = tables.fitted(config, None)
        ages = np.array([float(p[1] or "nan") for p in people[:4]])
        raw = {"town": np.array([p[0] for p in people[:4]], object), "age": ages}
        batch = {**columns.encode(raw), "label": np.zeros(4, np.int32), "mask": np.ones(4, np.float32)}
        logits = jax.device_get(built.predict(state, built.put(batch)))["output"]
        assert [row["label"] for row in rows[:4]] == logits.argmax(1).tolist()
        share = np.exp(logits).max(1) / np.exp(logits).sum(1)
        np.testing.assert_allclose([row["probability"] for row in rows[:4]], share, rtol=1e-5)

    return config, [["age", "town"], *[[age, town] for town, age, _ in people[:6]]], check


def detector(folder: pathlib.Path) -> Case:
    small = image(1, 32, 32)
    for name, picture in (("a", small), ("b", small.repeat(2, 0).repeat(2, 1)), ("c", image(2, 20, 32))):
        cv2.imwrite(str(folder / f"{name}.png"), picture)
    config = tiny("detector", batch_size=2, task__least_score=1e-6)

    def check(built: Program, state: State, rows: Rows) -> None:
        a, b, c = (np.array(row["boxes"]) for row in rows)
        assert len(a) > 3
        assert rows[0]["labels"] == rows[1]["labels"]
        np.testing.assert_allclose(b, 2 * a, atol=0.03)  # the same picture, twice as large
        assert (c <= [20, 32, 20, 32]).all()
        assert c.max() > 20
        assert rows[0]["scores"] == sorted(rows[0]["scores"], reverse=True)

    return config, [["image"], ["a.png"], ["b.png"], ["c.png"]], check


def encoder(folder: pathlib.Path) -> Case:
    config = tiny("bert", model__vocab_size=264, batch_size=2, seq_len=16)

    def check(built: Program, state: State, rows: Rows) -> None:
        vectors = np.array([row["embedding"] for row in rows])
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(vectors[0], vectors[2], rtol=1e-5)
        assert np.abs(vectors[0] - vectors[1]).max() > 0.01

    return config, [["text"], ["one"], ["two and more"], ["one"]], check


def gan(folder: pathlib.Path) -> Case:
    config = tiny("gan", batch_size=2)

    def check(built: Program, state: State, rows: Rows) -> None:
        spec = built.batch_spec
        batch = {key: np.zeros(s.shape, s.dtype) for key, s in spec.items()}
        batch |= {"serial": np.array([7, 3], np.int32), "mask": np.ones(2, np.float32)}
        fakes = jax.device_get(built.predict(state, built.put(batch)))["fake"]
        for row, fake in zip(rows[:2], fakes, strict=True):
            png = np.frombuffer(base64.b64decode(row["image"]), np.uint8)
            drawn = cv2.imdecode(png, cv2.IMREAD_UNCHANGED)
            assert np.abs(drawn - (fake[..., 0] + 1) * 127.5).max() <= 0.51
        assert rows[0]["image"] == rows[2]["image"]

    return config, [["serial"], [7], [3], [7]], check


def classifier(folder: pathlib.Path) -> Case:
    for index in range(5):
        cv2.imwrite(str(folder / f"{index}.png"), image(index)[..., 0])
    config = tiny("cnn", data__name="digits", batch_size=2)

    def check(built: Program, state: State, rows: Rows) -> None:
        images = np.stack([image(index) for index in range(2)])[..., :1]
        d = config.data
        batch = transforms.normalize({"image": images}, d.mean, d.std)
        batch |= {"label": np.zeros(2, np.int32), "mask": np.ones(2, np.float32)}
        logits = jax.device_get(built.predict(state, built.put(batch)))["output"]
        assert [row["label"] for row in rows[:2]] == logits.argmax(1).tolist()

    return config, [["image"], *[[f"{index}.png"] for index in range(5)]], check


@pytest.mark.slow
@pytest.mark.parametrize("case", [recommender, table, detector, encoder, gan, classifier])
def test_a_file_is_predicted_and_gone_on_with(case, tmp_path):
    config, lines, check = case(tmp_path)
    run = saved(tmp_path / "run", config)
    inputs, out = write(tmp_path / "inputs.csv", lines), tmp_path / "out.jsonl"
    flags = [f"--workdir={run}", f"--inputs={inputs}", f"--out={out}"]
    ran = run_script("predict.py", *flags)
    assert ran.code == 0, ran.err
    whole = out.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    names = [line[0] if lines[0] == ["image"] else index for index, line in enumerate(lines[1:])]
    assert [row["input"] for row in rows] == names
    check(*loading.load(run), rows)
    out.write_text(whole[: len(whole) // 2])  # cut short within a line
    assert f"of {len(rows)} in" in run_script("predict.py", *flags).out
    assert [json.loads(line).keys() for line in out.read_text().splitlines()] == [r.keys() for r in rows]
    write(inputs, [["nothing"], [1]])  # no column that the model reads
    before = out.read_text()
    ran = run_script("predict.py", f"--workdir={run}", f"--inputs={inputs}", f"--out={tmp_path}/new.jsonl")
    assert (ran.code, ran.err.count("\n"), ran.err[:6]) == (2, 1, "error:")
    assert "input 0: " in ran.err
    ran = run_script("predict.py", *flags)
    assert (ran.code, ran.err.count("\n"), out.read_text()) == (2, 1, before)


@pytest.mark.slow
def test_a_directory_of_images_is_searched_through(tmp_path):
    run = saved(tmp_path / "run", tiny("cnn", data__name="digits", batch_size=4))
    (tmp_path / "images" / "more").mkdir(parents=True)
    for index in range(6):
        folder = tmp_path / "images" / ("more" if index % 2 else "")
        cv2.imwrite(str(folder / f"{index}.png"), image(index)[..., 0])
    out = tmp_path / "out.jsonl"
    flags = [f"--workdir={run}", f"--inputs={tmp_path}/images", f"--out={out}"]
    ran = run_script("predict.py", *flags)
    assert ran.code == 0, ran.err
    whole = out.read_text()
    assert len(whole.splitlines()) == 6
    assert json.loads(whole.splitlines()[0])["input"] == "0.png"
    (tmp_path / "images" / "0.png").rename(tmp_path / "images" / "9.png")
    ran = run_script("predict.py", *flags)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "predictions for other inputs" in ran.err
    assert out.read_text() == whole
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    ran = run_script("predict.py", *flags[:2], f"--out={tmp_path}/new.jsonl")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "no image that can be decoded" in ran.err


def test_a_model_that_writes_text_is_refused():
    config = tiny("gpt")
    built = program.build(config, mesh.make_mesh(config, jax.devices()[:1]), batch_spec(config))
    with pytest.raises(InputError, match=r"writes text; use scripts/generate\.py"):
        Predictor(built, {"params": {}, "rest": {}})


@pytest.mark.parametrize("kind", ["mf", "ncf", "two_tower"])
def test_the_top_items_are_those_of_scoring_each(kind, tmp_path):
    lines = [[f"u{u}", f"film {(u * i) % 11}", 1 + u * i % 5, i] for u in range(12) for i in range(6)]
    films = write(tmp_path / "films.csv", [["user", "item", "rating", "timestamp"], *lines])
    changes = {"data.name": f"ratings:{films}", "model.users": 64, "model.items": 32, "batch_size": 4}
    config = config_lib.load(f"{ROOT}/configs/recommender.py:kind={kind}", changes)
    run = saved(tmp_path / "run", config)
    predictor = Predictor.load(run)
    assert predictor.ids is not None
    names = list(predictor.ids["item"])
    rows, _ = predictor.predict([{"user": "u7", "item": name} for name in names])
    each = {name: row["score"] for name, row in zip(names, rows, strict=True)}
    order = sorted(names, key=lambda name: -each[name])
    found = predictor.top("u7", 5)
    assert [row["item"] for row in found] == order[:5]
    np.testing.assert_allclose([row["score"] for row in found], [each[name] for name in order[:5]], atol=1e-5)
    rated = predict.rated(config, run, "u7")
    mine = {line[1] for line in lines if line[0] == "u7" and line[3] < 5}  # the last one is held out
    assert {names[at - 1] for at in rated} == mine
    found = predictor.top("u7", 99, rated)
    assert [row["item"] for row in found] == [name for name in order if name not in mine]
    with pytest.raises(InputError, match="--user=u99 is not among the training ratings"):
        predictor.top("u99", 5)


def test_users_and_images_have_the_names_that_training_takes(tmp_path):
    path = write(tmp_path / "pairs.csv", [["userId", "movieId", "note"], ["u1", "film 3", "x"]])
    assert script().inputs_of(path, ids=("user", "item")) == [
        (0, {"user": "u1", "item": "film 3", "note": "x"}),
    ]  # fmt: skip
    path = write(tmp_path / "images.csv", [["path", "label"], ["a/1.png", "rose"]])
    assert script().inputs_of(path) == [("a/1.png", tmp_path / "a/1.png")]


@pytest.mark.slow
def test_the_script_gives_top_items_and_carries_columns(tmp_path):
    config, lines, _ = recommender(tmp_path)
    run = saved(tmp_path / "run", config)
    ran = run_script("predict.py", f"--workdir={run}", "--top=3", "--user=u1", "--include-rated")
    assert ran.code == 0, ran.err
    assert len([json.loads(line)["item"] for line in ran.out.splitlines()]) == 3
    lines = [[*line, note] for line, note in zip(lines, ["id", "007", "1e5", "x", "y", "z"], strict=True)]
    flags = [f"--workdir={run}", f"--inputs={write(tmp_path / 'in.csv', lines)}", f"--out={tmp_path}/out"]
    assert run_script("predict.py", *flags, "--keep=id,user").code == 0
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [row["row"] for row in rows][:2] == [{"id": "007", "user": "u0"}, {"id": "1e5", "user": "u1"}]
    for wrong in (["--keep=nothing"], ["--top=3"]):
        ran = run_script("predict.py", *flags, *wrong)
        assert (ran.code, ran.err.count("\n")) == (2, 1)


# ------------------------------------------------------------------------------------- as training reads it


PEOPLE = [["town", "age", "kind"]] + [
    [("Rom", "Bern", "Oslo")[i % 3], ["", 7.5, 40, 1234.5][i % 4], "abc"[i % 3]] for i in range(48)
]


def people(folder: pathlib.Path, **keys: Any) -> Predictor:
    given = {"data__label": "kind", "model__rows": 128, "model__embed_width": 4, "model__num_classes": 3}
    name = f"table:{write(folder / 'people.csv', PEOPLE)}"
    return Predictor.load(saved(folder / "run", tiny("mlp", data__name=name, batch_size=4, **given, **keys)))


def as_file(rows: list[list[Any]], delimiter: str, decimal: str, bom: bool, gap: str, missing: str) -> bytes:
    def cell(value: Any) -> str:
        text = str(value).replace(".", decimal) if isinstance(value, float) else str(value) or missing
        return f'"{text}"' if delimiter in text else text

    lines = [f"{delimiter}{gap}".join(map(cell, row)) for row in rows]
    return (b"\xef\xbb\xbf" if bom else b"") + "\n".join(lines).encode()


def test_a_file_is_predicted_however_it_is_written(tmp_path):
    predictor = people(tmp_path)
    assert predictor.columns is not None
    numbers = tuple(predictor.columns.numeric)
    path, rows = tmp_path / "inputs.csv", PEOPLE[:9]
    expected, _ = predictor.predict(
        [{"town": town, "age": age if age != "" else None} for town, age, _ in rows[1:]]
    )
    assert len({row["probability"] for row in expected}) > 3
    for delimiter, decimal, bom, gap, missing in [
        (",", ".", False, "", ""), (";", ",", True, "", "NA"), ("\t", ".", True, " ", "null"),
        ("\t", ",", False, "", "?"), (",", ".", False, " ", "nan"),
    ]:  # fmt: skip
        path.write_bytes(as_file(rows, delimiter, decimal, bom, gap, missing))
        inputs = [row for _, row in script().inputs_of(path, numbers)]
        assert predictor.predict(inputs)[0] == expected, (delimiter, decimal, bom, gap, missing)
    lines = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    records = [line | {"age": None if line["age"] == "" else line["age"]} for line in lines]
    path = tmp_path / "inputs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert predictor.predict([row for _, row in script().inputs_of(path, numbers)])[0] == expected
    path.write_text("".join(json.dumps({"Years" if k == "age" else k: v for k, v in record.items()}) + "\n"
                            for record in records))  # fmt: skip
    renamed = script().inputs_of(path, numbers, columns=["age:Years", "kind:class"])
    assert predictor.predict([row for _, row in renamed])[0] == expected
    path = tmp_path / "inputs.csv"
    other_order = [[row[2], row[1], "carried", row[0]] for row in rows]
    other_order[0][2] = "note"
    path.write_bytes(as_file(other_order, ",", ".", False, "", ""))
    assert predictor.predict([row for _, row in script().inputs_of(path, numbers)])[0] == expected


def script() -> Any:
    import importlib.util
    import sys

    sys.path.insert(0, f"{ROOT}/scripts")
    try:
        spec = importlib.util.spec_from_file_location("predict_script", f"{ROOT}/scripts/predict.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return people(tmp_path_factory.mktemp("people"))


@pytest.mark.parametrize(
    ("age", "message"),
    [
        ("1_000", "is '1_000', no number"), ("12%", "no number"), ("\u0663", "no number"),
        ("0,5", "no number"), ("1,234", "no number"),
        ("infinity", "no number"), (float("inf"), "no finite number"), (True, "is True, no number"),
        (1e39, "more than float32 holds"), ("1e300", "more than float32 holds"), ([3], "no number"),
        (3e38, None), ("9007199254740993", None), (None, None), ("NA", None), (float("nan"), None),
    ],
)  # fmt: skip
def test_a_number_is_read_exactly_or_refused(trained, age, message):
    rows = [{"town": "Rom", "age": 7.5}, {"town": "Rom", "age": age}]
    if message is None:
        assert np.isfinite(trained.predict(rows)[0][1]["probability"])
        return
    with pytest.raises(InputError, match=r"^input 1: age is ") as caught:
        trained.predict(rows)
    assert message in str(caught.value)


def test_bad_rows_of_a_file_are_named_by_line(tmp_path):
    path = tmp_path / "inputs.csv"
    for content, message in (
        ("town,age\nRom,3\nRom,young\n", r"inputs\.csv line 3 has 'young' in 'age'.*; correct it$"),
        ("town,age\nRom,3\nRom\n", r"inputs\.csv line 3 has 1 cells, but the header 2; correct it$"),
        ("town,age\nRom,1e39\n", r"inputs\.csv line 2 has '1e39' in 'age'.*float32"),
        ("town,age\n", "no rows after its header"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            script().inputs_of(path, ("age",))
    path.write_text('town,age\n"Ro\nm",3\n,\nOslo,\n')
    rows = script().inputs_of(path, ("age",))
    assert [(name, row["town"]) for name, row in rows] == [(0, "Ro\nm"), (1, ""), (2, "Oslo")]
    assert script().located(path, 1, "input 1: no") == f"{path} line 5: input 2: no"


def test_a_text_has_the_name_that_training_gave_it(tmp_path):
    path = write(tmp_path / "t.csv", [["review", "label"], *[[f"film {i}", "ab"[i % 2]] for i in range(40)]])
    keys = {"data__name": f"table:{path}", "data__text": "review", "task__name": "classify", "batch_size": 4}
    config = tiny("rnn", **keys, model__vocab_size=264, model__num_classes=2)
    predictor = Predictor.load(saved(tmp_path / "run", config))
    named, plain, alone = ({"review": "film 3"}, {"text": "film 3"}, "film 3")
    rows, _ = predictor.predict([named, plain, alone])
    assert rows[0] == rows[1] == rows[2]
    with pytest.raises(
        InputError, match="input 0: a text is needed, or a row with a column `text` or `review`"
    ):
        predictor.predict([{"body": "film 3"}])
