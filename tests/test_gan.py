"""GANs: published sizes, whose gradient goes where, spectral norms, and what a run leaves behind."""

from __future__ import annotations

import functools
import json
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, built, by_path, random_batch, run_script, start, steps, tiny
from flax import nnx

from bigmodel import config as config_lib
from bigmodel import mesh, metrics, models, program, tasks, train
from bigmodel.config import InputError
from bigmodel.models import gan
from bigmodel.plan import estimate, flops
from bigmodel.tasks import make_pipeline

SGD = {"optim__name": "sgd", "optim__lr": 0.02, "optim__b1": 0.0, "optim__ema_decay": 0.0}
RESNET = {"model__arch": "resnet", "model__norm": "spectral", "task__gan_loss": "hinge"}
WGAN = {"model__arch": "dcgan", "model__norm": "none", "task__gan_loss": "wgan-gp"}
KINDS = [{}, RESNET, WGAN]
SLOW = pytest.mark.slow


def define(size: int, channels: int = 3, **model: Any) -> Any:
    config = config_lib.from_dict({"model": {"name": "gan", **model}, "task": {"name": "gan"}})
    spec = {"image": ((2, size, size, channels), np.float32), "serial": ((2,), np.int32)}
    spec["label"] = ((2,), np.int32)
    return models.define(config, {k: jax.ShapeDtypeStruct(*v) for k, v in spec.items()})


@pytest.mark.parametrize(
    ("size", "model", "generator", "discriminator"),
    [
        # pytorch/examples, dcgan/main.py: the sums of its layers
        (64, {}, 3_576_704, 2_765_568),
        # Miyato et al. 2018, table 4, as kwotsin/mimicry builds it (SNGAN, 32 pixels): the sums of its layers
        (32, {"arch": "resnet", "latent": 128, "width": 256, "discriminator_width": 128, "norm": "spectral"},
         4_276_739, 1_053_825),
    ],
    ids=["dcgan", "resnet"],
)  # fmt: skip
def test_published_parameter_counts(size, model, generator, discriminator):
    spec = define(size, **model).params_spec
    assert estimate.parameters(spec["generator"]) == generator
    assert estimate.parameters(spec["discriminator"]) == discriminator


@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("arch", ["dcgan", "resnet"])
def test_sizes_by_config(size, arch):
    model = define(size, 1, arch=arch, norm="spectral", width=4, discriminator_width=4, num_classes=10)
    spec = {"image": ((2, size, size, 1), np.float32), "serial": ((2,), np.int32), "label": ((2,), np.int32)}
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in spec.items()}
    run = lambda p, r, b: model.apply(p, r, b, key=None, train=False)[0]  # noqa: E731
    out = jax.eval_shape(run, model.params_spec, model.rest_spec, batch)
    assert out["image"].shape == batch["image"].shape
    assert out["real"].shape == out["fake"].shape == (2,)


def test_a_size_that_does_not_halve_is_refused():
    with pytest.raises(InputError, match=r"halves down to 4\.\.7 pixels, these have 30 x 30"):
        define(30)


