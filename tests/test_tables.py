"""Tables and labeled texts from files: fitted on training rows, balanced, and what is wrong with them."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from conftest import by_path, mesh_keys, steps, tiny
from sklearn import metrics as sk

from bigmodel import evaluate, mesh, program, train
from bigmodel.config import Config, InputError
from bigmodel.data import delimited, fitted, labels, tables
from bigmodel.tasks import batch_spec, class_names, make_pipeline
from bigmodel.tasks.base import ReportTo
from bigmodel.tasks.labels import softmax

SGD = {"optim__name": "sgd", "optim__lr": 0.1, "optim__schedule": "constant"}


def write(path: pathlib.Path, rows: list[list[Any]], delimiter: str = ",") -> str:
    path.write_text("".join(delimiter.join(map(str, row)) + "\n" for row in rows))
    return f"table:{path}"


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,200 rows; one in twelve bought, which age and town decide; a fifth of the ages is missing."""
    rng = np.random.default_rng(0)
    rows: list[list[Any]] = [["town", "age", "bought", "zip", "spent"]]
    for _ in range(1200):
        town, age = rng.choice(["Rom", "Bern", "Oslo"]), int(rng.integers(18, 80))
        bought = int(age > 60 and town == "Rom")
        shown = "" if rng.random() < 0.2 else age
        rows.append(
            [town, shown, bought, 1000 + int(rng.integers(5)), 1000 + 10 * age + (town == "Rom") * 300]
        )
    return write(tmp_path_factory.mktemp("people") / "people.csv", rows)


def config(name: str, **keys: Any) -> Config:
    given = {"data__name": name, "data__label": "bought", "data__ignore": ("spent",), "model__rows": 128}
    given |= {
        "data__categorical": ("zip",),
        "model__num_classes": 2,
        "model__embed_width": 4,
        "batch_size": 32,
    }
    return tiny("mlp", **{**given, **keys})


def build(c: Config) -> program.Program:
    devices = jax.devices()[: max(c.mesh.data, 1) * c.mesh.fsdp * c.mesh.tensor]
    return program.build(c, mesh.make_mesh(c, devices), batch_spec(c))


def test_a_batch_by_hand(people):
    c = config(people)
    train_rows = make_pipeline(c, "train")
    assert train_rows.spec() == batch_spec(c)
    source = labels.open_split(c, "train")
    raw = source.read(np.arange(len(source)))
    columns = tables.fit(c, source)
    assert list(columns.numeric) == ["age"]
    assert columns.categories == {
        "town": ["Bern", "Oslo", "Rom"],
        "zip": ["1000", "1001", "1002", "1003", "1004"],
    }
    age = raw["age"]
    filled = np.where(np.isnan(age), np.nanmedian(age), age)
    batch, at = train_rows[3], train_rows.indices(3)
    np.testing.assert_allclose(
        batch["numeric"][:, 0], ((filled - filled.mean()) / filled.std())[at], rtol=1e-5
    )
    for row, index in enumerate(at):
        town, code = raw["town"][index].decode(), raw["zip"][index].decode()
        expected = [1 + columns.categories["town"].index(town), 5 + columns.categories["zip"].index(code)]
        assert batch["categorical"][row].tolist() == expected
        assert batch["label"][row] == raw["bought"][index]


def test_splits_part_the_rows_by_content_and_evaluation_loses_none(people):
    c = config(people)
    rows = {split: labels.open_split(c, split) for split in ("train", "test")}
    assert sum(map(len, rows.values())) == 1200
    assert 0.06 < len(rows["test"]) / 1200 < 0.14
    held_out = make_pipeline(c, "eval")
    assert sum(batch["mask"].sum() for batch in held_out) == len(rows["test"])


def test_hosts_read_their_rows_of_the_same_batch(people):
    c = config(people, data__balance="sqrt")
    whole = make_pipeline(c, "train")[5]
    parts = [make_pipeline(c, "train", process_index=i, process_count=2)[5] for i in range(2)]
    for key, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)


