"""Files that training reads: parquet and JSON lines, names of columns, how a file is divided."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, tiny

from bigmodel import config as config_lib
from bigmodel import tasks, train
from bigmodel.config import InputError
from bigmodel.data import delimited, labels, open_source
from bigmodel.data.facts import Facts
from bigmodel.data.ratings import load
from bigmodel.data.text_files import TextFiles

BIG = 2**53 + 1  # float64 rounds it
ROWS = [
    {"town": f"t{n % 3}", "code": f"{n:03}", "age": n, "share": n / 7, "key": BIG + n, "in": n % 2 == 0}
    for n in range(60)
]


def write(path, rows):
    """The same rows as CSV, JSON lines or parquet."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        lines = [",".join("" if x is None else str(x) for x in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    return path


def read(path, split="all", **how):
    source = open_source(f"table:{path}", split, **how)
    return source.read(np.arange(len(source)))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_are_those_of_the_rows(tmp_path, suffix):
    found = read(write(tmp_path / f"t{suffix}", ROWS))
    assert found["key"].dtype == np.int64
    assert found["key"].tolist() == [row["key"] for row in ROWS]
    assert found["share"].tolist() == [row["share"] for row in ROWS]
    assert [x.decode() for x in found["code"]] == [row["code"] for row in ROWS]  # text stays text
    assert set(found["in"]) == {b"true", b"false"}
    table = delimited.read(f"table:{tmp_path}/t{suffix}")
    word = {".jsonl": "line", ".parquet": "row"}[suffix]
    assert table.where(3) == f"{tmp_path}/t{suffix} {word} 4"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_are_divided_as_those_of_a_csv_file(tmp_path, suffix):
    rows = [{key: row[key] for key in ("town", "age")} for row in ROWS]
    paths = [write(tmp_path / f"t{each}", rows) for each in (".csv", suffix)]
    for split in ("train", "test"):
        a, b = (open_source(f"table:{path}", split) for path in paths)
        assert a.fingerprint == b.fingerprint


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_missing_values(tmp_path, suffix):
    rows = [{"x": None if n == 4 else n, "y": float("nan") if n == 5 else n / 2} for n in range(20)]
    found = read(write(tmp_path / f"t{suffix}", rows))
    assert np.flatnonzero(np.isnan(found["x"])).tolist() == [4]
    assert np.flatnonzero(np.isnan(found["y"])).tolist() == [5]
    with pytest.raises(InputError, match=rf"t{suffix} (row|line) 5 has no x; fill it in"):
        read(tmp_path / f"t{suffix}", required=("x",))
    rows[7]["y"] = float("inf")
    write(tmp_path / f"t{suffix}", rows)
    with pytest.raises(InputError, match=rf"t{suffix} (row|line) 8 has 'inf'.* in 'y', a column of numbers"):
        read(tmp_path / f"t{suffix}")


def test_json_lines_need_not_name_the_same_columns(tmp_path):
    write(tmp_path / "a.jsonl", [{"x": n, "kind": "a"} for n in range(20)])
    write(tmp_path / "b.jsonl", [{"y": n / 2, "x": 20 + n} for n in range(20)])
    found = read(tmp_path / "*.jsonl")
    assert found["x"].tolist() == list(range(40))
    assert np.isnan(found["y"][:20]).all()
    assert found["y"][20:].tolist() == [n / 2 for n in range(20)]
    assert found["kind"].tolist() == [b"a"] * 20 + [b""] * 20
    write(tmp_path / "a.parquet", [{"x": n, "kind": "a"} for n in range(20)])
    write(tmp_path / "b.parquet", [{"x": n} for n in range(20)])
    with pytest.raises(InputError, match=r"b\.parquet has another header than .*a\.parquet"):
        read(tmp_path / "*.parquet")


def test_what_is_nested_is_left_out(tmp_path):
    rows = [{"a": n, "meta": {"b": n}, "list": [n]} for n in range(20)]
    for suffix in (".jsonl", ".parquet"):
        assert list(read(write(tmp_path / f"t{suffix}", rows))) == ["a"]


