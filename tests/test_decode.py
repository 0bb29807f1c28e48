"""Prefill and decode: what is planned is what is run, and an export is made of the same two functions."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from conftest import build, start, tiny

from bigmodel import mesh
from bigmodel.infer import decode, export
from bigmodel.infer.decode import LanguageModel
from bigmodel.infer.decoder import Decoder
from bigmodel.infer.sampling import GREEDY
from bigmodel.infer.serving_plan import Compiler, greedy_turn
from bigmodel.plan import hlo, planner, target
from bigmodel.program import Program

KEYS: dict[str, dict[str, Any]] = {
    "dense": {"model__position": "rope", "model__kv_heads": 2},
    "int8": {"quantize__weights": "int8"},
    "bfloat16": {"compute_dtype": "bfloat16"},
}


def instructions(compiled: Any) -> Any:
    """A compiled program's instructions in the order of its schedule, without the names that XLA numbers."""
    found = hlo.parse(compiled.as_text())

    def listed(name: str) -> list[Any]:
        at = {i.name: index for index, i in enumerate(found.computations[name])}
        return [
            (i.opcode, i.literal, [(s.dtype, s.dims) for s in i.shapes], [at.get(o, o) for o in i.operands],
             [listed(called) for called in i.called])
            for i in found.computations[name]
        ]  # fmt: skip

    return listed(found.entry)


@functools.cache
def built(name: str) -> Program:
    return build(tiny("gpt", seq_len=32, batch_size=2, mesh__data=1, **KEYS[name]))


@functools.cache
def decoder(name: str) -> Decoder:
    return Decoder(built(name), start(built(name)))


def planned(name: str) -> Compiler:
    aim = target.here(tuple(built(name).mesh.devices.flat))
    return Compiler(planner.build(built(name).config, aim), aim)


@pytest.mark.parametrize(
    "name", ["dense", *(pytest.param(n, marks=pytest.mark.slow) for n in ("int8", "bfloat16"))]
)
def test_what_a_serving_plan_prices_is_what_the_decoder_runs(name):
    run, plan = decoder(name), planned(name)
    for rows, prompt in ((2, [3] * 5), (1, [3] * 32)):
        state, *padded = run.unread([prompt] * rows, [32] * rows, [GREEDY] * rows)
        if rows == plan.ways:
            first = run.programs.begin.lower(run.params, run.rest, state, *padded).compile()
            assert instructions(plan.lower_prefill(len(prompt)).compile()) == instructions(first)
        state = run.programs.begin(run.params, run.rest, state, *padded)
        more = run.programs.extend.lower(run.params, run.rest, state, np.int32(4)).compile()
        assert instructions(plan.lower_decode(rows).compile()) == instructions(more)


@pytest.mark.parametrize("name", ["dense", "int8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_weights_that_are_planned_are_those_that_are_run(name):
    run = decoder(name)
    spec = decode.weights_spec(built(name))
    found = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), (run.params, run.rest))
    assert jax.tree.map(lambda s: (s.shape, s.dtype, s.sharding), spec) == found


@pytest.mark.parametrize("keys", [{}, {"quantize__weights": "int8"}, {"lora__rank": 2, "lora__on": "/q/"}])
def test_a_mesh_splits_stored_weights_as_it_splits_weights(keys):
    config = tiny("gpt", batch_size=4, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, **keys)
    made = build(config)
    run = Decoder(made, start(made))
    for x in jax.tree.leaves(run.params):
        assert x.ndim < 2 or min(x.shape) < 2 or not x.is_fully_replicated
    specs = jax.tree.leaves(decode.weights_spec(made)[0])
    for x, s in zip(jax.tree.leaves(run.params), specs, strict=True):
        assert x.sharding.is_equivalent_to(s.sharding, x.ndim)
    assert mesh.batch_ways(made.mesh) == 4


@pytest.mark.parametrize("name", ["dense", "int8"])
def test_an_export_is_made_of_prefill_and_decode(name):
    """Its programs are those of the two functions, for any number of rows."""
    lm = LanguageModel.of(built(name))
    params, rest = decode.weights_spec(built(name))
    functions = export.text_functions(lm)
    rows = jax.ShapeDtypeStruct((3,), np.int32)
    cache = decode.cache_lib.spec(lm.config.model, 3, 32, "float32")  # type: ignore[arg-type]
    inputs = {"token": rows, "at": rows, "cache": cache}

    def by_hand(params: Any, rest: Any, inputs: Any) -> Any:
        state = {**inputs, "left": jax.numpy.ones_like(inputs["token"])}
        logits, state = decode.decode(lm, params, rest, state)
        return {"logits": logits, "cache": state["cache"]}

    def text(function: Any) -> str:
        return re.sub(r"@jit_\w+", "", jax.jit(function).lower(params, rest, inputs).as_text())

    assert text(functions["decode"][0]) == text(by_hand)


def test_a_plan_prices_one_greedy_id():
    """One turn of the loop over ids, and none of the work that only sampling takes."""
    text = planned("dense").lower_decode(2).compile().as_text()
    loops = [i for i in hlo.parse(text).computations[hlo.parse(text).entry] if i.opcode == "while"]
    found = hlo.parse(greedy_turn(text))
    branches = [i.called for body in found.computations.values() for i in body if i.opcode == "conditional"]
    assert branches
    assert all(len(called) == 1 for called in branches)
    assert len(loops) == 1
    assert [found.trip_count(i) for i in found.computations[found.entry] if i.opcode == "while"] == [1]