def test_what_is_not_known_gets_the_unknown_id_and_statistics_are_of_training_rows(tmp_path):
    rows: list[list[Any]] = [["split", "kind", "size", "label"]]
    rows += [["train", kind, size, size % 2] for kind, size in zip("aabbbc" * 8, range(48), strict=True)]
    rows += [["test", kind, size, 1] for kind, size in (("a", 1e6), ("new", 0), ("c", ""))]
    rows += [["train", "once", 3, 0]]
    c = config(write(tmp_path / "t.csv", rows), data__label="label", data__ignore=(), data__categorical=())
    columns = tables.fit(c, labels.open_split(c, "train"))
    assert columns.categories == {"kind": ["a", "b", "c"]}  # "once" is rarer than data.min_count
    assert columns.numeric["size"][0] < 48
    batch = make_pipeline(c, "eval")[0]
    assert batch["categorical"][:3, 0].tolist() == [1, 0, 3]
    fill, mean, deviation = columns.numeric["size"]
    np.testing.assert_allclose(
        batch["numeric"][:3, 0], (np.array([1e6, 0, fill]) - mean) / deviation, rtol=1e-5
    )


def test_rare_classes_are_drawn_or_weighed_more(people):
    share = make_pipeline(config(people, batch_size=512), "train")[0]["label"].mean()
    assert share < 0.2
    for balance in ("balanced", "over", "under"):
        drawn = make_pipeline(config(people, batch_size=32, data__balance=balance), "train")
        even = np.mean([drawn[step]["label"].mean() for step in range(16)])
        assert even == pytest.approx(0.5, abs=0.1), balance
    weighed = make_pipeline(config(people, batch_size=512, task__class_weights="balanced"), "train")[0]
    assert (weighed["weight"][weighed["label"] == 1] > 2).all()
    assert (weighed["weight"][weighed["label"] == 0] < 1).all()


