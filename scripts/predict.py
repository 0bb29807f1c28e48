"""Writes predictions of a trained model for many inputs, one JSON line each; run again, it goes on.

    python scripts/predict.py --workdir=runs/cnn --inputs=images/ --out=predictions.jsonl
    python scripts/predict.py --workdir=runs/mf --inputs=pairs.csv --out=scores.jsonl

--inputs: a directory of images (png, jpg, jpeg; searched through), or a CSV or TSV, which is read as one of
training. A model that reads text wants the column that it learned from, or `text`; one that reads images
`image` (paths, relative to the CSV), one that reads a table the table's columns, a recommender `user` and
`item` as its ratings call them, a GAN `serial`, a number for each image, which comes as base64 of a PNG.
Other columns are not minded. Each line has `input` (a path, or the row's number, from 0) and the prediction.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Collection
from typing import Any

import cli

from bigmodel import workdir
from bigmodel.config import InputError

SUFFIXES = (".png", ".jpg", ".jpeg")


def main() -> int:
    flags = cli.workdir_parser(__doc__)
    flags.add_argument("--inputs", required=True, type=pathlib.Path, help="a directory or a CSV")
    flags.add_argument("--out", required=True, type=pathlib.Path, help="a .jsonl; what is there is kept")
    args, _ = cli.parse_workdir(flags)
    from rich.progress import track

    from bigmodel.infer.predict import Predictor

    predictor = Predictor.load(pathlib.Path(args.workdir), args.step)
    size, decimal = predictor.program.config.batch_size, predictor.program.config.data.decimal
    numbers = tuple(predictor.columns.numeric) if predictor.columns else ()
    named = inputs_of(args.inputs, numbers, decimal, predictor.reads == "image")
    done = done_in(args.out, [name for name, _ in named])
    with args.out.open("a") as file:
        for first in track(range(done, len(named), size), "predicting", disable=done == len(named)):
            part = named[first : first + size]
            try:
                rows, _ = predictor.predict([value for _, value in part])
            except InputError as error:
                raise InputError(located(args.inputs, first, str(error))) from error
            lines = [
                json.dumps(workdir.without_nan({"input": name, **row}), allow_nan=False)
                for (name, _), row in zip(part, rows, strict=True)
            ]
            file.write("\n".join(lines) + "\n")
            file.flush()
    print(f"predicted {len(named) - done} of {len(named)} in {args.out}")
    return 0


def inputs_of(
    path: pathlib.Path, numbers: Collection[str] = (), decimal: str = "auto", images: bool = True
) -> list[tuple[str, Any]]:
    """(name, what the predictor reads) of every input.

    Args:
        numbers: columns of numbers; the others are text.
        decimal: data.decimal of the config.
        images: a column `image` holds paths.

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
    rows = [row for _, row in delimited.rows_of(str(path), numbers, decimal)]
    if images and "image" in rows[0]:
        return [(row["image"], path.parent / row["image"]) for row in rows]
    return [(str(number), row) for number, row in enumerate(rows)]


def located(path: pathlib.Path, first: int, problem: str) -> str:
    """`problem`, which says "input N: ..." of the inputs from `first` on, with the file and the line."""
    from bigmodel.data import delimited

    found = re.match(r"input (\d+): ", problem)
    if found is None or not path.is_file():
        return f"{path}: {problem}"
    number = first + int(found[1])
    line, _ = delimited.rows_of(str(path))[number]
    return f"{path} line {line}: input {number}: {problem[found.end() :]}"


def done_in(path: pathlib.Path, names: list[str]) -> int:
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
