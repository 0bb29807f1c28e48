"""Compression: what is said to be smaller is smaller, and what comes out is an ordinary workdir."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    build,
    by_path,
    finish,
    mesh_keys,
    random_batch,
    run_script,
    start,
    start_script,
    steps,
    tiny,
)

from bigmodel import evaluate, infer, train, workdir
from bigmodel.compress import recipe, report, stages, trained
from bigmodel.config import InputError
from bigmodel.models import weights
from bigmodel.plan import estimate

DIGITS = {
    "data__data_dir": None, "steps": 6, "batch_size": 32, "log__tensorboard": False, "eval__batches": 2,
    "mesh__data": -1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch):
    monkeypatch.setattr(report, "ROUND_S", 1e-3)
    monkeypatch.setattr(report, "ROUNDS", 2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A trained cnn's workdir."""
    directory = tmp_path_factory.mktemp("dense") / "run"
    train.run(tiny("cnn", **DIGITS), directory)
    return directory


@pytest.fixture(scope="module")
def gpt(tmp_path_factory, corpus):
    """A trained gpt's workdir."""
    directory = tmp_path_factory.mktemp("gpt") / "run"
    keys = {"data__name": corpus, "model__vocab_size": 264, "data__eval_split": "train"}
    train.run(tiny("gpt", **DIGITS | keys), directory)
    return directory


# ------------------------------------------------------------------------------------------------ recipes


def test_recipes_as_text_and_as_yaml_say_the_same(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "- [finetune: {steps: 7}, 'finetune:8']\n- quantize: int4\n- quantize: {kind: int4, group: 32}\n"
    )
    text = "finetune:7+finetune:8,quantize:int4,quantize:int4:group=32"
    assert [s.ops for s in recipe.parse(text)] == [s.ops for s in recipe.parse(str(path))]
    assert recipe.parse(text)[2].ops == (recipe.Quantize("int4", 32),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quantise:int8", "'quantize'"),
        ("quantize:int7", "'int8'"),
        ("quantize:grp=3", "'quantize.group'"),
        ("quantize:int8,,finetune", "empty stage"),
        ("finetune:0", "1 or more"),
        ("missing.yaml", "YAML"),
    ],
)
def test_a_bad_recipe_names_its_step_and_the_fix(text, said):
    with pytest.raises(InputError, match=said):
        recipe.parse(text)


# ---------------------------------------------------------------------------------------------- quantizing


def test_packing_is_exact_for_every_code():
    codes = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (3, 4, 7)), jnp.int8)
    packed = weights.pack(codes)
    assert packed.nbytes == 3 * 4 * 4
    assert (weights.unpack(packed, 7) == codes).all()


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(("shape", "sums"), [((3, 3, 8, 5), (-4, -3, -2)), ((6, 8), (-1,))])
def test_rounding_is_off_by_half_a_step_of_its_own_group(kind, shape, sums):
    w = jax.random.normal(jax.random.key(0), shape) * jnp.linspace(0.1, 9, shape[-1])

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def error(group, search):
        held = weights.quantize(w, sums, kind, group, search)
        return jnp.abs(held.astype(jnp.float32) - w), weights.spread(held.scale, w.shape), held.scale

    for group in (0, 4):
        off, step, scale = error(group, False)
        assert (off <= 0.5001 * step * (32 if kind == "fp8" else 1)).all()  # a float's steps grow
        assert scale.size <= w.size // (4 if group else 6)
    assert jnp.square(error(4, True)[0]).sum() <= jnp.square(off).sum()


def test_zero_weights_stay_zero():
    w = jnp.zeros((4, 4)).at[0, 0].set(1.0)
    for kind in ("int8", "int4"):
        assert (weights.quantize(w, (-2,), kind).astype(jnp.float32) == w).all()


@pytest.mark.parametrize(("family", "kind"), [("cnn", "int8"), ("moe", "int4")])
def test_planned_bytes_are_live_bytes_and_a_fraction_of_dense(family, kind):
    built = build(tiny(family, quantize__weights=kind))
    state = start(built)
    assert estimate.tree_bytes(built.state_spec) == sum(x.nbytes for x in jax.tree.leaves(state))
    sums = built.model.products
    names = [name for name in sums if "router" not in name]
    dense_bytes = sum(x.size * 4 for path, x in by_path(built.model.whole_spec).items() if path in names)
    codes = sum(x.nbytes for x in jax.tree.leaves(state["rest"]["codes"]))
    assert codes * {"int8": 4, "int4": 8}[kind] == dense_bytes


