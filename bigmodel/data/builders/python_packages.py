"""`python_packages`: passages of the running Python's standard library, each with the package it is from.

A labeled set of texts that every machine has: four lines at a time of ten packages' files, split by a hash
of each passage (`python_source` splits by file, which here would give the splits other shares of classes). So
a model that was pretrained on `python_source` has read most of the passages, but never a label.
"""

from __future__ import annotations

import pathlib
import platform
import sysconfig
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from bigmodel.data.builders.python_source import SHARES, files, share

PACKAGES = (
    "asyncio", "email", "http", "idlelib", "importlib", "logging", "multiprocessing", "tkinter", "unittest",
    "xml",
)  # fmt: skip
LINES = 4


class PythonPackages(tfds.core.GeneratorBasedBuilder):
    """One example is one passage: `text` and `label`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS wants a plain list)
        tfds.core.BuilderConfig(
            name=f"py{platform.python_version()}", description="The standard library of this Python."
        )
    ]
    url_infos = None  # nothing is downloaded; see python_source.py

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel(names=PACKAGES)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Passages of the standard library's files, and the package that each is from.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": label}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in SHARES}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        for path, data in files(pathlib.Path(sysconfig.get_paths()["stdlib"])):
            package = path.partition("/")[0]
            for number, text in enumerate(passages(data.decode("utf-8")) if package in PACKAGES else ()):
                if share(text.encode()) in SHARES[split]:
                    yield f"{path} {number}", {"text": text, "label": package}


def passages(text: str) -> list[str]:
    """LINES lines at a time, without empty ones; what is left over at the end is none."""
    lines = [line for line in text.splitlines() if line.strip()]
    return ["\n".join(lines[at : at + LINES]) for at in range(0, len(lines) - LINES + 1, LINES)]
