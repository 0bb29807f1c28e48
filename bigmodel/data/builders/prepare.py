"""Finds a TFDS dataset by name and, where it is not there yet, makes it, as array_record."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import pathlib
import shlex
from collections.abc import Iterator
from typing import Any

from bigmodel.config import InputError
from bigmodel.data.builders import BUILDERS, builder_class
from bigmodel.disk import locked

log = logging.getLogger("bigmodel")


def prepared(name: str, data_dir: str | None) -> Any:
    """The builder of a dataset that lies on disk as array_record; a bundled one is made now."""
    from tensorflow_datasets.core import file_adapters

    builder = find(name, data_dir)
    with _quiet():
        there = builder.is_prepared()
    if not there:
        if builder.name not in BUILDERS:
            raise InputError(_not_prepared(builder, name, data_dir))
        prepare(name, data_dir)
        builder = find(name, data_dir)
    found = builder.info.available_file_formats()
    if file_adapters.FileFormat.ARRAY_RECORD not in found:
        formats = ", ".join(sorted(each.value for each in found))
        raise InputError(
            f"data.name={name!r} is prepared as {formats} in {builder.data_dir}, which has no random access; "
            f"prepare it as array_record elsewhere: {_command(name, 'ANOTHER_DIR')}"
        )
    return builder


def _not_prepared(builder: Any, name: str, data_dir: str | None) -> str:
    if data_dir and not os.path.isdir(os.path.expanduser(data_dir)):
        fix = f"give where {name!r} lies, or run: {_command(name, data_dir)}"
        return f"data.data_dir={data_dir!r} does not exist; {fix}"
    root = data_dir or os.fspath(builder.data_dir_root)
    return f"data.name={name!r} is not prepared in data.data_dir={root!r}; run: {_command(name, root)}"


def _command(name: str, data_dir: str) -> str:
    return f"python scripts/prepare_data.py --name={shlex.quote(name)} --data_dir={shlex.quote(data_dir)}"


def find(name: str, data_dir: str | None) -> Any:
    """A TFDS builder by name; nothing is read from disk but the dataset's description.

    Raises:
        InputError: an unknown name, or a description that cannot be read.
    """
    import tensorflow_datasets as tfds

    base = name.partition("/")[0].partition(":")[0]
    if base in BUILDERS and base != name:
        raise InputError(f"data.name={name!r}: {base!r} has one config and one version; write {base}")
    root = os.path.expanduser(data_dir) if data_dir else None
    default = os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    if (root or default).startswith("~"):  # TFDS would make a directory of that name here
        raise InputError(
            f"data.data_dir: {root or default} needs a home directory, and there is none; "
            "set data.data_dir or $TFDS_DATA_DIR"
        )
    with _quiet():
        try:
            builder = (
                builder_class(base)(data_dir=root) if base in BUILDERS else tfds.builder(name, data_dir=root)
            )
            _ = builder.info  # read now, where its errors are caught
            return builder
        except tfds.core.DatasetNotFoundError as error:
            known = [*BUILDERS, *tfds.list_builders(with_community_datasets=False)]
            close = difflib.get_close_matches(base, known, n=1, cutoff=0.6)
            hint = (
                f"did you mean {close[0]!r}?"
                if close
                else "give a TFDS name, python_source, digits, shapes or text:GLOB"
            )
            raise InputError(f"data.name={name!r} is unknown; {hint}") from error
        except Exception as error:  # the dataset's own code runs here, and may do anything
            where = f" in data.data_dir={data_dir!r}" if data_dir else ""
            raise InputError(f"data.name={name!r} cannot be opened{where}: {one_line(error)}") from error


def prepare(name: str, data_dir: str | None = None) -> str:
    """Downloads (if it needs to) and writes a dataset as array_record; returns its directory.

    Safe when several processes do it at once: one works, the others wait.

    Raises:
        InputError: unknown dataset, no network, no room, a package that only preparing needs.
    """
    import requests
    import tensorflow_datasets as tfds

    builder = find(name, data_dir)
    bundled = builder.name in BUILDERS
    log.info("preparing %s in %s", name, builder.data_dir)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with locked(pathlib.Path(builder.data_dir_root) / f".{builder.name}.lock"), _quiet(prints=bundled):
            if not builder.is_prepared():
                builder.download_and_prepare(file_format="array_record", download_config=config)
    except ImportError as error:
        fix = f"run pip install {error.name}, or prepare it on another machine and copy its data_dir"
        raise InputError(f"preparing {name!r} needs the package {error.name}; {fix}") from error
    except (requests.RequestException, tfds.download.DownloadError, ConnectionError) as error:
        raise InputError(f"{name!r} cannot be downloaded, check the network: {one_line(error)}") from error
    except (OSError, AssertionError, ValueError) as error:
        raise InputError(f"{name!r} cannot be prepared in {builder.data_dir}: {one_line(error)}") from error
    if not find(name, data_dir).is_prepared():
        raise InputError(f"{builder.data_dir} is there but incomplete; remove it and prepare {name!r} again")
    return os.fspath(builder.data_dir)


@contextlib.contextmanager
def _quiet(*, prints: bool = False) -> Iterator[None]:
    """No absl warnings from TFDS; with `prints`, no progress bars and notes either, about a second's work."""
    import absl.logging
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import tqdm_utils

    verbosity, bars = absl.logging.get_verbosity(), tqdm_utils._active
    absl.logging.set_verbosity(absl.logging.ERROR)
    tfds.display_progress_bar(enable=bars and not prints)
    try:
        with contextlib.redirect_stdout(io.StringIO()) if prints else contextlib.nullcontext():
            yield
    finally:
        absl.logging.set_verbosity(verbosity)
        tfds.display_progress_bar(enable=bars)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