def test_a_quantized_model_computes_alike_on_one_device_and_on_a_mesh():
    values = []
    for sizes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
        keys = {"quantize__weights": "int4", "quantize__group": 16, "model__depth": 1}
        config = tiny("gpt", **keys, **mesh_keys(sizes))
        built = build(config)
        state = start(built)
        values.append(jax.device_get(built.eval_step(state, built.put(random_batch(config, 0)))))
    assert values[0]["loss"][0] == pytest.approx(values[1]["loss"][0], rel=1e-5)


def test_training_a_quantized_model_leaves_its_codes_and_lowers_the_loss():
    built = build(tiny("cnn", quantize__weights="int8"))
    first = start(built)
    codes = jax.device_get(first["rest"]["codes"])
    state, metrics = steps(built, first, 6, [random_batch(built.config, 0)])
    assert metrics["loss"][-1] < metrics["loss"][0]
    jax.tree.map(np.testing.assert_array_equal, codes, jax.device_get(state["rest"]["codes"]))


# -------------------------------------------------------------------------------------------- from end to end


def test_a_compressed_workdir_is_a_workdir(dense, tmp_path):
    out = tmp_path / "out"
    rows = stages.run(dense, recipe.parse("finetune:2,quantize:int8"), out)
    assert [row["stage"] for row in rows] == ["dense", "finetune:2", "quantize:int8"]
    assert rows[0]["memory_bytes"] / rows[2]["memory_bytes"] > 3
    assert rows[0]["params"] == rows[2]["params"]
    told = json.loads((out / "report.json").read_text())["stages"]
    for row in told:
        assert set(row["latency_s"]) == {"1", "32"}
        assert all(value > 0 for value in row["latency_s"].values())
        assert row["joules_per_example"]["1"] > 0
        assert row["joules_from"].startswith(("measured", "modelled"))
    assert (out / "report.png").stat().st_size > 1000
    program, state = infer.load(out)
    again = evaluate.run(program, state, trained.eval_data(trained.load(out)))
    assert again == pytest.approx(told[-1]["metrics"], rel=1e-5)
    config = workdir.read_config(out)
    assert train.run(config.replace(steps=config.steps + 2), out).step == config.steps + 2  # goes on


def test_a_language_model_shrinks_on_disk_too(gpt, tmp_path):
    rows = stages.run(gpt, recipe.parse("quantize:int4:group=16"), tmp_path / "out")
    assert rows[1]["memory_bytes"] < 0.3 * rows[0]["memory_bytes"]
    assert rows[1]["disk_bytes"] < rows[0]["disk_bytes"]
    ran = run_script("generate.py", f"--workdir={tmp_path / 'out'}", "--length=3", "--prompt=mesh")
    assert ran.code == 0, ran


def test_codes_take_their_true_size_on_disk():
    w = jax.random.normal(jax.random.key(0), (512, 1024))
    for kind, share in (("int8", 1 / 4), ("int4", 1 / 8)):
        held = jax.jit(weights.quantize, static_argnums=(1, 2))(w, (-2,), kind)
        assert report._disk_bytes({"codes": held.codes, "scale": held.scale}) < 1.03 * share * w.nbytes


def test_pareto_keeps_what_nothing_beats():
    assert report.pareto([1, 2, 3, 3], [3, 2, 1, 2]) == [0, 1, 2]


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("recipe_text", "said"),
    [
        ("quantize:int8:on=nowhere", "nowhere"),
        ("quantize:int8,quantize:int8", "already"),
        ("finetoon", "finetune"),
    ],
)
def test_bad_recipes_leave_the_output_untouched(dense, tmp_path, recipe_text, said):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=said):
        stages.run(dense, recipe.parse(recipe_text), out)
    assert list(tmp_path.iterdir()) == []


def test_bad_workdirs_are_one_line_and_exit_code_2(dense, tmp_path):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    shutil.copyfile(dense / "config.json", empty / "config.json")
    shutil.copytree(dense, broken)
    for path in (broken / "checkpoints").rglob("*"):
        if path.is_file() and "ocdbt.process" in str(path) and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    running = [
        start_script("compress.py", f"--workdir={where}", "--recipe=quantize:int8", f"--out={tmp_path}/out")
        for where in (tmp_path / "none", empty, broken)
    ]
    for process, said in zip(running, ("config.json", "no checkpoint", "no good checkpoint"), strict=True):
        code, _, err = finish(process)
        assert code == 2, err
        assert said in err
        assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    assert not pathlib.Path(tmp_path / "out").exists()


def test_an_output_directory_that_holds_something_is_refused(dense, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(InputError, match="not an empty directory"):
        stages.run(dense, recipe.parse("quantize:int8"), tmp_path)
    assert (tmp_path / "kept").read_text() == "mine"
