"""Every family through the same invariances: a new family is a row of conftest.TINY and of ROWS here.

One device == eight, resume == a straight run bit for bit, bfloat16 close to float32, ten examples learned by
heart, plans, exports, quantizes. A family's programs are compiled once and shared by its tests.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shutil
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pytest
from conftest import MESHES, TINY, built, by_path, mesh_keys, random_batch, saved, start, steps, tiny

from bigmodel import train
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.checkpoint.digests import digest
from bigmodel.compress import quantize, recipe, trained
from bigmodel.config import InputError
from bigmodel.infer import export, loading, saved_model
from bigmodel.plan import estimate, flops, planner
from bigmodel.program import Program, State

# Momentum, decay and clipping, but no Adam: its first steps are near lr * sign(g), which turns a rounding
# error in a gradient that is almost zero into a full step. Without that amplification, ten float32 steps
# differ between meshes only by the order of sums: measured, 5e-7 of a loss or norm and 1.2e-7 in a parameter.
SGD = {"optim__name": "sgd", "optim__lr": 0.05, "optim__weight_decay": 0.01, "optim__schedule": "constant"}
ADAM = {"optim__name": "adam", "optim__schedule": "constant", "optim__weight_decay": 0.0, "batch_size": 10}
TEXT = {"model__vocab_size": 384, "seq_len": 32, "model__dropout": 0.1}


@dataclass(frozen=True)
class Row:
    """A family's own settings: how it learns ten examples, how exact it is, what it cannot do."""

    learns: dict[str, Any] | None = field(default_factory=lambda: {"optim__lr": 0.01})
    count: int = 60  # steps in which it does
    share: float = 0.1  # of its first loss that is left then
    rtol: float = 5e-6  # on another mesh, relative: of losses and norms
    atol: float = 2e-6  # absolute: of parameters
    alike: int = 3  # steps after which it is compared: a VGG's small variances magnify any rounding
    half: float = 0.02  # in bfloat16, relative: of losses
    data: dict[str, Any] = field(default_factory=lambda: {"data__name": "digits", "model__dropout": 0.1})
    products: bool = True  # has matrix products, whose weights can be quantized
    heavy: int = 0  # takes long to compile. 1: by default its mesh, resume and plan alone; 2: all are slow


TRANSFORMER = Row({"optim__lr": 1e-2, "model__width": 64}, count=150, data=TEXT)
STATISTICS = {"rtol": 5e-5, "atol": 2e-5, "half": 0.05}  # a batch's own, which sum in another order
# A GAN's loss need not fall: its own tests look at what it draws.
GAN = Row(None, **STATISTICS, data={"data__name": "digits"})
RATINGS = {"data__name": "lowrank_ratings", "model__users": 1024, "model__items": 512}
ROWS = {
    "gpt": TRANSFORMER,
    "moe": dataclasses.replace(TRANSFORMER, heavy=1),
    "bert": TRANSFORMER,
    "t5": dataclasses.replace(TRANSFORMER, heavy=1),
    "vit": dataclasses.replace(TRANSFORMER, data=Row().data, heavy=1),
    "rnn": TRANSFORMER,
    "gru": dataclasses.replace(TRANSFORMER, heavy=2),
    "cnn": Row(data={"data__name": "digits"}),
    "mlp": Row(),
    "own_model": Row(data={"data__name": "digits"}, heavy=2),
    "alexnet": Row(heavy=2),
    "vgg": Row(**STATISTICS, alike=1, heavy=2),
    "resnet": Row(**STATISTICS, data={"data__name": "digits"}, heavy=1),
    "inception": Row(**STATISTICS, heavy=2),
    # Its own tests measure which boxes it finds again.
    "detector": Row({"optim__lr": 5e-3}, 100, 0.6, **STATISTICS, data={"data__name": "shapes"}, heavy=2),
    "gan": GAN,
    "sngan": dataclasses.replace(GAN, heavy=2),
    "wgan": dataclasses.replace(GAN, heavy=2),
    "recommender": Row({"optim__lr": 2e-2}, 300, 0.05, data=RATINGS, products=False),
    "ncf": Row({"optim__lr": 2e-2}, 300, 0.05, data=RATINGS, heavy=1),
    "two_tower": Row({"optim__lr": 2e-2}, 300, 0.05, data=RATINGS, heavy=1),
}
THREE = {"data": 2, "fsdp": 2, "tensor": 2}
EXPERTS = [{"expert": 2, "fsdp": 2, "tensor": 2}, {"expert": 4, "data": 2}]


