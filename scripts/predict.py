"""Writes predictions of a trained model for many inputs, one JSON line each; run again, it goes on.

    python scripts/predict.py --workdir=runs/cnn --inputs=images/ --out=predictions.jsonl
    python scripts/predict.py --workdir=runs/mf --inputs=pairs.csv --out=scores.jsonl
    python scripts/predict.py --workdir=runs/mf --top=10 --user=7

--inputs: a directory of images (png, jpg, jpeg; searched through), or a .csv, .tsv, .jsonl or .parquet, which
is read as one of training. A model that reads text wants the column that it learned from, or `text`; one
that reads images `image` or `path` (relative to the file), one that reads a table the table's columns, a
recommender `user` and `item` as its ratings call them, a GAN `serial`, a number for each image, which comes
as base64 of a PNG. Other columns are not minded, but those that --keep names are carried over, as `row`.
Each line has `input` (a path, or the row's number, from 0) and the prediction; `known` is false of a user or
an item that training did not know.

--top prints the items with the highest scores for a user, without those that training rated
(--include-rated: with them).
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import cli

from bigmodel import workdir
from bigmodel.config import InputError

if TYPE_CHECKING:
    from bigmodel.infer.predict import Predictor

SUFFIXES = (".png", ".jpg", ".jpeg")


def main() -> int:
    flags = cli.workdir_parser(__doc__)
    flags.add_argument("--inputs", type=pathlib.Path, help="a directory or a file with columns")
    flags.add_argument("--out", type=pathlib.Path, help="a .jsonl; what is there is kept")
    flags.add_argument("--keep", default="", metavar="A,B", help="columns to carry over; *: all")
    flags.add_argument("--top", type=int, default=0, metavar="N", help="the best items for --user")
    flags.add_argument("--user", default="", help="as the ratings call the user")
    flags.add_argument("--include-rated", action="store_true", help="--top: also what the user rated")
    args, _ = cli.parse_workdir(flags)
    if bool(args.top or args.user) == bool(args.inputs and args.out) or bool(args.top) != bool(args.user):
        raise InputError("give --inputs and --out, or --top and --user")
    from bigmodel.infer import predict

    path = pathlib.Path(args.workdir)
    predictor = predict.Predictor.load(path, args.step)
    if args.top:
        config = predictor.program.config
        is_rank = predictor.ids is not None and not args.include_rated
        rated = predict.rated(config, path, args.user) if is_rank else ()
        print(*map(json.dumps, predictor.top(args.user, args.top, rated)), sep="\n")
    else:
        write_predictions(predictor, args.inputs, args.out, args.keep)
    return 0


def write_predictions(predictor: Predictor, inputs: pathlib.Path, out: pathlib.Path, keep: str) -> None:
    """Goes on where `out` ends. Raises InputError as `inputs_of`, `done_in` and the predictor."""
    from rich.progress import track

    size, decimal = predictor.program.config.batch_size, predictor.program.config.data.decimal
    numbers = tuple(predictor.columns.numeric) if predictor.columns else ()
    reads_images, columns = predictor.reads == "image", predictor.program.config.data.columns
    named = inputs_of(inputs, numbers, decimal, reads_images, columns, predictor.ids or ())
    rows_carried = carried(inputs, keep, len(named))
    done = done_in(out, [name for name, _ in named])
    with out.open("a") as file:
        for first in track(range(done, len(named), size), "predicting", disable=done == len(named)):
            part = named[first : first + size]
            try:
                rows, _ = predictor.predict([value for _, value in part])
            except InputError as error:
                raise InputError(located(inputs, first, str(error))) from error
            lines = [
                json.dumps(workdir.without_nan({"input": name, **own, **row}), allow_nan=False)
                for (name, _), own, row in zip(part, rows_carried[first:], rows, strict=False)
            ]
            file.write("\n".join(lines) + "\n")
            file.flush()
    print(f"predicted {len(named) - done} of {len(named)} in {out}")


def carried(path: pathlib.Path, keep: str, count: int) -> list[dict[str, Any]]:
    """Returns {"row": the columns to carry over} of each input, as text; {} without any.

    Raises:
        InputError: a directory, or a column that is not there.
    """
    from bigmodel.data import delimited

    if not keep:
        return [{}] * count
    if path.is_dir():
        raise InputError(f"--keep={keep}: a directory has no columns; give a CSV with a column `image`")
    rows = [row for _, row in delimited.rows_of(str(path))]
    names = list(rows[0]) if keep == "*" else keep.split(",")
    for name in names:
        if name not in rows[0]:
            raise InputError(f"--keep: {path} has no column {name!r}, but {', '.join(rows[0])}")
    return [{"row": {name: row[name] for name in names}} for row in rows]


def inputs_of(
    path: pathlib.Path, numbers: Collection[str] = (), decimal: str = "auto", images: bool = True,
    columns: Collection[str] = (), ids: Collection[str] = (),
) -> list[tuple[str | int, Any]]:  # fmt: skip
    """(path or number, what the predictor reads) of every input.

    Args:
        numbers: columns of numbers; the others are text.
        decimal, columns: data.decimal and data.columns of the config.
        images: a column `image`, or `path`, holds paths.
        ids: columns that may have a well-known other name, as in training.

    Raises:
        InputError: as delimited.read; it is neither a directory of images nor a file.
    """
    from bigmodel.data import delimited

    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError(f"--inputs={path} holds no {', '.join(SUFFIXES)}; give a directory of images")
        return [(str(file.relative_to(path)), file) for file in files]
    if not path.is_file():
        raise InputError(f"--inputs={path} is no directory and no file; give one of these")
    header = delimited.rows_of(str(path))[0][1].keys()
    calls = [pair for pair in columns if pair.partition(":")[2] in header]
    calls += [f"{x}:{delimited.known_as(x, header)}" for x in ids if delimited.known_as(x, header)]
    calls += ["image:path"] if images and "path" in header else []
    calls = [pair for pair in dict.fromkeys(calls) if pair.partition(":")[0] not in header]
    rows = [row for _, row in delimited.rows_of(str(path), numbers, decimal, calls)]
    if images and "image" in rows[0]:
        return [(row["image"], path.parent / row["image"]) for row in rows]
    return list(enumerate(rows))


def located(path: pathlib.Path, first: int, problem: str) -> str:
    """`problem`, which says "input N: ..." of the inputs from `first` on, with the file and the line."""
    from bigmodel.data import delimited

    found = re.match(r"input (\d+): ", problem)
    if found is None or not path.is_file():
        return f"{path}: {problem}"
    number = first + int(found[1])
    line, _ = delimited.rows_of(str(path))[number]
    return f"{path} line {line}: input {number}: {problem[found.end() :]}"


def done_in(path: pathlib.Path, names: Sequence[str | int]) -> int:
    """Returns how many of the inputs `path` has already; removes a line that was cut short.

    Raises:
        InputError: it holds predictions for other inputs.
    """
    if not path.is_file():
        if not path.parent.is_dir():
            raise InputError(f"--out={path}: {path.parent} is no directory; make it")
        return 0
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    for number, line in enumerate(whole.splitlines()):
        try:
            name = json.loads(line)["input"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--out={path} line {number + 1} is no prediction; choose another file"
            ) from error
        if number >= len(names) or name != names[number]:
            raise InputError(f"--out={path} holds predictions for other inputs; choose another file")
    if whole != text:
        path.write_text(whole)
    return whole.count("\n")


if __name__ == "__main__":
    cli.run(main)
