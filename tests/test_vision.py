"""Vision models: published sizes, BatchNorm, and that each family learns."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, batch_spec, build, built, by_path, random_batch, start, steps, tiny

from bigmodel import config as config_lib
from bigmodel import evaluate, mesh, models, program, tasks, train
from bigmodel.config import InputError
from bigmodel.data import open_source
from bigmodel.models import ops
from bigmodel.plan import estimate, flops
from bigmodel.tasks import make_pipeline
from bigmodel.tasks.base import ReportTo
from bigmodel.tasks.labels import softmax

SGD = {"optim__name": "sgd", "optim__lr": 0.05, "optim__weight_decay": 0.01, "optim__schedule": "constant"}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("alexnet", "vgg", "inception", "resnet")]


def define(size: int, **model: Any) -> Any:
    model = {"num_classes": 1000, **model}
    config = config_lib.from_dict({"model": model, "task": {"name": "classify"}, "batch_size": 2})
    return models.define(config, {"image": jax.ShapeDtypeStruct((2, size, size, 3), np.float32)})


@pytest.mark.parametrize(
    ("size", "model", "count"),
    [  # all: torchvision.models, the table of classification weights; v1.5 and the original have equal sizes
        (224, {"name": "alexnet"}, 61_100_840),
        (224, {"name": "vgg", "depth": 11}, 132_863_336),
        (224, {"name": "vgg", "depth": 13}, 133_047_848),
        (224, {"name": "vgg", "depth": 16}, 138_357_544),
        (224, {"name": "vgg", "depth": 19}, 143_667_240),
        (224, {"name": "vgg", "depth": 16, "batch_norm": True}, 138_365_992),
        (224, {"name": "inception", "version": "v1"}, 6_624_904),
        (224, {"name": "inception", "version": "v1", "aux": True}, 13_004_888),
        (299, {"name": "inception", "version": "v3"}, 23_834_568),
        (299, {"name": "inception", "version": "v3", "aux": True}, 27_161_264),
        (224, {"name": "resnet", "depth": 18}, 11_689_512),
        (224, {"name": "resnet", "depth": 34}, 21_797_672),
        (224, {"name": "resnet", "depth": 50}, 25_557_032),
        (224, {"name": "resnet", "depth": 101}, 44_549_160),
        (224, {"name": "resnet", "depth": 152}, 60_192_808),
    ],
    ids=str,
)
def test_published_parameter_counts(size, model, count):
    assert estimate.parameters(define(size, **model).params_spec) == count


def test_images_too_small_are_refused():
    with pytest.raises(InputError, match=r"model\.name=vgg.*32 pixels.*data\.image_size"):
        define(28, name="vgg")
    with pytest.raises(InputError, match=r"model\.stem=small"):
        define(32, name="alexnet")


def test_without_hidden_layers_it_is_logistic_regression():
    part = built(
        "mlp",
        model__widths=(),
        **SGD
        | {"optim__weight_decay": 0.0, "optim__clip_norm": 0.0, "optim__b1": 0.0, "optim__warmup_steps": 0},
    )
    batch = random_batch(part.config)
    x_BD, is_BV = batch["image"].reshape(len(batch["label"]), -1), np.eye(10)[batch["label"]]
    kernel_DV, bias_V = np.zeros((x_BD.shape[1], 10)), np.zeros(10)
    for _ in range(3):
        error_BV = softmax(x_BD @ kernel_DV + bias_V) - is_BV
        kernel_DV -= 0.05 * x_BD.T @ error_BV / len(x_BD)
        bias_V -= 0.05 * error_BV.mean(0)
    state, _ = steps(part, start(part), 3, [batch])
    found = by_path(state["params"])
    np.testing.assert_allclose(found["classifier/head/kernel"], kernel_DV, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found["classifier/head/bias"], bias_V, rtol=1e-3, atol=1e-6)


def test_batch_norm_is_the_formula_and_keeps_float32():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(3, 2, (2, 6, 4, 4, 5)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 5)).astype(np.float32)

    def plain(x: Any, scale: Any, bias: Any) -> jax.Array:
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    ours = jax.jit(jax.value_and_grad(lambda *a: (ops.batch_norm(*a, 1e-5)[0] * weights).sum(), (0, 1, 2)))
    theirs = jax.jit(jax.value_and_grad(lambda *a: (plain(*a) * weights).sum(), (0, 1, 2)))
    for a, b in zip(*map(jax.tree.leaves, (ours(x, scale, bias), theirs(x, scale, bias))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    half = ops.batch_norm(jnp.asarray(x, jnp.bfloat16), scale, bias, 1e-5)
    assert (half[0].dtype, half[1].dtype) == (jnp.bfloat16, jnp.float32)


def test_running_statistics_are_what_evaluation_uses():
    part = built("resnet", **SGD)
    state = start(part)
    batch = random_batch(part.config)
    before = by_path(jax.device_get(state["rest"]))
    state, _ = steps(part, state, 1, [batch])
    after = by_path(state["rest"])
    assert after.keys() == before.keys()
    assert all((after[path] != before[path]).any() for path in before)
    loss = part.eval_step(state, part.put(batch))["loss"][0]
    fresh = dict(state, rest=jax.tree.map(jnp.zeros_like, state["rest"]))
    assert loss != part.eval_step(fresh, part.put(batch))["loss"][0]


@pytest.mark.slow
def test_microbatches_move_the_running_statistics_each():
    part = built("resnet", **SGD, microbatches=2)
    state, rows = steps(part, start(part), 2)
    assert np.isfinite(rows["loss"]).all()
    assert int(state["step"]) == 2


def test_padded_pools_are_those_of_the_frameworks():
    x = np.arange(2 * 7 * 7, dtype=np.float32).reshape(1, 7, 7, 2)
    same = ops.avg_pool(x, (3, 3), (1, 1), "SAME")
    assert same.shape == x.shape
    np.testing.assert_allclose(same[0, 3, 3], x[0, 2:5, 2:5].mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(same[0, 0, 0], x[0, :2, :2].sum((0, 1)) / 9, rtol=1e-6)
    padded = ops.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    assert padded.shape == (1, 4, 4, 2)
    np.testing.assert_array_equal(padded[0, 0, 0], x[0, 1, 1])


@pytest.mark.slow
def test_auxiliary_classifiers_train_and_are_gone_in_evaluation():
    part = built("inception", **SGD, model__aux=True)
    state, rows = steps(part, start(part), 1)
    plain = built("inception", **SGD)
    _, without = steps(plain, start(plain), 1)
    assert rows["loss"][0] > without["loss"][0] + 0.5  # two more losses near log 10, times 0.3 each
    spec = batch_spec(part.config)
    out = jax.eval_shape(
        lambda p, r, b: part.model.apply(p, r, b, key=None, train=False)[0]["logits"],
        state["params"],
        state["rest"],
        spec,
    )
    assert out.shape == (8, 10)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_builds(path):
    config = tasks.sized(config_lib.load(path, {"microbatches": 1}))
    whole = program.build(config, mesh.make_mesh(config, jax.devices()[:1]), batch_spec(config))
    assert flops.model_flops(whole) > 0


@pytest.mark.slow
def test_a_stopped_run_with_augmentation_ends_as_a_straight_one(tmp_path):
    keys = {"data__augment": "crop:1,flip,randaugment:1:5,erase:0.3", "data__mixup": 0.3, "data__cutmix": 0.5}
    keys |= {"data__name": "digits", "data__balance": "sqrt", "task__class_weights": "balanced"}
    keys |= {"eval__batches": 1, "log__tensorboard": False, "log__every_steps": 1, "steps": 4}
    config = tiny("mlp", **keys)
    whole = train.run(config, tmp_path / "straight")
    half = dataclasses.replace(config, checkpoint=config_lib.Checkpoint(every_steps=2))
    train.run(half, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "4")
    again = train.run(half, tmp_path / "stopped")
    for path, value in by_path(whole.state).items():
        np.testing.assert_array_equal(value, by_path(again.state)[path], err_msg=path)


def test_evaluation_sees_each_example_once_and_draws(tmp_path):
    keys = {"data__name": "digits", "log__tensorboard": False, "batch_size": 64, "steps": 2}
    result = train.run(tiny("mlp", **keys, eval__batches=-1), tmp_path)
    pipeline = make_pipeline(result.program.config, "eval")
    examples = evaluate.collect(result.program, result.state, pipeline)
    source = open_source("digits", "test")
    np.testing.assert_array_equal(examples["label"], source.read(np.arange(len(source)))["label"])
    to = ReportTo(tmp_path / "evaluation", read=pipeline.read, about="digits")
    report = evaluate.report(result.program, examples, to)
    assert report["examples"] == np.sum(report["confusion"]) == len(source)
    for name in ("accuracy", "top5"):
        assert report[name] == pytest.approx(result.metrics[f"eval/test/{name}"], abs=1e-6)
    names = {path.stem for path in (tmp_path / "evaluation").iterdir()}
    assert (
        names
        == {"calibration", "confusion", "mistakes", "pr", "roc"}
        == {pathlib.Path(path).stem for path in report["pictures"]}
    )
    score = softmax(examples["output"])
    wrong = np.flatnonzero(score.argmax(1) != examples["label"])
    worst = wrong[score.max(1)[wrong].argmax()]
    first = report["mistakes"][0]
    assert first["index"] == worst
    assert (first["label"], first["prediction"]) == (
        str(examples["label"][worst]), str(score[worst].argmax()),
    )  # fmt: skip
    np.testing.assert_array_equal(
        pipeline.read(np.array([worst]))["image"], pipeline[worst // 64]["image"][[worst % 64]]
    )


def test_an_example_has_its_number_in_the_split(tmp_path):
    config = tiny("mlp", data__name="digits", batch_size=64, eval__batches=2)
    part, source = build(config), open_source("digits", "test")
    examples = evaluate.collect(part, start(part), make_pipeline(config, "eval"))
    assert len(examples["index"]) == 128 < len(source)
    np.testing.assert_array_equal(source.read(examples["index"])["label"], examples["label"])
