"""Which parameters are evaluated: the same for everyone, with an average, frozen parameters, adapters."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from conftest import build, by_path, random_batch, start, tiny

from bigmodel import workdir
from bigmodel.checkpoint import teachers, transfer
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.compress import trained
from bigmodel.config import Config
from bigmodel.infer import export, loading
from bigmodel.infer.predict import Predictor
from bigmodel.program import State

PARTS: dict[str, dict[str, Any]] = {
    "ema": {"optim__ema_decay": 0.9},
    "freeze": {"optim__freeze": "^/convs/0/"},
    "lora": {"lora__rank": 2, "lora__on": "/hidden/", "lora__train": "^/head/"},
    "aware": {"quantize__weights": "int8", "quantize__aware": True},
}
FAST = (("ema",), ("ema", "freeze"), ("ema", "lora"), ("lora", "aware"), tuple(PARTS))
COMBINATIONS = [
    pytest.param(c, id="+".join(c), marks=() if c in FAST else pytest.mark.slow)
    for n in range(len(PARTS) + 1)
    for c in itertools.combinations(PARTS, n)
]


def kept(directory: pathlib.Path, config: Config) -> tuple[State, dict[str, np.ndarray]]:
    """A run whose average is far from its parameters -> (its state, what is to be evaluated)."""
    built = build(config)
    state, rng = start(built), np.random.default_rng(0)

    def any_values(x: jax.Array) -> jax.Array:
        return jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    for part in {"params", "ema"} & state.keys():
        state[part] = jax.tree.map(any_values, state[part])
    directory.mkdir()
    workdir.write_config(directory, config)
    with Checkpoints(directory / "checkpoints", async_save=False) as checkpoints:
        checkpoints.save(3, state, {})
    expected = {path: np.array(x) for path, x in by_path(state["params"]).items()}
    for path, x in by_path(state.get("ema", {})).items():
        expected[path] = np.array(x).astype(expected[path].dtype)
    return state, expected


def assert_same(tree: Any, expected: dict[str, np.ndarray]) -> None:
    got = by_path(tree)
    assert got.keys() == expected.keys()
    for path, x in got.items():
        assert x.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(x, expected[path], err_msg=path)


@pytest.mark.parametrize("parts", COMBINATIONS)
def test_everyone_evaluates_the_same_parameters(parts, tmp_path):
    keys = {key: value for part in parts for key, value in PARTS[part].items()}
    config = tiny("cnn", **keys)
    state, expected = kept(tmp_path / "run", config)
    if "ema" in parts:
        averaged = by_path(state["ema"]).keys()
        assert (averaged == expected.keys()) == (not {"freeze", "lora"} & set(parts))
    assert_same(build(config).evaluated(state), expected)
    built, loaded = loading.load(tmp_path / "run")
    assert_same(loaded["params"], expected)
    assert_same(built.evaluated(loaded), expected)
    assert_same(trained.load(tmp_path / "run").params, expected)
    assert_same(Predictor(built, loaded)._state[0], expected)
    student = build(tiny("cnn", model__width=8, distill__teacher=str(tmp_path / "run")))
    assert_same(teachers.taught(student)["params"], expected)
    whole = jax.device_get(jax.jit(built.model.plain)(loaded["params"], loaded["rest"]))
    _, arrays = transfer.read(tmp_path / "run")
    for path, x in by_path(whole).items():
        np.testing.assert_allclose(arrays[path], x, rtol=1e-6, atol=1e-7, err_msg=path)
    names, weights, _ = export._weights(built, loaded)
    if not {"lora", "aware"} & set(parts):
        assert_same(dict(zip(names, weights, strict=True)), expected)


def test_evaluation_in_training_and_after_it_is_the_same(tmp_path):
    """With adapters, an average and parameters of 16 bits, whose average has 32."""
    keys = {**PARTS["ema"], "lora__rank": 2, "lora__on": "/attention/", "param_dtype": "bfloat16"}
    config = tiny("gpt", **keys)
    state, expected = kept(tmp_path / "run", config)
    part, batch = build(config), random_batch(config)
    while_training = part.eval_step(state, part.put(batch))["loss"][0]
    built, loaded = loading.load(tmp_path / "run")
    assert_same(loaded["params"], expected)
    assert float(built.eval_step(loaded, built.put(batch))["loss"][0]) == pytest.approx(
        float(while_training), rel=1e-5
    )
    as_it_is = {**state, "ema": jax.tree.map(lambda x: x * 0, state["ema"])}
    assert float(part.eval_step(as_it_is, part.put(batch))["loss"][0]) != float(while_training)
    student = build(tiny("gpt", param_dtype="bfloat16", distill__teacher=str(tmp_path / "run")))
    assert_same(teachers.taught(student)["params"], expected)
