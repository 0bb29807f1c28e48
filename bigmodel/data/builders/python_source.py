"""`python_source`: the text of the running Python's standard library, a corpus every machine has.

About 10 MB of text, split by a hash of each file's content into train / validation / test (80 / 10 / 10 %
of the files), so that two equal files never lie on both sides.
"""

from __future__ import annotations

import hashlib
import pathlib
import platform
import sysconfig
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

# Third-party code, and the tests: they repeat each other and hold long machine-made tables.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
SHARES = {"train": range(80), "validation": range(80, 90), "test": range(90, 100)}  # of 100 hash values


class PythonSource(tfds.core.GeneratorBasedBuilder):
    """One example is one file: `text` and `path` (relative to the standard library)."""

    VERSION = tfds.core.Version("1.0.0")
    # Two Pythons may share a data_dir: each has its own text, hence its own config.
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS wants a plain list)
        tfds.core.BuilderConfig(
            name=f"py{platform.python_version()}", description="The standard library of this Python."
        )
    ]
    # Nothing is downloaded. Without this, TFDS looks for a checksum file through `importlib_resources`,
    # which it does not declare as a dependency.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python files of the standard library, as text.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in SHARES}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        for path, data in files(pathlib.Path(sysconfig.get_paths()["stdlib"])):
            if share(data) in SHARES[split]:
                yield path, {"text": data.decode("utf-8"), "path": path}


def files(root: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """(path relative to `root`, content) of every UTF-8 `.py` file that is not empty, in sorted order."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED & set(relative.parts[:-1]):
            continue
        try:
            data = path.read_bytes()
            data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if data:
            yield relative.as_posix(), data


def share(data: bytes) -> int:
    """Content -> 0..99, the same on every machine."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") % 100