def test_times_and_categories_of_parquet(tmp_path):
    times = pa.array([10**9 * n for n in range(20)], pa.timestamp("ns"))
    kinds = pa.array(["a", "b"] * 10).dictionary_encode()
    pq.write_table(pa.table({"time": times, "kind": kinds}), tmp_path / "t.parquet")
    found = read(tmp_path / "t.parquet")
    assert found["time"].tolist() == [10**9 * n for n in range(20)]
    assert found["kind"].tolist() == [b"a", b"b"] * 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": \n', r"a\.jsonl line 2 is no JSON \("),
        ("a.jsonl", b'{"x": 1}\n[1]\n', r"a\.jsonl line 2 is no JSON object"),
        ("a.jsonl", b'{"x": "\xff"}\n', r"a\.jsonl line 1 is not UTF-8 text"),
        ("a.jsonl", b'{"x": "\\ud800"}\n', r"a\.jsonl line 1 is not UTF-8 text"),
        ("a.jsonl", b"\n", r"a\.jsonl"),
        ("a.parquet", b"PAR1, it says", r"a\.parquet cannot be read as parquet"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_bad_line_can_be_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\nno\n{"x": 2}\n')
    assert read(tmp_path / "a.jsonl", max_skipped=1)["x"].tolist() == [1, 2]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_language_model_reads_a_column_of_texts(tmp_path, suffix):
    rows = [{"content": f"text {n}\nand a tab\t{n}", "n": n} for n in range(200)]
    name = f"text:{write(tmp_path / f'docs{suffix}', rows)}"
    config = tiny("gpt", data__name=name, data__text="content", model__vocab_size=264, mesh__data=1)
    renamed = config_lib.override(config, {"data.text": "text", "data.columns": "text:content"})
    batches = [tasks.make_pipeline(each, "train")[0]["tokens"] for each in (config, renamed)]
    np.testing.assert_array_equal(*batches)
    with pytest.raises(InputError, match=r"has no feature 'text'.*data\.text to one of content, n"):
        tasks.make_pipeline(config_lib.override(config, {"data.text": "text"}), "train")


def test_an_evaluation_set_has_columns_of_its_own(tmp_path):
    name = f"text:{write(tmp_path / 'b.jsonl', [{'body': f'text {n}'} for n in range(50)])}"
    (tmp_path / "a.txt").write_text("some text\n" * 99)
    sets = {"other": {"name": name, "split": "all", "columns": ["text:body"]}}
    config = tiny("gpt", data__name=f"text:{tmp_path}/a.txt", model__vocab_size=264, eval__sets=sets)
    batch = tasks.make_pipeline(config_lib.eval_sets(config)["other"], "eval")[0]
    assert bytes(x for x in batch["tokens"][0].tolist() if x < 256).startswith(b"text 0text 1")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_pairs_in_columns_are_those_of_lines(tmp_path, suffix):
    pairs = [(f"one {n}", f"un {n}") for n in range(50)]
    (tmp_path / "p.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs))
    rows = [{"en": a, "fr": b} for a, b in pairs]
    name, columns = f"pairs:{write(tmp_path / f'p{suffix}', rows)}", ("source:en", "target:fr")
    for split in ("train", "test"):
        a, b = open_source(f"pairs:{tmp_path}/p.tsv", split), open_source(name, split, columns=columns)
        assert a.fingerprint == b.fingerprint
        assert a.read(np.arange(2))["text"].tolist() == b.read(np.arange(2))["text"].tolist()
    with pytest.raises(InputError, match=r"has no column 'source', but en, fr; set data\.columns"):
        open_source(name, "train")


# ---------------------------------------------------------------------------------------------- columns


def ratings(names=("user", "item", "rating", "timestamp")):
    values = ((BIG + user, user + 3 * n, n % 5 + 0.5, n) for user in range(12) for n in range(5))
    return [dict(zip(names, row, strict=True)) for row in values]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("userId", "movieId", "rating", "timestamp"), ""),  # MovieLens
        (("user_id", "Item", "stars", "time"), ""),
        (("who", "film", "rating", "timestamp"), "user:who,item:film"),
    ],
)
def test_ratings_by_other_names(tmp_path, suffix, names, columns):
    def loaded(path, columns):
        keys = {"data.name": f"ratings:{path}", "data.columns": columns}
        return load(config_lib.load(f"{ROOT}/configs/recommender.py", keys))

    a = loaded(write(tmp_path / "a.csv", ratings()), "")
    b = loaded(write(tmp_path / f"b{suffix}", ratings(names)), columns)
    assert b.names == a.names
    assert list(b.names["user"])[:2] == [str(BIG), str(BIG + 1)]
    for key in ("user", "item", "rating", "is_test"):
        np.testing.assert_array_equal(getattr(a, key), getattr(b, key))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("user:who", r"data\.columns has 'user:who', but .*a\.csv has user, item, rating, timestamp"),
        ("user:item", r"data\.columns has 'user:item', but .* has a column 'user' too"),
        ("user", r"data\.columns has 'user'; write NAME:COLUMN"),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns, message):
    keys = {"data.name": f"ratings:{write(tmp_path / 'a.csv', ratings())}", "data.columns": columns}
    with pytest.raises(InputError, match=message):
        load(config_lib.load(f"{ROOT}/configs/recommender.py", keys))