def every(*meshes: dict[str, int], heavy: int = 1) -> list[Any]:
    """A parameter set for each family (and mesh).

    Families heavier than `heavy` are slow. Of meshes, default is the one of all three axes; the CNN, which
    compiles fast, goes over all.
    """
    found = []
    for name, row in ROWS.items():
        marks = [pytest.mark.slow] * (row.heavy > heavy)
        if not meshes:
            found.append(pytest.param(name, marks=marks, id=name))
        for axes in [*meshes, *(EXPERTS if name == "moe" else [])] if meshes else []:
            slow = [pytest.mark.slow] * (axes != THREE and name != "cnn")
            found.append(pytest.param(name, axes, marks=marks + slow, id=f"{name}-{axes}"))
    return found


@functools.cache
def compiled(family: str, **keys: Any) -> Program:
    """The tiny Program, whose train step is compiled already, once a session."""
    part = built(family, **keys)
    return dataclasses.replace(part, train_step=part.compile())


@dataclass(frozen=True)
class Trained:
    """Three steps on one device."""

    rows: dict[str, np.ndarray]  # metric -> its values
    compared: State  # after `Row.alike` steps; on the host, as `last`
    last: State
    digest: str  # of the last one


@functools.cache
def trained_on_one(family: str) -> Trained:
    one, alike = compiled(family, **SGD), ROWS[family].alike
    batches = [random_batch(one.config, index) for index in range(3)]
    state, rows = steps(one, start(one), alike, batches)
    compared = jax.device_get(state)
    if alike < 3:
        state, _ = steps(one, state, 3 - alike, batches[alike:])
    return Trained(rows, compared, jax.device_get(state), digest(state))


def test_each_family_has_a_row():
    assert ROWS.keys() == TINY.keys()


@pytest.mark.parametrize(("family", "axes"), every(*MESHES))
def test_a_mesh_computes_what_one_device_computes(family, axes):
    row, many = ROWS[family], compiled(family, **SGD, **mesh_keys(axes))
    (state, rows), one = steps(many, start(many), row.alike), trained_on_one(family)
    for name, values in one.rows.items():
        np.testing.assert_allclose(rows[name], values, rtol=row.rtol, atol=1e-6, err_msg=name)
    for tree in ("params", "rest"):
        ours, theirs = by_path(state[tree]), by_path(one.compared[tree])
        for path, value in theirs.items():
            np.testing.assert_allclose(ours[path], value, rtol=row.rtol, atol=row.atol, err_msg=path)


@pytest.mark.parametrize("family", every())
def test_a_restored_state_goes_on_as_if_it_had_never_stopped(family, tmp_path):
    one = compiled(family, **SGD)
    state, _ = steps(one, start(one), 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, {})
        checkpoints.wait()
        state = checkpoints.restore(one.state_spec)[0]
    state, _ = one.train_step(state, one.put(random_batch(one.config, 2)))
    assert digest(state) == trained_on_one(family).digest


@pytest.mark.parametrize("family", every(heavy=0))
def test_bfloat16_is_close_to_float32(family):
    half = compiled(family, **SGD, compute_dtype="bfloat16")
    _, rows = steps(half, start(half), 1)
    exact, limit = trained_on_one(family).rows, ROWS[family].half
    np.testing.assert_allclose(rows["loss"][0], exact["loss"][0], rtol=limit, atol=limit)
    np.testing.assert_allclose(rows["grad_norm"][0], exact["grad_norm"][0], rtol=5 * limit)
    assert rows["loss"][0] != exact["loss"][0]


@pytest.mark.parametrize("family", every(heavy=0))
def test_ten_examples_are_learned_by_heart(family):
    row = ROWS[family]
    if row.learns is None:
        pytest.skip("its loss need not fall: its own tests look at what it draws")
    part = compiled(family, **ADAM, **row.learns, steps=row.count)
    _, rows = steps(part, start(part), row.count, [random_batch(part.config)])
    assert rows["loss"][-1] < row.share * rows["loss"][0], rows["loss"][::10]
    if "accuracy" in rows:  # equal beginnings of texts that go on differently: at most 132 of 135 tokens
        assert rows["accuracy"][-1] > 0.975


# -------------------------------------------------------------------------- what comes before and after


