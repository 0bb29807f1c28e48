"""A compiled Program, as much of it as a plan needs, and its cache on disk.

Compiling for a large target takes minutes; reading what came out takes a second. So the scheduled text and
the memory figures are cached on disk, by the hash of the lowered program, options, target and compiler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
from dataclasses import dataclass
from typing import Any

import jax

from bigmodel import disk
from bigmodel.config import InputError
from bigmodel.plan.target import Target
from bigmodel.program import Program

VERSION = 2  # of the files
COMPILERS = {"libtpu": "libtpu", "cuda": "jax-cuda13-pjrt"}  # packages; else jaxlib's own


@dataclass(frozen=True)
class Compiled:
    """`text` is the scheduled HLO of one device's program; bytes are one device's, as XLA counts them."""

    text: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # of the output, what lies where an argument was
    temporary_bytes: int
    peak_bytes: int  # what is live at once, the host's memory included, where the compiler says; else 0
    host_bytes: int = 0  # temporaries in the host's memory


def of(executable: Any, *, text: bool = True) -> Compiled:
    """Reads a result of `jax.stages.Lowered.compile`. Args: text: False leaves the text empty."""
    analysis = executable.memory_analysis()
    return Compiled(
        executable.as_text() if text else "",
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
        getattr(analysis, "peak_memory_in_bytes", 0),
        getattr(analysis, "host_temp_size_in_bytes", 0),
    )


def compile_for(program: Program, target: Target, folder: pathlib.Path | None) -> Compiled:
    """The program, compiled for the target: from `folder` if it ever was, else compiled now and cached there.

    Raises:
        jax.errors.JaxRuntimeError: the compiler's error; cached and raised again where memory is short.
    """
    lowered = program.lower()
    path = folder and folder / "plans" / f"{_key(program, target, lowered.as_text())}.json.gz"
    if path is not None and (found := _read(path)):
        if "refused" in found:
            raise jax.errors.JaxRuntimeError(found["refused"])
        return Compiled(**found)
    try:
        made = of(lowered.compile(dict(program.config.compiler_options)))
    except jax.errors.JaxRuntimeError as error:
        if path is not None and is_out_of_memory(str(error)):
            _write(path, {"refused": str(error)})
        raise
    if path is not None:
        _write(path, dataclasses.asdict(made))
    return made


def is_out_of_memory(text: str) -> bool:
    """True where a compiler's error says that the program needs more memory than there is."""
    return "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text


def _key(program: Program, target: Target, text: str) -> str:
    package = COMPILERS.get(target.compiler, "jaxlib")
    flags = os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", "")
    order = [getattr(device, "id", 0) for device in program.mesh.devices.flat]
    options = json.dumps(dict(program.config.compiler_options), sort_keys=True)
    facts = (
        VERSION,
        target.spec,
        target.compiler,
        importlib.metadata.version(package),
        flags,
        order,
        options,
    )
    return hashlib.sha256((repr(facts) + text).encode()).hexdigest()[:32]


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """The cached values; None where there are none, or they are damaged."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        found = json.loads(gzip.decompress(path.read_bytes()))
        if "refused" in found or found.keys() == {f.name for f in dataclasses.fields(Compiled)}:
            return found
    return None


def _write(path: pathlib.Path, values: dict[str, Any]) -> None:
    with contextlib.suppress(InputError):  # a cache that cannot be written costs only time
        packed = gzip.compress(json.dumps(values).encode(), 6)
        disk.write_atomically(path, lambda file: file.write(packed))
