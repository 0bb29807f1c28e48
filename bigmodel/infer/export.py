"""Exports a trained model as StableHLO, which runs wherever JAX runs, without this package.

The functions contain no weights: these are stored next to them, in safetensors. A batch may be of any size.
One program serves CPUs, NVIDIA GPUs and TPUs, so it uses no kernel that only one of them has.

Legend: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from safetensors import SafetensorError
from safetensors.flax import save_file

from bigmodel import config as config_lib
from bigmodel import disk, trees
from bigmodel.config import InputError
from bigmodel.data import fitted
from bigmodel.infer import decode as decode_lib
from bigmodel.infer import loading, saved_model
from bigmodel.infer.decode import LanguageModel, context
from bigmodel.models import cache
from bigmodel.program import Program, State

INNER = ("losses", "aux_logits", "features")  # outputs that training alone reads: not exported
PLATFORMS = ("cpu", "cuda", "tpu")
Inputs = Mapping[str, Any]


def stablehlo(directory: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[str]:
    """Exports the run in `directory` to a new directory with functions, weights and a loader -> file names.

    Raises:
        InputError: no run there, `out` exists, or it cannot be written.
    """
    target = pathlib.Path(out)
    if target.exists():
        raise InputError(f"--out={target} exists; give a new directory")
    if not target.parent.is_dir():
        raise InputError(f"--out={target}: {target.parent} is no directory; make it")
    built, state = loading.load(directory)
    names, weights, tree = _weights(built, state)
    functions = {"forward": _forward(built)}
    if built.config.task.generates:
        lm = LanguageModel.of(built)
        functions |= text_functions(lm) if lm.caches and lm.continues else {}
    with disk.writing(target), disk.new_directory(target, "--out") as made:
        for name, (function, inputs) in functions.items():
            exported = _export(function, tree, weights, inputs)
            (made / f"{name}.stablehlo").write_bytes(exported.serialize())
        _write_weights(made / "weights.safetensors", dict(zip(names, weights, strict=True)))
        about: dict[str, Any] = {"functions": list(functions), "weights": names}
        about["fitted"] = dict(fitted.read(directory))  # how inputs are encoded, and the classes' names
        if (tokenizer := pathlib.Path(directory) / "tokenizer.json").is_file():
            shutil.copyfile(tokenizer, made / "tokenizer.json")
        about["sha256"] = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(made.iterdir())
        }
        disk.write_json(made / "model.json", about | {"config": config_lib.to_dict(built.config)})
        shutil.copy(saved_model.__file__, made / "saved_model.py")
    return sorted(path.name for path in target.iterdir())


def _write_weights(path: pathlib.Path, weights: dict[str, jax.Array]) -> None:
    try:
        save_file(weights, path)
    except SafetensorError as error:  # safetensors raises its own error when the disk is full
        raise OSError(str(error)) from error
    os.chmod(path, 0o644)


def _weights(built: Program, state: State) -> tuple[list[str], list[jax.Array], Any]:
    """-> (names, arrays, the tree they make): what `apply` takes, quantized weights in their places."""
    params, rest = built.model.unpacked(built.evaluated(state), state["rest"])
    leaves, tree = jax.tree_util.tree_flatten_with_path((params, rest))
    names = [trees.path_str(path).removeprefix("0/") for path, _ in leaves]
    return names, [jnp.asarray(leaf) for _, leaf in leaves], tree


def _export(function: Callable[..., Any], tree: Any, weights: list[jax.Array], inputs: Inputs) -> Any:
    def flat(weights: list[jax.Array], inputs: Inputs) -> Any:
        return function(*jax.tree.unflatten(tree, weights), inputs)

    specs = [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights]
    return export.export(jax.jit(flat), platforms=PLATFORMS)(specs, dict(inputs))


def _forward(built: Program) -> tuple[Callable[..., Any], Inputs]:
    """The forward pass with the specs of its inputs, for any B."""
    model = built.model.parameters_only()

    def forward(params: Any, rest: Any, batch: Inputs) -> Any:
        outputs, _ = model.apply(params, rest, batch, key=None, train=False)
        read = {name: x for name, x in outputs.items() if name not in INNER}
        return read["logits"] if read.keys() == {"logits"} else read

    (b,) = export.symbolic_shape("b")
    spec = {k: jax.ShapeDtypeStruct((b, *s.shape[1:]), s.dtype) for k, s in built.batch_spec.items()}
    return forward, {key: spec[key] for key in _read_by(built)}


def _read_by(built: Program) -> list[str]:
    """Names of the arrays of a batch that the outputs depend on."""

    def outputs(batch: Inputs, params: Any, rest: Any) -> Any:
        return built.model.apply(params, rest, batch, key=None, train=False)[0]

    batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype) for k, s in built.batch_spec.items()}
    specs = (built.model.params_spec, built.model.rest_spec)
    jaxpr = jax.make_jaxpr(outputs)(batch, *specs).jaxpr
    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    return [key for key, var in zip(sorted(batch), jaxpr.invars, strict=False) if id(var) in used]


def text_functions(lm: LanguageModel) -> dict[str, tuple[Callable[..., Any], Inputs]]:
    """`prefill` and `decode` of a language model as saved_model.py describes them, with their inputs."""
    length = context(lm.config)
    (b,) = export.symbolic_shape("b")

    def spec(rows: Any) -> dict[str, jax.ShapeDtypeStruct]:
        return cache.spec(lm.config.model, rows, lm.slots, lm.config.compute_dtype)

    def prefill(params: Any, rest: Any, inputs: Inputs) -> dict[str, Any]:
        tokens_BL, length_B = inputs["tokens"], inputs["lengths"]
        empty = {name: jnp.zeros(s.shape, s.dtype) for name, s in spec(tokens_BL.shape[0]).items()}
        state = {"cache": empty, "at": jnp.zeros_like(length_B)}
        logits_BV, state = decode_lib.prefill(lm, params, rest, state, tokens_BL, length_B)
        return {"logits": logits_BV, "cache": state["cache"]}

    def decode(params: Any, rest: Any, inputs: Inputs) -> dict[str, Any]:
        state = {**inputs, "left": jnp.ones_like(inputs["token"])}
        logits_BV, state = decode_lib.decode(lm, params, rest, state)
        return {"logits": logits_BV, "cache": state["cache"]}

    rows = jax.ShapeDtypeStruct((b,), jnp.int32)
    return {
        "prefill": (prefill, {"tokens": jax.ShapeDtypeStruct((b, length), jnp.int32), "lengths": rows}),
        "decode": (decode, {"token": rows, "at": rows, "cache": spec(b)}),
    }
