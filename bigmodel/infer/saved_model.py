"""Loads an exported model. This file goes with every export; it needs jax, and flatbuffers for jax.export.

    import saved_model
    model = saved_model.load("DIR")
    print(model.signatures)
    outputs = model("forward", {"tokens": ..., "segments": ..., "positions": ...})

Language models have three functions: `forward`, the logits of whole sequences; `prefill`, `tokens` [b, L]
and `lengths` [b] -> `logits` [b, V] of what follows, and `cache`; `decode`, `token` [b], `at` [b] (its
position) and `cache` -> the same. Any b will do.

The digests in model.json tell damage, not malice: a program may call whatever the runtime has registered, so
load what you trust.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import struct
from typing import Any

import jax
import numpy as np
from jax import export

TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32"}
TYPES |= {"I8": "int8", "U8": "uint8", "I64": "int64", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn"}
MALFORMED = (struct.error, LookupError, TypeError, AttributeError, ValueError, RecursionError, OverflowError)


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """A .safetensors file -> its arrays by name. Raises ValueError for one that is cut short or malformed."""
    return _arrays(path, path.read_bytes())


def _arrays(path: pathlib.Path, content: bytes) -> dict[str, np.ndarray]:
    try:
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        data, out = memoryview(content)[8 + size :], {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            dtype = jax.numpy.dtype(TYPES[entry["dtype"]])
            if not 0 <= first <= last <= len(data):
                raise ValueError(f"{name} lies outside the file")
            out[name] = np.frombuffer(data[first:last], dtype).reshape(entry["shape"])
        return out
    except MALFORMED as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def _checked(path: pathlib.Path, digests: dict[str, str]) -> bytes:
    """A file's content. Raises ValueError where it is not what was exported."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digests.get(path.name):
        raise ValueError(f"{path} is damaged, or not of this export (SHA-256 differs); export it again")
    return content


class Model:
    """Exported functions with their weights.

    Raises:
        ValueError: a file is damaged: malformed, or not what its digest in model.json says.
    """

    def __init__(self, directory: str | pathlib.Path) -> None:
        path = pathlib.Path(directory)
        try:
            about = json.loads((path / "model.json").read_bytes().decode("utf-8"))
            self.config: dict[str, Any] = about["config"]
            functions, weights = list(about["functions"]), list(about["weights"])
            digests = dict(about["sha256"])
        except MALFORMED as error:
            raise ValueError(f"{path / 'model.json'} is damaged: {error!r}; export it again") from error
        weights_path = path / "weights.safetensors"
        arrays = _arrays(weights_path, _checked(weights_path, digests))
        if missing := sorted(set(weights) - arrays.keys()):
            raise ValueError(f"{weights_path} has no array {missing[0]!r}")
        self._weights = [jax.device_put(arrays[name]) for name in weights]
        self._functions = {
            name: export.deserialize(bytearray(_checked(path / f"{name}.stablehlo", digests)))
            for name in functions
        }
        self._calls = {name: jax.jit(function.call) for name, function in self._functions.items()}

    @property
    def signatures(self) -> dict[str, Any]:
        """Each function's inputs, as (shape, dtype)."""

        def inputs(function: export.Exported) -> Any:
            (_, given), _ = jax.tree.unflatten(function.in_tree, function.in_avals)
            return jax.tree.map(lambda x: (str(x.shape), str(x.dtype)), given)

        return {name: inputs(function) for name, function in self._functions.items()}

    def __call__(self, name: str, inputs: dict[str, Any]) -> Any:
        # NumPy's are copied: on a CPU jax may still be reading one when the caller next changes it in place.
        copied = jax.tree.map(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, inputs)
        return self._calls[name](self._weights, copied)


def load(directory: str | pathlib.Path) -> Model:
    """The model that was exported to `directory`."""
    return Model(directory)
