"""Numbers, quotes and paths as files have them: read exactly, or refused with the line; never misread."""

from __future__ import annotations

import csv
import pathlib

import numpy as np
import pytest

from bigmodel.config import InputError
from bigmodel.data import cells, delimited, source


def column(tmp_path: pathlib.Path, values: list[str], delimiter: str = ";", **keys: object) -> np.ndarray:
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["x", "y"], *([value, "a"] for value in values)])
    return delimited.read(f"table:{path}", **keys).columns["x"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "delimiter", "expected"),
    [
        (["0,5", "12", "-3,25", ""], ";", [0.5, 12, -3.25, np.nan]),
        (["0,5", "1,234", "1.234,5", "2.000"], "\t", [0.5, 1.234, 1234.5, 2000]),
        (["1,234,567", "2,000", "0.5"], ",", [1234567, 2000, 0.5]),
        (["1,234.5", "1,000"], ";", [1234.5, 1000]),
        (["1.234", "0.5", "7e3", ".5", "5."], ";", [1.234, 0.5, 7000, 0.5, 5]),
        (["1.234", "5.678"], ";", [1.234, 5.678]),
        (["<NA>", "#N/A", "null", "3"], ",", [np.nan] * 3 + [3]),
        (["9007199254740993", "-9223372036854775808"], ",", [9007199254740993, -(2**63)]),
        (["9223372036854775807", "5"], ",", [2**63 - 1, 5]),
        (["9007199254740992", "1"], ",", [2**53, 1]),
    ],
)  # fmt: skip
def test_numbers_are_read_exactly(tmp_path, values, delimiter, expected):
    found = column(tmp_path, values, delimiter)
    assert [type(x) for x in found.tolist()] == [type(found.tolist()[0])] * len(values)
    np.testing.assert_array_equal(found, expected)
    if found.dtype == np.int64:
        assert found.tolist() == expected  # as integers, not as floats


@pytest.mark.parametrize(
    ("values", "delimiter", "message"),
    [
        (["0,5", "1.5"], ";", r"'0,5' in 'x'.*decimal points and decimal commas; set data\.decimal"),
        (["1,234", "5,678"], ";", r"line 2 has '1,234' in 'x'.*may be decimal or part thousands; set data"),
        (["0,5", "2,5"], ",", r"line 2 has '0,5' in 'x'.*decimal commas; set data\.decimal"),
        (["1", "12%"], ";", r"line 3 has '12%' in 'x', a column of numbers"),
        (["1", "$5"], ";", r"line 3 has '\$5'"),
        (["1", "1 234"], ";", r"line 3 has '1 234'"),
        (["1", "1\u00a0234,5"], ";", r"line 3 has '1.xa0234,5'"),
        (["1", "1_000"], ";", r"line 3 has '1_000'"),
        (["1", "Infinity"], ";", r"line 3 has 'Infinity'"),
        (["1", "\u0663"], ";", r"line 3 has '\u0663'"),
        (["1", "\u22125"], ";", r"line 3 has '\u22125'"),
        (["1", "1e300"], ";", r"line 3 has '1e300' in 'x'.*more than float32 holds"),
        (["1", "1e999"], ";", r"line 3 has '1e999' in 'x'.*more than float32 holds"),
        (["9007199254740993", "0.5"], ";", r"line 2 has '9007199254740993' in 'x'.*would round"),
        (["9007199254740993", ""], ";", r"line 2 has '9007199254740993' in 'x'.*would round"),
        (["18446744073709551615", "1"], ";", r"line 2 has '18446744073709551615' in 'x'.*would round"),
    ],
)  # fmt: skip
def test_what_may_be_misread_is_refused_with_its_line(tmp_path, values, delimiter, message):
    with pytest.raises(InputError, match=message) as caught:
        column(tmp_path, values, delimiter)
    assert "\n" not in str(caught.value)
    assert "data.categorical" in str(caught.value)


@pytest.mark.parametrize(("sign", "expected"), [(",", [1.234, 5.678]), (".", [1234, 5678])])
def test_the_key_says_which_sign_is_decimal(tmp_path, sign, expected):
    for delimiter in ",;":
        np.testing.assert_array_equal(column(tmp_path, ["1,234", "5,678"], delimiter, decimal=sign), expected)
    with pytest.raises(InputError, match="no number as this column writes them"):
        column(tmp_path, ["0,5", "0.5"], decimal=sign)