def test_listed_images_by_other_names(tmp_path):
    from PIL import Image

    for n in range(4):
        Image.new("RGB", (4, 4), (n, 0, 0)).save(tmp_path / f"{n}.png")
    rows = [{"file": f"{n}.png", "kind": "ab"[n % 2]} for n in range(4)]
    for suffix in (".csv", ".jsonl", ".parquet"):
        name = f"images:{write(tmp_path / f'list{suffix}', rows)}"
        source = open_source(name, "all", columns=("path:file", "label:kind"))
        assert source.read(np.arange(4))["label"].tolist() == [0, 1, 0, 1]
        with pytest.raises(InputError, match=r"has no column 'path'.*data\.columns"):
            open_source(name, "all")


# ----------------------------------------------------------------------------------------------- splits


def test_a_text_is_divided_at_its_end_or_in_blocks(tmp_path):
    lines = [f"line {n:04}\n" for n in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))

    def parts(split, **how):
        source = TextFiles(f"text:{tmp_path}/a.txt", split, **how)
        return source, b"".join(source.read(np.arange(len(source)))["text"]).decode().splitlines(True)

    for how, count, fraction in [
        ({}, 1, 0.1), ({"test_fraction": 0.3}, 1, 0.3), ({"split_by": "blocks"}, 10, 0.1),
        ({"split_by": "blocks", "test_fraction": 0.25}, 10, 0.25),
    ]:  # fmt: skip
        (train_, train_lines), (test, test_lines) = (parts(split, **how) for split in ("train", "test"))
        assert sorted(train_lines + test_lines) == sorted(lines)
        assert len(test_lines) == pytest.approx(fraction * len(lines), abs=count)
        assert (len(train_), len(test)) == (count, count)
    places = [lines.index(line) for line in parts("test", split_by="blocks")[1]]
    assert np.histogram(places, 10, (0, 1000))[0].tolist() == pytest.approx([10] * 10, abs=2)


def test_a_larger_fraction_holds_out_the_same_rows_and_others(tmp_path):
    rows = [{"x": n, "y": n % 3} for n in range(2000)]
    path = write(tmp_path / "t.csv", rows)
    default, *tests = (
        set(read(path, "test", **how)["x"])
        for how in ({}, *({"test_fraction": fraction} for fraction in (0.02, 0.1, 0.3)))
    )
    assert default == tests[1]
    assert tests[0] < tests[1] < tests[2]
    assert [len(test) / 2000 for test in tests] == pytest.approx([0.02, 0.1, 0.3], abs=0.03)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data.name": "digits", "data.test_fraction": 0.2}, r"'digits' has splits and names of its own"),
        ({"data.split_by": "blocks", "data.name": "table:t.csv"}, r"data\.split_by=blocks cuts text: files"),
        ({"data.test_fraction": 1.0}, r"data\.test_fraction is 1\.0: choose a value between 0 and 1"),
    ],
)
def test_divisions_that_are_none(keys, message):
    with pytest.raises(InputError, match=message):
        labels.open_split(config_lib.load(f"{ROOT}/configs/cnn.py", keys), "train")


def test_a_run_says_how_its_file_was_divided_and_resumes_on_that_alone(corpus_file, tmp_path, capsys):
    keys = {"data__name": f"text:{corpus_file}", "model__vocab_size": 264, "seq_len": 16, "eval__batches": 1}
    config = tiny("gpt", **keys, steps=1, log__tensorboard=False, data__split_by="blocks")
    train.run(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert re.search(
        r"^data  .*a\.txt: 18\S* kB train, \S+ kB test \(10 blocks of each file\)$", said, re.MULTILINE
    )
    other = config_lib.override(config, {"data.split_by": "auto", "steps": 2})
    with pytest.raises(InputError, match=r"was trained on other data: source was text/train records=10"):
        train.run(other, tmp_path / "run")


@pytest.fixture
def corpus_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox\n" * 1000)
    return path


# ----------------------------------------------------------------------------------------- plain paths


def test_a_plain_path_is_answered_by_its_columns(tmp_path):
    image = {"path": "a.png", "label": "b"}
    for file, rows, prefix in [
        ("r.csv", ratings(("userId", "movieId", "rating", "timestamp")), "ratings"),
        ("r.parquet", ratings(), "ratings"),
        ("i.csv", [image], "images"),
        ("p.jsonl", [{"source": "a", "target": "b"}], "pairs"),
        ("t.csv", ROWS, "table"),
    ]:
        path = write(tmp_path / file, rows)
        with pytest.raises(InputError, match=f"write {prefix}:{path} "):
            open_source(str(path), "train")


@pytest.mark.parametrize(
    ("file", "prefix"),
    [("a.txt", "text"), ("a.csv", "table"), ("a.parquet", "table"), ("a.jsonl", "text"), ("", "folder")],
)
def test_a_plain_path_is_answered_with_its_prefix(tmp_path, file, prefix):
    (tmp_path / (file or "b")).write_text("")
    name = str(tmp_path / file)
    with pytest.raises(InputError, match=rf"is a path, not a dataset's name; write {prefix}:{name} "):
        Facts(config_lib.load(f"{ROOT}/configs/gpt.py", {"data.name": name})).open("train")