@pytest.mark.parametrize(
    "axes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_mesh_computes_what_one_device_computes(people, axes):
    runs = []
    for keys in ({"mesh__data": 1}, mesh_keys(axes)):
        built = build(config(people, **SGD, **keys))
        data = make_pipeline(built.config, "train")
        runs.append(steps(built, start_on(built), 5, [data[i] for i in range(5)]))
        rows = by_path(runs[-1][0]["params"])["table/embed/rows"]
        assert rows.sharding.shard_shape(rows.shape)[0] == 128 // built.mesh.size
    (a, a_rows), (b, b_rows) = runs
    for name in a_rows:
        np.testing.assert_allclose(b_rows[name], a_rows[name], rtol=5e-6, err_msg=name)
    for path, value in by_path(a["params"]).items():
        np.testing.assert_allclose(by_path(b["params"])[path], value, rtol=0, atol=2e-6, err_msg=path)


def start_on(built: program.Program) -> Any:
    one = build(built.config.replace(mesh=type(built.config.mesh)(data=1)))
    state = jax.device_get(one.init(jax.random.key(0)))
    return jax.device_put(state, jax.tree.map(lambda s: s.sharding, built.state_spec))


def test_a_classifier_of_rows_learns_and_its_groups_are_compared(people, tmp_path):
    keys = {"steps": 120, "optim__lr": 1e-2, "eval__every_steps": 120, "data__group": "town"}
    keys |= {"task__loss": "focal", "checkpoint__best": "eval/test/average_precision"}
    c = config(people, checkpoint__every_steps=120, log__tensorboard=False, **keys)
    run = train.run(c, tmp_path / "run")
    held_out = make_pipeline(c, "eval", tmp_path / "run")
    built = program.build(c, mesh.make_mesh(c), batch_spec(c))
    values = evaluate.run(built, run.state, held_out)
    assert values["accuracy"] > 0.93
    examples = evaluate.collect(built, run.state, held_out)
    score, is_1 = examples["output"][:, 1] - examples["output"][:, 0], examples["label"] == 1
    assert len(score) % c.batch_size  # the last batch is padded
    assert values["roc_auc"] == pytest.approx(sk.roc_auc_score(is_1, score), abs=1e-9)
    assert values["average_precision"] == pytest.approx(sk.average_precision_score(is_1, score), abs=1e-9)
    assert values["nll"] == pytest.approx(sk.log_loss(is_1, softmax(examples["output"])), rel=1e-5)
    assert run.best_step == 120
    assert run.metrics["eval/test/roc_auc"] == values["roc_auc"]
    to = ReportTo(tmp_path / "out", groups=["Bern", "Oslo", "Rom"], where=held_out.where)
    report = evaluate.report(built, examples, to)
    lines = pathlib.Path(people.partition(":")[2]).read_text().splitlines()
    for row in report["mistakes"]:
        path, _, number = row["where"].partition(" line ")
        assert path == people.partition(":")[2]
        assert lines[int(number) - 1].split(",")[2] == row["label"]
    assert (tmp_path / "out" / "groups.png").exists()
    assert report["roc_auc"]["macro"] > 0.95
    assert {row["group"] for row in report["gaps"]["groups"]} == {"Bern", "Oslo", "Rom"}
    assert report["gaps"]["demographic_parity"] > 0.1  # only one town buys
    assert report["gaps"]["between"]["demographic_parity"]["highest"] == "Rom"
    assert report["calibration"]["of"] == "P(1)"
    assert sum(report["calibration"]["count"]) == len(is_1)
    assert max(row["recall"] for row in report["cuts"]) > 0.9
    facts = fitted.read(tmp_path / "run")
    assert list(facts["columns"]["numeric"]) == ["age"]
    assert facts["names of town"] == ["Bern", "Oslo", "Rom"]


def test_a_metric_over_all_examples_is_known_before_the_first_step(people, tmp_path):
    with pytest.raises(InputError, match=r"eval/test/auc is no metric .*eval/test/average_precision"):
        train.run(config(people, checkpoint__best="eval/test/auc"), tmp_path / "run")


@pytest.mark.slow
def test_a_number_is_learned_in_its_own_unit(people, tmp_path):
    keys = {"task__name": "regress", "data__label": "spent", "data__ignore": ("bought",), "steps": 150}
    c = config(people, model__num_classes=1, mesh__data=1, optim__lr=1e-2, **keys)
    built = build(c)
    data = make_pipeline(c, "train")
    batch = data[0]
    assert abs(batch["label"].mean()) < 1
    state, _ = steps(built, start_on(built), 150, [data[i] for i in range(30)])
    examples = evaluate.collect(built, state, make_pipeline(c, "eval"))
    report = evaluate.report(built, examples, ReportTo(tmp_path))
    truth = labels.open_split(c, "test").read(np.arange(50))["spent"]
    np.testing.assert_allclose(examples["label"][:50, 0], truth, rtol=1e-5)
    assert report["r2"] > 0.7
    assert 5 < report["mae"] < 150


# ------------------------------------------------------------------------------------------------- texts


def test_texts_with_classes_by_name(tmp_path):
    rows = [["review", "verdict"]] + [[f"{word} film {i}", kind] for i in range(60) for word, kind in WORDS]
    name = write(tmp_path / "reviews.tsv", rows, "\t")
    keys = {"data__name": name, "data__text": "review", "data__label": "verdict", "task__name": "classify"}
    c = tiny(
        "rnn", **keys, model__vocab_size=264, model__num_classes=3, batch_size=16, data__balance="balanced"
    )
    assert class_names(c) == ("bad", "fine", "good")
    data = make_pipeline(c, "train")
    assert data.spec() == batch_spec(c)
    batch, source = data[0], labels.open_split(c, "train")
    texts = source.read(data.indices(0))
    for row, (text, kind) in enumerate(zip(texts["review"], texts["verdict"], strict=True)):
        ids = batch["tokens"][row]
        assert ids[0] == 256  # as before any document of a language model
        cut = bytes(text[:14])
        assert bytes(ids[1 : 1 + len(cut)].tolist()) == cut
        assert ids[1 + len(cut)] == 256
        assert batch["segments"][row].sum() == len(cut) + 2
        assert ("bad", "fine", "good")[batch["label"][row]] == kind.decode()


WORDS = [("awful", "bad"), ("nice", "good"), ("so-so", "fine"), ("great", "good")]


@pytest.mark.slow
def test_an_rnn_tells_texts_apart(tmp_path):
    rows = [["text", "label"]] + [[f"a {word} film {i}", kind] for i in range(60) for word, kind in WORDS]
    keys = {"data__name": write(tmp_path / "r.csv", rows), "task__name": "classify", "seq_len": 24}
    c = tiny(
        "rnn", **keys, model__vocab_size=264, model__num_classes=3, batch_size=16, optim__lr=1e-2, steps=150
    )
    built = build(c.replace(mesh=type(c.mesh)(data=1)))
    data = make_pipeline(c, "train")
    state, _ = steps(built, start_on(built), 150, [data[i] for i in range(150)])
    assert evaluate.run(built, state, make_pipeline(c, "eval"))["accuracy"] > 0.95


# ----------------------------------------------------------------------------------------- what is wrong


GOOD = "town,age,bought\n" + "Rom,30,0\nOslo,41,1\n" * 30


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (GOOD + "Rom,young,1\n", {}, r"t\.csv line 62 has 'young' in 'age', a column of numbers.*categ"),
        (GOOD + "Rom,3\n", {}, r"t\.csv line 62 has 2 cells, but the header 3; .*data\.max_skipped"),
        (GOOD.encode() + b"R\xffm,3,1\n", {}, r"t\.csv line 62 is not UTF-8 text"),
        (GOOD + 'Rom,"3,1\n', {}, r"t\.csv line \d+ is no row of a CSV file"),
        (GOOD + "Rom,inf,1\n", {}, r"line 62 has 'inf' in 'age'"),
        ("town,town,bought\nRom,3,1\n", {}, r"line 1 is no header of different names"),
        ("town,age,bought\n", {}, r"has no rows after its header"),
        (GOOD, {"data__label": "sold"}, r"has no feature 'sold'.*town, age, bought"),
        (GOOD, {"data__ignore": ("agee",)}, r"names 'agee'.*lacks"),
        (GOOD, {"model__rows": 2}, r"model\.rows is 2, but.*need 3; set model\.rows to 128"),
        (GOOD, {"data__eval_split": "valid"}, r"split 'valid'.*is unknown"),
        (GOOD.replace("1\n", "7\n"), {}, r"t\.csv line \d+ has label 7, not one of 0\.\.1"),
        (GOOD, {"data__label": "town", "task__name": "regress", "model__num_classes": 1}, r"is text; set"),
        ("split," + GOOD.replace("Rom", "train,Rom").replace("Oslo", "test,Oslo"),
         {"data__label": "town"}, r"t\.csv line 3 has town 'Oslo', which no example of the training"),
        ("split," + GOOD.replace("Rom", "train,Rom").replace("Oslo", "train,Oslo"), {}, r"no rows in split"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, content, keys, message):
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = {"data__ignore": (), "data__categorical": (), "batch_size": 8, **keys}
    c = config(f"table:{path}", **given)

    def read() -> None:
        for split in ("train", "eval"):
            pipeline = make_pipeline(c, split)
            for step in range(min(len(pipeline), 6)):
                pipeline[step]

    with pytest.raises(InputError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_a_capped_skip_leaves_bad_rows_out_and_counts_them(tmp_path, caplog):
    path = tmp_path / "t.csv"
    path.write_bytes(GOOD.encode() + b"Rom,young,1\nRom,3\nR\xffm,3,1\n")
    rows = delimited.read(f"table:{path}", max_skipped=3)
    assert len(rows.line) == 60
    assert [message.split(" of ")[0] for message in caplog.messages] == [f"skipped {n}" for n in (1, 2, 3)]
    with pytest.raises(InputError, match=r"data\.max_skipped=2 are skipped already"):
        delimited.read(f"table:{path}", max_skipped=2)


def test_quotes_semicolons_and_byte_order_marks(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfname;size\n"a;""b""\nc";1\nd;2\n')
    rows = delimited.read(f"table:{path}")
    assert rows.columns["name"].tolist() == ['a;"b"\nc', "d"]
    assert rows.columns["size"].tolist() == [1, 2]
    assert rows.where(1).endswith("t.csv line 4")


# ------------------------------------------------------------------------------ numbers as the config asks


def test_the_decimal_sign_is_the_configs(tmp_path):
    rows = ["x;bought", *[f"1,{i:03};{i % 2}" for i in range(100, 160)]]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    keys = {"data__ignore": (), "data__categorical": (), "batch_size": 8}
    name = f"table:{tmp_path}/t.csv"
    with pytest.raises(InputError, match=r"line 2 has '1,100' in 'x'.*set data\.decimal"):
        make_pipeline(config(name, **keys), "train")
    for sign, first in ((",", 1.1), (".", 1100)):
        source = labels.open_split(config(name, data__decimal=sign, **keys), "train")
        assert source.read(np.arange(len(source)))["x"].min() == pytest.approx(first, rel=0.01)


def test_a_row_without_a_label_is_named_or_skipped(tmp_path):
    for label, empty in (("text", ""), ("number", "NA"), ("number", "")):
        rows = [[i % 9, ("no", "yes")[i % 2] if label == "text" else i % 2] for i in range(60)]
        rows[30][1] = empty
        name = write(tmp_path / f"{label}{empty}.csv", [["x", "bought"], *rows])
        keys = {"data__ignore": (), "data__categorical": (), "batch_size": 8}
        with pytest.raises(InputError, match=r"line 32 has (no bought|'NA' in 'bought')"):
            make_pipeline(config(name, **keys), "train")
        lenient = config(name, data__max_skipped=1, **keys)
        assert sum(len(labels.open_split(lenient, split)) for split in ("train", "test")) == 59


def test_columns_that_the_model_does_not_read_are_not_minded(tmp_path):
    rows = [[f"film {i}", i % 2, "12 %", "0,5", "1.5"] for i in range(40)]
    name = write(tmp_path / "t.tsv", [["text", "label", "share", "a", "b"], *rows], "\t")
    c = tiny("rnn", data__name=name, task__name="classify", model__vocab_size=264, model__num_classes=2)
    assert len(make_pipeline(c, "train")[0]["label"])
    keys = {"data__name": name, "data__label": "label", "model__num_classes": 2, "model__rows": 128}
    ignored = tiny("mlp", **keys, data__ignore=("text", "share"))
    assert list(tables.fit(ignored, labels.open_split(ignored, "train")).numeric) == ["a", "b"]
    with pytest.raises(InputError, match=r"has '12 %' in 'share'"):
        make_pipeline(tiny("mlp", **keys, data__ignore=("text",)), "train")


def test_a_number_too_far_for_float32_is_named_with_its_row(tmp_path):
    rows: list[list[Any]] = [["split", "x", "bought"]]
    rows += [["train", 1e-30 * (i % 5), i % 2] for i in range(40)] + [["test", 3.0, 1], ["test", 3e30, 1]]
    c = config(write(tmp_path / "t.csv", rows), data__ignore=(), data__categorical=(), batch_size=8)
    with pytest.raises(InputError, match=r"t\.csv line 43: column 'x' has 3e\+30.*too many standard dev"):
        make_pipeline(c, "eval")[0]


def test_numbers_far_from_zero_are_learned_and_written_in_their_own_unit(tmp_path):
    """Labels near 1.7e9 differ by less than float32 tells apart there."""
    rows: list[list[Any]] = [["x", "bought"], *[[i, 1_700_000_000 + i] for i in range(200)]]
    keys = {"task__name": "regress", "model__num_classes": 1, "data__ignore": (), "data__categorical": ()}
    c = config(write(tmp_path / "t.csv", rows), mesh__data=1, batch_size=8, **keys)
    built = build(c)
    examples = evaluate.collect(built, start_on(built), make_pipeline(c, "eval"))
    truth = labels.open_split(c, "test").read(np.arange(len(examples["label"])))["bought"]
    np.testing.assert_allclose(np.diff(examples["label"][:, 0]), np.diff(truth), atol=1e-3)


def test_groups_and_categories_of_large_numbers_stay_apart(tmp_path):
    values = [2**53, 2**53 + 1, 2**40, 7]
    rows: list[list[Any]] = [["x", "group", "bought"], *[[i, values[i % 4], i % 2] for i in range(80)]]
    name = write(tmp_path / "t.csv", rows)
    c = config(name, data__group="group", data__ignore=(), data__categorical=(), batch_size=32)
    assert len(np.unique(make_pipeline(c, "train")[0]["group"])) == 4
    for text, expected in ((0.2, "0.2"), (np.float32(0.1), "0.1"), (7.0, "7"), (2.0**60, str(2**60))):
        assert labels.as_text(text) == expected
    assert labels.id_of("007", {"7": 1}, 0) == 0
    assert labels.id_of(" 7", {"7": 1}, 0) == 1