def test_other_columns_tell_where_one_leaves_it_open(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a;b;c\n" + "1,234;0,5;1.234\n" * 3)
    with pytest.raises(InputError, match=r"'1\.234' in 'c'.*as other columns have decimal commas"):
        delimited.read(f"table:{path}")
    assert delimited.read(f"table:{path}", text=("c",)).columns["a"].tolist() == [1.234] * 3


def test_how_commas_are_read_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    column(tmp_path, ["0,5", "2"])
    assert "the commas of the numbers in 'x' are decimal" in caplog.text
    column(tmp_path, ["1,234,567", "2"])
    assert "the commas of the numbers in 'x' are between thousands" in caplog.text


@pytest.mark.parametrize("text", ["192.168.100.200", "123.456.789"])
def test_groups_of_digits_with_points_alone_are_no_numbers(tmp_path, text):
    for delimiter in ",;":
        with pytest.raises(InputError, match=rf"has '{text}' in 'x'.*data\.categorical"):
            column(tmp_path, [text, text, "5"], delimiter)
    assert column(tmp_path, [text, "5"], text=("x",)).tolist() == [text, "5"]


@pytest.mark.parametrize("text", ["2024-01-05", "1,2,3", "10.0.0.1", "0x1F", "12:30", "1/2", "v1.2"])
def test_text_of_digits_stays_text(tmp_path, text):
    assert column(tmp_path, [text, text]).tolist() == [text, text]


def test_a_column_that_is_half_numbers_is_text_and_that_is_said(tmp_path, caplog):
    assert column(tmp_path, ["1", "2", "3", "unknown"]).tolist() == ["1", "2", "3", "unknown"]
    assert (
        "line 5 has 'unknown' in 'x': the column is text, though 75 % of its cells are numbers" in caplog.text
    )


def test_every_float_is_read_as_numpy_reads_it():
    rng = np.random.default_rng(0)
    for value in [*rng.normal(size=200) * 10.0 ** rng.integers(-30, 30, 200), 0.1, -0.0, 5e-324]:
        for text in (repr(float(value)), f"{value:.3f}", f"{value:e}", f" {value:g} "):
            assert cells.number(text) == np.float64(text), text
            assert cells.number(text.replace(".", ","), ",") == np.float64(text), text


# ------------------------------------------------------------------------------------------------- quotes


@pytest.mark.parametrize("size", [131_071, 131_073, 400_000])
def test_fields_of_any_length(tmp_path, size):
    text = ("a,1\n" * size)[:size]
    path = tmp_path / "t.csv"
    path.write_text(f'text,label\n"{text}",0\n' + "b,1\n" * 20)
    limit = csv.field_size_limit()
    for skipped in (0, 5000):
        rows = delimited.read(f"table:{path}", text=("text",), max_skipped=skipped)
        assert rows.columns["text"].tolist() == [text] + ["b"] * 20
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("bad", "line"),
    [('"he said "no" to\nstolen,1\nstolen,0"', 22), ('"never closed,1\nlost,0', 22), ('"a"b,1', 22)],
)  # fmt: skip
def test_quotes_that_nobody_can_follow_are_never_skipped(tmp_path, bad, line):
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + "b,1\n" * 20 + bad + "\n" + "c,0\n" * 9)
    for skipped in (0, 5000):
        with pytest.raises(
            InputError, match=rf"t\.csv line {line} is no row of a CSV file .*max_skipped does not"
        ):
            delimited.read(f"table:{path}", text=("text",), max_skipped=skipped)


def test_commas_in_quoted_names_part_nothing(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('"price, in euros, net";"size, m";y\n1;2;a\n3;4;b\n')
    assert list(delimited.read(f"table:{path}").columns) == ["price, in euros, net", "size, m", "y"]


# -------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("name", ["set [v2]", "why?", "a*b", "[!x]", "plain"])
def test_a_path_that_exists_is_that_path(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    other = tmp_path / "axb"
    other.mkdir()
    for place in (folder, other):
        for file in ("t[1].csv", "t1.csv"):
            (place / file).write_text("x")
    assert source.paths(f"text:{folder}/t[1].csv", "") == [f"{folder}/t[1].csv"]
    assert source.paths(f"text:{folder}/*.csv", "") == [f"{folder}/t1.csv", f"{folder}/t[1].csv"]
    assert source.paths(f"text:{folder}/t[1-9].csv", "") == [f"{folder}/t1.csv"]
    with pytest.raises(InputError, match="matches no file"):
        source.paths(f"text:{folder}/none*.csv", "")


def test_a_header_that_is_not_utf8_is_never_skipped(tmp_path):
    path = tmp_path / "t.csv"
    for content in ("a,b\n1,2\n3,4\n".encode("utf-16"), b"pr\xe9nom,b\n1,2\n3,4\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"t\.csv line 1 is not UTF-8 text; convert the file"):
            delimited.read(f"table:{path}", max_skipped=9)


def test_a_message_shows_no_more_than_the_beginning_of_a_cell(tmp_path):
    with pytest.raises(InputError) as caught:
        column(tmp_path, ["1"] * 20 + ["9" * 5000 + "x"])
    assert len(str(caught.value)) < 400