@pytest.mark.parametrize("family", every())
def test_it_plans(family):
    """The receipt of the very program that the tests above ran on eight devices."""
    many = compiled(family, **SGD, **mesh_keys(THREE))
    receipt = planner.of_run(many, many.train_step)
    assert receipt["devices"] == 8
    assert receipt["parameters"] == sum(x.size for x in jax.tree.leaves(many.state_spec["params"]))
    assert receipt["model_flops_per_step"] == flops.model_flops(compiled(family, **SGD)) > 0
    state_bytes = sum(
        np.prod(s.sharding.shard_shape(s.shape), dtype=int) * s.dtype.itemsize
        for s in jax.tree.leaves(many.state_spec)
        if not jax.dtypes.issubdtype(s.dtype, jax.dtypes.prng_key)
    )
    assert receipt["peak_bytes"] > state_bytes


@pytest.mark.slow
@pytest.mark.parametrize("family", every())
def test_it_plans_for_chips_that_are_not_here(family):
    pytest.importorskip("libtpu")
    receipt = planner.plan(tiny(family, **run_keys(family), mesh__data=-1), "v5e:2x4").receipt
    assert (receipt["devices"], receipt["time_from"]) == (8, "libtpu")
    assert receipt["fits"]
    assert receipt["step_s"] > 0


@pytest.mark.parametrize("family", every(heavy=0))
def test_it_quantizes(family):
    """int8 weights take a quarter of the bytes, and the held-out loss stays."""
    dense = compiled(family, **SGD)
    placed = jax.tree.map(lambda s: s.sharding, dense.state_spec)
    state = jax.device_put(trained_on_one(family).last, placed)
    model = trained.Trained(dense, dense.evaluated(state), state["rest"], pathlib.Path("nowhere"))
    if not ROWS[family].products:
        with pytest.raises(InputError, match="quantize"):
            quantize.apply(model, recipe.QuantizeStep("int8"))
        return
    small = quantize.apply(model, recipe.QuantizeStep("int8"))
    batch = dense.put(random_batch(dense.config, 9))
    before, after = ({"params": m.params, "rest": m.rest} for m in (model, small))
    exact, weight = dense.eval_step(state, batch)["loss"]
    total, _ = small.program.eval_step(after, batch)["loss"]
    np.testing.assert_allclose(total, exact, rtol=0.03, atol=0.03 * float(weight))
    assert any(x.dtype == np.int8 for x in jax.tree.leaves(after))
    assert estimate.tree_bytes(after) < estimate.tree_bytes(before)


# ------------------------------------------------------------------------------------- a run of its own


def run_keys(family: str, corpus: str = "python_source") -> dict[str, Any]:
    """Keys of a short run on data that need no download."""
    keys = {"data__name": corpus, **ROWS[family].data}
    return keys | ({"data__image_size": 32} if family in ("vgg", "inception", "detector") else {})


@pytest.mark.slow
@pytest.mark.parametrize("family", every())
def test_a_stopped_run_ends_as_a_straight_one(family, corpus, tmp_path):
    """Dropout, masks, spans, negatives and augmentation are drawn anew; each comes back."""
    keys = run_keys(family, corpus) | {"steps": 6, "checkpoint__every_steps": 3, "eval__batches": 1}
    config = tiny(family, **keys, **mesh_keys(THREE), log__tensorboard=False, check__gradient="never")
    straight = train.run(config, tmp_path / "straight")
    train.run(config, tmp_path / "stopped")
    with Checkpoints(tmp_path / "stopped" / "checkpoints") as checkpoints:
        assert 3 in checkpoints.steps()
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "6")
    again = train.run(config, tmp_path / "stopped")
    assert (again.step, digest(again.state)) == (6, digest(straight.state))


@pytest.mark.slow
@pytest.mark.parametrize("family", every())
def test_an_export_computes_what_the_model_computes(family, corpus, tmp_path):
    config = tiny(family, **run_keys(family, corpus), batch_size=4)
    saved(tmp_path / "run", config)
    export.stablehlo(tmp_path / "run", tmp_path / "out")
    alone = saved_model.load(tmp_path / "out")
    part, state = loading.load(tmp_path / "run")
    rng, inputs = np.random.default_rng(0), {}
    for name in alone.signatures["forward"]:
        spec = part.batch_spec[name]
        x = rng.normal(size=spec.shape) if spec.dtype == np.float32 else np.ones(spec.shape)
        inputs[name] = x.astype(spec.dtype)
    model = jax.jit(lambda params, rest: part.model.apply(params, rest, inputs, key=None, train=False)[0])
    outputs = model(state["params"], state["rest"])
    expected = {name: x for name, x in outputs.items() if name not in export.INNER}
    for a, b in zip(*map(jax.tree.leaves, (alone("forward", inputs), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