def test_upsampling_is_a_transposed_convolution():
    layer = gan.Upsample(3, 5, dtype="float32", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 4, 6, 3))
    expected = jax.lax.conv_general_dilated(
        x, layer.kernel[...], (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("keys", [WGAN, *(pytest.param(k, marks=SLOW) for k in ({}, RESNET))], ids=str)
def test_one_gradient_is_each_networks_own(keys):
    """The summed loss's gradient equals those of two losses, each with the other network held still."""
    part = built("gan", **SGD, **keys)
    state, batch = part.init(jax.random.key(0)), random_batch(part.config)
    task, key = tasks.make(part.config), jax.random.key(5)
    names = ("loss", "discriminator_loss", "generator_loss")

    def losses(params: Any) -> tuple[jax.Array, ...]:
        outputs, _ = part.model.apply(params, state["rest"], batch, key=key, train=True)
        found = {name: total for name, (total, _) in task.terms(outputs, batch, True).items()}
        found["discriminator_loss"] += found.get("penalty_loss", 0.0)
        return tuple(found[name] for name in names)

    @jax.jit
    def gradients(params: Any) -> list[Any]:
        back = jax.vjp(losses, params)[1]
        return [back(tuple(jnp.float32(name == each) for each in names))[0] for name in names]

    whole, critic, generator = gradients(state["params"])
    for path, value in by_path(whole).items():
        own, other = (critic, generator) if path.startswith("discriminator") else (generator, critic)
        np.testing.assert_allclose(value, by_path(own)[path], rtol=1e-4, atol=1e-5, err_msg=path)
        assert not np.any(by_path(other)[path]), path
        # A bias before the hinge or at the critic's end may get a gradient of exactly zero.
        assert np.any(value) or path.endswith("bias"), path


def test_the_slope_is_the_critics():
    """It bounds how fast the critic changes in any direction, and doubles with its last layer."""
    part = built("gan", **SGD, **WGAN)
    state, batch = part.init(jax.random.key(0)), random_batch(part.config)
    way = np.random.default_rng(0).normal(size=batch["image"].shape).astype(np.float32)
    way /= np.sqrt(np.square(way).sum((1, 2, 3), keepdims=True))

    @jax.jit
    def run(params: Any, image: Any) -> Any:
        return part.model.apply(
            params, state["rest"], {**batch, "image": image}, key=jax.random.key(2), train=True
        )[0]

    slope = run(state["params"], batch["image"])["slope"]
    assert slope.shape == (8,)
    assert (slope > 0).all()
    up, down = (run(state["params"], batch["image"] + step * way)["real"] for step in (0.01, -0.01))
    assert np.abs(up - down).max() / 0.02 <= 1.05 * slope.max()
    params = jax.tree.map(np.array, jax.device_get(state["params"]))
    params["discriminator"]["verdict"]["dense"]["kernel"] *= 2
    np.testing.assert_allclose(run(params, batch["image"])["slope"], 2 * slope, rtol=1e-4)


def test_spectral_norm_converges_to_the_largest_singular_value():
    dense = gan.layers.Dense(12, 7, std=1.0, dtype="float32", rngs=nnx.Rngs(0), bias=False)
    layer = gan.Spectral(dense, dtype="float32", rngs=nnx.Rngs(1))
    for _ in range(200):
        layer.iterate()
    largest = np.linalg.svd(np.asarray(dense.kernel[...]))[1][0]
    np.testing.assert_allclose(layer(jnp.eye(12)) * largest, dense.kernel[...], rtol=1e-3, atol=1e-5)
    part = built("gan", **SGD, model__norm="spectral")
    state = part.init(jax.random.key(0))
    before = by_path(jax.device_get(state["rest"]))
    after = by_path(steps(part, state, 1)[0]["rest"])
    vectors = [path for path in before if path.endswith("/u")]
    assert len(vectors) == sum(path.endswith("layer/kernel") for path in by_path(state["params"])) > 1
    for path in vectors:
        assert before[path].shape == (1,) or not np.allclose(before[path], after[path])
        np.testing.assert_allclose(np.square(after[path]).sum(), 1, rtol=1e-4)


@pytest.mark.slow
def test_the_critic_takes_more_steps_than_the_generator():
    groups = {"generator": {"on": "^/generator/", "every": 3}, "discriminator": {"on": "^/discriminator/"}}
    part = build(tiny("gan", **SGD, **WGAN, optim__groups=groups))
    state, moved = start(part), []
    for index in range(3):
        before = jax.device_get(state["params"])
        state, _ = steps(part, state, 1, [random_batch(part.config, index)])
        change = jax.tree.map(
            lambda a, b: float(np.abs(a - b).max()), before, jax.device_get(state["params"])
        )
        moved.append([max(jax.tree.leaves(change[name])) > 0 for name in ("generator", "discriminator")])
    assert moved == [[False, True], [False, True], [True, True]]


# ------------------------------------------------------------------------------------------------ programs


@pytest.mark.slow
def test_flops_are_those_of_the_step():
    """By hand; and against what XLA counts in the gradient's plain convolutions without their padding."""
    pixels, taps, images = (8 * 8, 16 * 16, 32 * 32), 4 * 4, 8
    halves = (4 * 4, *pixels[:-1])
    up = [pixels[i] * taps // 4 * a * b for i, (a, b) in enumerate([(32, 16), (16, 8), (8, 1)])]
    down = [halves[2 - i] * taps * a * b for i, (a, b) in enumerate([(1, 8), (8, 16), (16, 32)])]
    generator = 2 * images * (8 * 4 * 4 * 32 + sum(up))
    discriminator, first = 2 * images * (sum(down) + 4 * 4 * 32), 2 * images * down[0]
    for keys in ({}, WGAN):
        part = built("gan", **SGD, **keys, data__image_size=32)
        assert flops.forward_flops(part) == generator + 2 * discriminator
        counted = flops.model_flops(part)
        if not keys:  # no gradient of latents and real images, nor of fakes for the discriminator's own sake
            unneeded = 2 * images * 8 * 4 * 4 * 32 + 2 * first
            assert counted == 3 * generator + 7 * discriminator - unneeded
        step = functools.partial(program.gradients, program.Step(part.config, part.model, part.task, 1))
        with mesh.plain():
            compiled = jax.jit(step).lower(part.state_spec, part.batch_spec).compile()
        theirs = compiled.cost_analysis()["flops"]
        assert counted == pytest.approx(theirs, rel=0.15), keys


@pytest.mark.slow
@pytest.mark.parametrize("keys", KINDS, ids=str)
def test_ten_images_are_learned_by_heart(keys):
    """With so few real images the fakes end up among them: nearer to one than these are to each other."""
    groups = {"generator": {"on": "^/generator/"}, "discriminator": {"on": "^/discriminator/"}}
    adam = {
        "optim__name": "adam",
        "optim__lr": 2e-3,
        "optim__b1": 0.5,
        "optim__b2": 0.999,
        "optim__groups": groups,
    }
    adam |= {"model__width": 32, "model__discriminator_width": 32, "optim__schedule": "constant"}
    part = build(tiny("gan", **adam, **keys, batch_size=10, optim__ema_decay=0.9))
    batch = random_batch(part.config)
    batch["image"] = make_pipeline(part.config, "train")[0]["image"]
    state, _ = steps(part, start(part), 400, [batch])
    fake = np.asarray(part.predict(state, part.put(batch))["fake"])
    distance = np.square(fake[:, None] - batch["image"][None]).mean((2, 3, 4)).min(1)
    apart = np.square(batch["image"][:, None] - batch["image"][None]).mean((2, 3, 4))
    assert np.median(distance) < 0.5 * np.median(apart[apart > 0]), (distance, apart)


# --------------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_draws(tmp_path):
    keys = {"steps": 4, "checkpoint__every_steps": 2, "eval__every_steps": 2, "eval__batches": 2}
    keys |= {"model__num_classes": 10, "optim__groups": {"generator": {"on": "^/generator/", "every": 2}}}
    config = tiny("gan", **keys)
    whole = train.run(config, tmp_path / "straight")
    names = sorted(path.name for path in (tmp_path / "straight" / "pictures").iterdir())
    assert names == ["fakes-0000002.png", "fakes-0000004.png"]
    image = cv2.imread(str(tmp_path / "straight" / "pictures" / names[0]))
    assert image.shape == (3 * 58, 3 * 58, 3)  # eight images of 8 pixels, seven times as large, and an edge
    assert image.std() > 1
    (events,) = (tmp_path / "straight" / "tb").glob("events.out.tfevents.*")
    assert b"fakes" in events.read_bytes()
    assert "eval/test/frechet_random" in whole.metrics


@pytest.mark.slow
def test_evaluation_by_a_classifier(tmp_path):
    config = tiny("gan", steps=2, eval__batches=-1, batch_size=64)
    train.run(config, tmp_path / "gan")
    train.run(tiny("cnn", steps=2, eval__batches=1, batch_size=64), tmp_path / "cnn")
    flags = [f"--workdir={tmp_path}/gan", f"--features={tmp_path}/cnn"]
    ran = run_script("evaluate.py", *flags)
    assert ran.code == 0, ran
    out = json.loads((tmp_path / "gan" / "evaluation.json").read_text())
    assert out["examples"] == sum(out["class_share_fake"]) == 296
    assert out["frechet_logits"] > 0
    assert {path.name for path in (tmp_path / "gan" / "evaluation").iterdir()} == {"fakes.png", "real.png"}


def test_evaluation_draws_each_fake_from_its_example_alone():
    part = built("gan", **SGD)
    state = start(part)
    batch = random_batch(part.config)
    fake = np.asarray(part.predict(state, part.put(batch))["fake"])
    turned = {name: value[::-1] for name, value in batch.items()}
    np.testing.assert_allclose(
        part.predict(state, part.put(turned))["fake"], fake[::-1], rtol=1e-4, atol=1e-5
    )
    assert np.abs(fake[0] - fake[1]).max() > 1e-3


def test_the_frechet_distance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4000, 3))
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(a, b) < 0.01
    assert metrics.frechet(a, b + np.array([2, 0, 0])) == pytest.approx(4, rel=0.1)
    assert metrics.frechet(a, 3 * b) == pytest.approx(3 * (3 - 1) ** 2, rel=0.1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task__gan_loss": "wgan-gp"}, r"task\.gan_loss is wgan-gp, .*set model\.norm to none"),
        ({"model__arch": "resnet"}, r"model\.norm is batch, which model\.arch=resnet has no place for"),
        ({"data__mixup": 0.2}, r"data\.mixup is nothing for task\.name=gan"),
        ({"data__mean": (0.1,)}, r"data\.mean is nothing for task\.name=gan"),
        ({"model__num_classes": 3}, r"model\.num_classes is too small for data\.name='digits': set it to 10"),
    ],
)
def test_what_cannot_be_trained(keys, message):
    with pytest.raises(InputError, match=message):
        build(tiny("gan", **keys))
