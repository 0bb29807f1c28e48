"""Images in files of one's own: `folder:DIR`, a directory for each class, or `images:GLOB`, lists of files.

folder:flowers              flowers/rose/1.jpg ...; or flowers/train/rose/..., flowers/test/rose/...
images:flowers.csv          columns `path` and, for labels, `label`; paths are relative to the file (or .tsv,
                            .parquet, .jsonl)
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Unpack

import numpy as np

from bigmodel.config import InputError
from bigmodel.data import columnar, delimited, source, text_files, tfds
from bigmodel.data.source import ALL, Feature, Reading

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
SPLITS = {"train": "train", "training": "train", "test": "test", "val": "test", "validation": "test"}


class Listed(NamedTuple):
    """One image: its file, its class, and its split ("" where the files do not say)."""

    path: str
    label: str
    split: str


class ImageFiles:
    """Images decoded as RGB when they are read; labels are numbers, the place of their class's name.

    Where neither directories nor a column `split` say otherwise, about `test_fraction` of the images, by a
    hash of their names, are `test`, the others `train`.
    """

    def __init__(self, name: str, split: str, **how: Unpack[Reading]) -> None:
        """Lists the files; reads none.

        Raises:
            InputError: no such directory or file, no image, an unknown split, a class without a name.
        """
        source.check_split(name, split)
        images, self._root = listed(name, **how)
        self.features = features_of(name, **how)
        self.split_rule = "as they lie or are listed" if images[0].split else "by a hash of each path"
        fraction = how.get("test_fraction", source.TEST_FRACTION)
        numbers = {label: number for number, label in enumerate(self.features["label"].names)}
        chosen = [x for x in images if split == ALL or _split_of(x, self._root, fraction) == split]
        if not chosen:
            raise InputError(f"data.name={name!r} has no image in split {split!r}; give more images")
        self._paths = [x.path for x in chosen]
        self._labels = np.array([numbers[x.label] for x in chosen], np.int64)
        self.num_bytes = sum(os.path.getsize(path) for path in self._paths)
        about = [(os.path.relpath(x.path, self._root), x.label) for x in chosen]
        digest = hashlib.sha256(repr((about, self.num_bytes)).encode()).hexdigest()[:16]
        self.fingerprint = f"images/{split} records={len(self)} bytes={self.num_bytes} sha256={digest}"
        self._pool = ThreadPoolExecutor(os.cpu_count(), "images")

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        return self._paths[index]

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Raises InputError for a file that is no image; the message names it."""
        out = np.empty(len(indices), object)
        for row, image in enumerate(self._pool.map(self._decoded, indices.tolist())):
            out[row] = image
        return {"image": out, "label": self._labels[indices]}

    def _decoded(self, index: int) -> np.ndarray:
        path = self._paths[index]
        try:
            return tfds.pixels(text_files.read_bytes(path), 3)
        except ValueError as error:
            raise InputError(
                f"{path} is {error}; mend it, leave it out, or skip it by data.max_skipped"
            ) from None


def features_of(name: str, **how: Unpack[Reading]) -> Mapping[str, Feature]:
    """Returns the features; class names are the labels, sorted. Raises InputError as `ImageFiles`."""
    names = tuple(sorted({image.label for image in listed(name, **how)[0]}))
    return {
        "image": Feature((None, None, 3), "uint8"),
        "label": Feature((), "int64", len(names), names),
    }


def listed(name: str, **how: Unpack[Reading]) -> tuple[list[Listed], str]:
    """Returns the images of `folder:DIR` or `images:GLOB`, sorted by path, and the directory they lie in."""
    if name.startswith("folder:"):
        root = pathlib.Path(name.partition(":")[2]).expanduser()
        if not root.is_dir():
            raise InputError(f"data.name={name!r}: {root} is no directory; give one, such as folder:flowers")
        return _in_folders(name, root), str(root)
    found = [image for path in source.paths(name, "images:flowers.csv") for image in _in_list(path, **how)]
    if not found:
        raise InputError(f"data.name={name!r} lists no image; write a line for each, path,label")
    return sorted(found), os.path.commonpath([os.path.dirname(image.path) for image in found])


def _in_folders(name: str, root: pathlib.Path) -> list[Listed]:
    found = []
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        parts = path.relative_to(root).parts[:-1]
        split = SPLITS.get(parts[0].lower(), "") if len(parts) > 1 else ""
        if not parts[bool(split) :]:
            raise InputError(f"{path} lies in no class's directory; move it to {root}/CLASS/{path.name}")
        found.append(Listed(str(path), "/".join(parts[bool(split) :]), split))
    if not found:
        raise InputError(f"data.name={name!r} has no images; put {', '.join(SUFFIXES)} into {root}/CLASS/")
    if {image.split for image in found} == {"train"} or {image.split for image in found} == {"test"}:
        raise InputError(
            f"data.name={name!r} has one of train/ and test/ only; add the other, or use neither"
        )
    return found


def _in_list(path: str, **how: Unpack[Reading]) -> list[Listed]:
    rows, found = delimited.rows_of(path, columns=how.get("columns", ())), []
    if "path" not in rows[0][1]:
        raise InputError(
            f"{path} has no column 'path'; it must have path,label or path,label,split, or set data.columns"
        )
    for number, row in rows:
        file, label, split = row["path"], row.get("label", ""), row.get("split", "").lower()
        where = columnar.where(path, number)
        if not file or (split and split not in SPLITS):
            raise InputError(f"{where}: give a path, and train, test or nothing as split")
        file = os.path.join(os.path.dirname(path), os.path.expanduser(file))
        if not os.path.isfile(file):
            raise InputError(f"{where}: {file} does not exist; correct the path")
        found.append(Listed(file, label, SPLITS.get(split, "")))
    return found


def _split_of(image: Listed, root: str, fraction: float) -> str:
    if image.split:
        return image.split
    number = text_files.content_hash(os.path.relpath(image.path, root).encode())
    return "test" if source.is_test(number, fraction) else "train"
