"""Optimizers, schedules, which parameters decay, clipping, and the loss scale of float16."""

from __future__ import annotations

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, batch_spec, build, built, by_path, mesh_keys, random_batch, start, steps, tiny

from bigmodel import config as config_lib
from bigmodel import mesh, models, optim, program, train, trees
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.checkpoint.digests import digest
from bigmodel.config import Config, InputError
from bigmodel.program import Program, steps_left

# Plain gradient descent: an update is -lr times what is left of the gradient.
PLAIN = {
    "optim__name": "sgd", "optim__b1": 0.0, "optim__clip_norm": 0.0, "optim__weight_decay": 0.0,
    "optim__lr": 0.1, "optim__warmup_steps": 0, "optim__schedule": "constant",
}  # fmt: skip


def plain(family: str = "cnn", **keys: Any) -> Config:
    return tiny(family, **PLAIN | {f"optim__{key}": value for key, value in keys.items()})


def updates(config: Config, grads: Any, params: Any) -> Any:
    tx = optim.make(config)
    return jax.device_get(tx.update(grads, tx.init(params), params)[0])


# Adafactor and Muon look at the shapes of matrices, and GPT's are stacked.
CASES = [("cnn", "adamw"), ("gpt", "muon")]
MORE = [
    pytest.param(family, name, marks=pytest.mark.slow)
    for family, names in {
        "cnn": ("adam", "sgd", "rmsprop", "adafactor", "lion", "muon"),
        "gpt": ("adafactor",),
    }.items()
    for name in names
]


@pytest.mark.parametrize(("family", "name"), CASES + MORE)
def test_every_optimizer_learns_and_lies_where_the_rules_say(family, name):
    lr = {"sgd": 0.05, "lion": 3e-3, "adafactor": 0.03}.get(name, 0.01)
    keys = {"optim__name": name, "optim__lr": lr, "optim__schedule": "constant", "optim__ema_decay": 0.9}
    part = built(family, **keys, **mesh_keys({"fsdp": 4, "tensor": 2}))
    state, rows = steps(part, start(part), 10, [random_batch(part.config)])
    assert rows["loss"][-1] < 0.97 * rows["loss"][0], rows["loss"]
    params = by_path(state["params"])
    for path, array in by_path(state).items():
        rule = mesh.param_sharding(part.mesh, part.model.rules, path, array.shape)
        assert array.sharding.is_equivalent_to(rule, array.ndim), path
        owner = next((p for p in params if path.endswith("/" + p)), None)
        if owner and array.shape == params[owner].shape:  # a moment, or the EMA
            assert array.sharding.is_equivalent_to(params[owner].sharding, array.ndim), path
    cut = {path for path, array in params.items() if not array.is_fully_replicated}
    assert {path for path in params if path.endswith(("kernel", "table"))} <= cut | {"convs/0/kernel"}
    assert not any("norm" in path for path in cut)


@pytest.mark.parametrize("keys", [{"weight_decay": 0.1}, {"l1": 0.1}, {"l2": 0.1}], ids=str)
@pytest.mark.parametrize("family", ["gpt", "cnn"])
def test_decay_and_penalties_touch_weights_only(family, keys):
    config = plain(family, **keys)
    spec = models.define(config, batch_spec(config)).params_spec
    params = jax.tree.map(lambda s: np.full(s.shape, -2.0, np.float32), spec)
    moved = updates(config, jax.tree.map(np.zeros_like, params), params)
    weights = {path for path in by_path(params) if path.endswith(("kernel", "table"))}
    assert {path for path, value in by_path(moved).items() if value.any()} == weights
    others = by_path(params).keys() - weights
    assert all(path.endswith(("bias", "scale")) for path in others)
    assert (
        family == "cnn" or "blocks/attention_norm/scale" in others
    )  # [depth, width]: no weight all the same


def test_a_pattern_chooses_what_decays():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    got = updates(plain(weight_decay=0.5, weight_decay_on="^/b/"), zeros, params)
    np.testing.assert_array_equal(got["a"]["kernel"], 0)
    np.testing.assert_allclose(got["b"]["kernel"], -0.05, rtol=1e-6)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [[-0.05, -0.05]]),
        ({"l1": 0.2}, [[-0.03, -0.07]]),  # -lr (g + l1 sign(p))
        ({"l2": 0.1}, [[-0.03, -0.08]]),  # -lr (g + l2 p)
        ({"weight_decay": 0.1}, [[-0.03, -0.08]]),  # -lr (g + decay p)
        ({"weight_decay": 0.1, "l1": 0.2}, [[-0.01, -0.10]]),
    ],
)
def test_penalties_and_decay_by_hand(keys, expected):
    params = {"a": {"kernel": jnp.array([[-2.0, 3.0]]), "bias": jnp.array([1.0, 1.0])}}
    got = updates(plain(**keys), jax.tree.map(lambda p: jnp.full_like(p, 0.5), params), params)
    np.testing.assert_allclose(got["a"]["kernel"], expected, rtol=1e-5)
    np.testing.assert_allclose(got["a"]["bias"], -0.05, rtol=1e-6)


def test_decoupled_decay_is_not_adapted_and_l2_is():
    """AdamW (Loshchilov and Hutter 2019): decay comes after the division by the gradient's size."""
    params, grads = {"a": {"kernel": jnp.full((1, 1), 4.0)}}, {"a": {"kernel": jnp.full((1, 1), 100.0)}}
    adam = {"name": "adam", "b1": 0.9, "b2": 0.95}
    decoupled = updates(plain(**adam, weight_decay=0.1), grads, params)["a"]["kernel"]
    coupled = updates(plain(**adam, l2=0.1), grads, params)["a"]["kernel"]
    np.testing.assert_allclose(decoupled, -0.1 * (1 + 0.4), rtol=1e-5)
    np.testing.assert_allclose(coupled, -0.1, rtol=1e-5)


@pytest.mark.parametrize(("limit", "factor"), [(0.5, 0.5 / 5), (10.0, 1.0), (0.0, 1.0)])
def test_clipping_is_by_the_norm_of_all_gradients(limit, factor):
    grads = {"a": {"kernel": jnp.array([[3.0]]), "bias": jnp.array([4.0])}}
    got = updates(plain(clip_norm=limit, lr=1.0), grads, jax.tree.map(jnp.zeros_like, grads))
    np.testing.assert_allclose(optax.tree.norm(got), 5 * factor, rtol=1e-6)
    np.testing.assert_allclose(got["a"]["bias"] / got["a"]["kernel"][0], 4 / 3, rtol=1e-6)


def test_rmsprop_is_pytorchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, *grads = rng.normal(size=(6, 5, 3)) * np.logspace(-4, 0, 3)
    keys = {"name": "rmsprop", "b1": 0.9, "b2": 0.95, "eps": 1e-2, "lr": 0.03}
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.RMSprop([theirs], lr=0.03, alpha=0.95, eps=1e-2, momentum=0.9)
    ours = {"a": {"kernel": jnp.asarray(start, jnp.float32)}}
    tx = optim.make(plain(**keys))
    state = tx.init(ours)
    for grad in grads:
        theirs.grad = torch.tensor(grad)
        optimizer.step()
        update, state = tx.update({"a": {"kernel": jnp.asarray(grad, jnp.float32)}}, state, ours)
        ours = optax.apply_updates(ours, update)
    np.testing.assert_allclose(ours["a"]["kernel"], theirs.detach().numpy(), rtol=1e-4, atol=1e-6)


def newton_schulz(g: np.ndarray) -> np.ndarray:
    """Jordan et al. 2024: five steps of the quintic iteration on g [M, N], in float64."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


MATRICES = {  # path -> shape, how many matrices of [inputs, outputs]
    "layers/0/inputs/kernel": ((6, 4, 5), 1, (6, 20)),
    "layers/1/state/kernel": ((5, 3, 5), 1, (5, 15)),
    "convs/0/kernel": ((3, 2, 4, 7), 1, (24, 7)),
    "blocks/mlp/up/kernel": ((2, 8, 12), 2, (8, 12)),
    "blocks/mlp/experts/down/kernel": ((2, 3, 12, 8), 6, (12, 8)),
    "encoder/blocks/0/mlp/experts/down/kernel": ((3, 12, 8), 3, (12, 8)),
    "lora/blocks/attention/q/kernel/a": ((2, 8, 3), 2, (8, 3)),
    "lora/blocks/attention/q/kernel/b": ((2, 3, 8), 2, (3, 8)),
}
ADAMS = {
    "embed/table": (9, 4),
    "head/kernel": (4, 9),
    "lora/head/kernel/a": (4, 2),
    "blocks/norm/scale": (2, 8),
}


def test_muon_makes_each_matrix_orthogonal_that_a_layer_multiplies():
    rng = np.random.default_rng(0)
    shapes = {path: shape for path, (shape, _, _) in MATRICES.items()} | ADAMS
    grads = trees.nest({path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()})
    tx, params = optim.make(plain(name="muon", b1=0.9, lr=1.0)), jax.tree.map(np.zeros_like, grads)
    got = by_path(jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params))
    for path, (shape, count, size) in MATRICES.items():
        each = np.float64(by_path(grads)[path]).reshape(count, *size)
        expected = np.stack([newton_schulz(g) for g in each]) * -0.2 * max(size) ** 0.5
        np.testing.assert_allclose(got[path].reshape(each.shape), expected, atol=2e-5, err_msg=path)
        assert got[path].shape == shape
    for path in ADAMS:  # with Nesterov's momentum a first step is the sign times 1 + b1 / (1 + b1)
        expected = -np.sign(by_path(grads)[path]) * (1 + 0.9 / 1.9)
        np.testing.assert_allclose(got[path], expected, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("rnn", {}), ("rnn", {"model__cell": "gru"}), ("moe", {}), ("moe", {"model__scan": False}),
        ("cnn", {}), ("resnet", {}), ("t5", {}), ("bert", {}), ("vit", {}), ("detector", {}), ("mlp", {}),
    ],
)  # fmt: skip
def test_muons_matrices_are_those_that_layers_say_they_multiply(family, keys):
    """`SUMS` of each layer: the axes that its product sums over; what is left after them are its outputs."""
    config = tiny(family, **keys)
    definition = models.define(config, batch_spec(config))
    spec = by_path(definition.params_spec)
    chosen = {
        trees.path_str(path): numbers
        for path, numbers in jax.tree_util.tree_leaves_with_path(
            optim._matrices(definition.params_spec),
            is_leaf=lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers),
        )
    }
    assert chosen.keys() == {
        path for path in spec if path.endswith("/kernel") and not path.startswith("head/")
    }
    for path, numbers in chosen.items():
        rank = len(spec[path].shape)
        summed = np.atleast_1d(numbers.reduction_axis).tolist()
        assert summed == [rank + axis for axis in definition.products[path]], path
        assert np.atleast_1d(numbers.output_axis).tolist() == list(range(max(summed) + 1, rank)), path


@pytest.mark.parametrize("keys", [{"weight_decay": 0.1}, {"l2": 0.1}], ids=str)
def test_adapters_decay_as_the_weights_that_they_adapt_would(keys):
    """PEFT gives its AdamW both matrices too; neither frozen parameters nor biases decay."""
    config = tiny("gpt", **PLAIN, lora__rank=2, lora__on="/attention/", lora__train="bias$")
    config = config_lib.override(config, {f"optim.{key}": value for key, value in keys.items()})
    spec = models.define(config, batch_spec(config)).params_spec
    trained, _ = optim.split(config, jax.tree.map(lambda s: np.full(s.shape, 2.0, np.float32), spec))
    moved = by_path(updates(config, jax.tree.map(np.zeros_like, trained), trained))
    decayed = {path for path, value in moved.items() if value.any()}
    assert decayed == {path for path in moved if path.startswith("lora/")}
    np.testing.assert_allclose(moved[min(decayed)], -0.1 * 0.1 * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("constant", {}, {0: 0.1, 4: 0.5, 5: 0.5, 50: 0.5, 104: 0.5}),
        ("linear", {"end_lr": 0.2}, {0: 0.1, 4: 0.5, 5: 0.5, 55: 0.3, 105: 0.1, 200: 0.1}),
        ("cosine", {"end_lr": 0.1}, {0: 0.1, 4: 0.5, 5: 0.5, 55: 0.275, 105: 0.05, 200: 0.05}),
        ("wsd", {"decay_steps": 20}, {0: 0.1, 5: 0.5, 84: 0.5, 85: 0.5, 95: 0.25, 105: 0.0}),
        ("wsd", {}, {5: 0.5, 95: 0.5, 100: 0.25, 105: 0.0}),
        ("rsqrt", {}, {0: 0.1, 4: 0.5, 5: 0.5, 20: 0.25, 80: 0.125}),
    ],
)
def test_schedules_at_their_key_steps(name, keys, expected):
    config = plain(lr=0.5, schedule=name, warmup_steps=5, **keys).replace(steps=105)
    schedule = optim.schedule(config)
    got = {step: float(schedule(jnp.int32(step))) for step in expected}
    assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd", "rsqrt"])
def test_without_warm_up_the_first_step_is_at_the_full_rate(name):
    assert float(optim.schedule(plain(lr=0.5, schedule=name))(jnp.int32(0))) == pytest.approx(0.5)


def test_the_loss_scale_halves_grows_and_keeps_its_bounds():
    def after(scale: float, good_steps: int, finite: bool) -> tuple[float, int]:
        state = {"scale": jnp.float32(scale), "good_steps": jnp.int32(good_steps)}
        new = optim.loss_scale_update(state, jnp.bool_(finite))
        return float(new["scale"]), int(new["good_steps"])

    assert after(2.0**15, 7, False) == (2.0**14, 0)
    assert after(2.0**15, 7, True) == (2.0**15, 8)
    assert after(2.0**15, optim.GROWTH_STEPS - 1, True) == (2.0**16, 0)
    assert after(2.0**24, optim.GROWTH_STEPS - 1, True) == (2.0**24, 0)
    assert after(1.0, 0, False) == (1.0, 0)


def overflowing(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Lets float16 runs begin with a loss scale of so much."""
    init = {"scale": jnp.float32(scale), "good_steps": jnp.int32(0)}
    monkeypatch.setattr(optim, "loss_scale_init", lambda: init)


def moved(before: Any, after: Any) -> float:
    flat = by_path(before)
    squares = [np.square(np.float64(x) - np.float64(flat[path])).sum() for path, x in by_path(after).items()]
    return float(np.sqrt(sum(squares)))


@pytest.mark.parametrize(
    ("family", "keys"), [("cnn", {"schedule": "linear"}), ("gpt", {"schedule": "wsd", "warmup_steps": 3})]
)
def test_float16_logs_the_rate_that_it_applies_and_counts_no_skipped_step(monkeypatch, family, keys):
    overflowing(monkeypatch, 2.0**24)
    config = plain(family, **{"lr": 0.2, **keys}).replace(compute_dtype="float16", steps=30)
    part, seen = build(config), []
    state, batch = start(part), random_batch(config)
    for _ in range(15):
        before = jax.device_get(state["params"])
        state, rows = steps(part, state, 1, [batch])
        distance = moved(before, jax.device_get(state["params"]))
        if rows["skipped"][0]:
            assert distance == 0
            continue
        seen.append(float(rows["lr"][0]))
        assert distance == pytest.approx(seen[-1] * float(rows["grad_norm"][0]), rel=2e-3)
    assert 2 < len(seen) < 15
    at = optim.schedule(config)
    np.testing.assert_allclose(seen, [float(at(jnp.int32(n))) for n in range(len(seen))], rtol=1e-6)


@pytest.mark.slow
def test_a_float16_run_makes_all_updates_and_resumes_exactly(monkeypatch, tmp_path):
    """Skipped steps come on top: schedules, pruning and `every` end where they do in float32."""
    overflowing(monkeypatch, 2.0**24)
    keys = {
        "steps": 6, "checkpoint__every_steps": 2, "checkpoint__keep": 9, "eval__batches": 1,
        "log__tensorboard": False, "log__every_steps": 1, "compute_dtype": "float16",
        "optim__schedule": "linear", "optim__warmup_steps": 0, "optim__ema_decay": 0.5,
        "prune__sparsity": 0.5, "prune__end_step": 5, "prune__every_steps": 1,
        "optim__groups": {"head": {"on": "^/head/", "every": 3}},
    }  # fmt: skip
    config = tiny("cnn", **keys)
    whole = train.run(config, tmp_path / "straight")
    skipped = whole.step - 6
    assert skipped > 0
    assert int(optim.updates(whole.state["opt"])) == 6
    rows = [json.loads(line) for line in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()]
    rates = [row["train/lr"] for row in rows if row.get("train/skipped") == 0]
    np.testing.assert_allclose(rates, [config.optim.lr * (1 - n / 6) for n in range(6)], rtol=1e-5)
    kernel = jax.device_get(whole.state["params"]["hidden"]["kernel"])
    assert (kernel == 0).mean() == pytest.approx(0.5, abs=0.01)
    again = train.run(config, tmp_path / "straight")
    assert (again.exit_code, again.step) == (train.DONE, whole.step)
    train.run(config, tmp_path / "stopped")
    for step in Checkpoints(tmp_path / "stopped" / "checkpoints", read_only=True).steps()[1:]:
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / str(step))
    resumed = train.run(config, tmp_path / "stopped")
    assert resumed.step == whole.step
    assert digest(resumed.state) == digest(whole.state)


def test_a_budget_pays_for_skipped_steps_too():
    config = tiny("cnn", compute_dtype="float16").replace(steps=9, budget=1.0)
    part = build(config)
    state = start(part)
    state["step"] = state["step"] + 7
    assert steps_left(config, state) == 2
    assert steps_left(config.replace(budget=0.0), state) == 9


def test_an_overflow_that_no_loss_scale_helps_stops_the_run(monkeypatch, tmp_path):
    overflowing(monkeypatch, 2.0)
    # Private: from outside, a gradient that overflows at any scale comes with a loss that is not finite too.
    monkeypatch.setattr(program, "_unscale", lambda grads, scale: jax.tree.map(lambda g: g * jnp.inf, grads))
    config = tiny("cnn", compute_dtype="float16", steps=4, log__tensorboard=False)
    with pytest.raises(train.NotFinite, match=r"step 2: .* the gradient norm (inf|nan)"):
        train.run(config, tmp_path)


# ------------------------------------------------------------------------------------------------ groups

GROUPS = {"head": {"on": "^/head/", "lr": 0.5}, "hidden": {"on": "^/hidden/", "every": 3, "b1": 0.9}}


def test_groups_have_settings_of_their_own():
    config = plain(groups=GROUPS, clip_norm=1.0)
    spec = models.define(config, batch_spec(config)).params_spec
    ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), spec)
    tx, moved = optim.make(config), []
    state = tx.init(ones)
    for _ in range(4):
        update, state = jax.jit(tx.update)(ones, state, ones)
        moved.append(jax.device_get(update))
    size = sum(x.size for x in jax.tree.leaves(spec["head"]))
    for path, value in by_path(moved[0]["head"]).items():  # clipped by the group's own norm
        np.testing.assert_allclose(value, -0.5 / size**0.5, rtol=1e-5, err_msg=path)
    hidden = [float(np.abs(update["hidden"]["kernel"]).max()) for update in moved]
    assert hidden[0] == hidden[1] == hidden[3] == 0 < hidden[2]
    others = sum(x.size for x in jax.tree.leaves(spec["convs"]))
    np.testing.assert_allclose(moved[1]["convs"][0]["kernel"], -0.1 / others**0.5, rtol=1e-5)


@pytest.mark.slow
def test_groups_train_lie_and_resume_like_any_optimizer(tmp_path):
    keys = {"optim__name": "adam", "optim__groups": GROUPS, "optim__ema_decay": 0.9}
    one, many = built_with(keys), built_with(keys | mesh_keys({"fsdp": 4, "tensor": 2}))
    (_, a_rows), (b, b_rows) = (steps(part, start(part), 6) for part in (one, many))
    np.testing.assert_allclose(a_rows["loss"], b_rows["loss"], rtol=1e-4)
    assert {"lr", "lr_head", "lr_hidden"} <= a_rows.keys()
    moments = [path for path in by_path(b["opt"]) if path.endswith("mu/head/kernel")]
    assert len(moments) == 1
    owner = by_path(b["params"])["head/kernel"].sharding
    assert by_path(b["opt"])[moments[0]].sharding.is_equivalent_to(owner, 2)
    keys |= {"steps": 4, "checkpoint__every_steps": 2, "eval__batches": 1, "log__tensorboard": False}
    config = tiny("cnn", **keys)
    whole = train.run(config, tmp_path / "straight")
    train.run(config, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "4")
    assert digest(train.run(config, tmp_path / "stopped").state) == digest(whole.state)


def built_with(keys: dict[str, Any]) -> Program:
    return build(tiny("cnn", **keys))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": {"on": "^/nothing/"}}, r"optim\.groups\.a\.on='\^/nothing/' matches no parameter; .*/head/"),
        ({"a": {"on": "/head/"}, "b": {"on": "kernel"}}, r"/head/kernel is in a and in b"),
        ({"a": {"on": "("}}, r"optim\.groups\.a\.on is '\(', which is no regular expression"),
        ({"a": {"lr": 0.1}}, r"optim\.groups\.a\.on is not set"),
        ({"a": {"on": "/head/", "lrr": 0.1}}, r"optim\.groups\.a\.lrr' is unknown; did you mean"),
        ({"a": {"on": "/head/", "ema_decay": 0.1}}, r"ema_decay cannot differ from group to group"),
        ({"a": {"on": "/head/", "every": 0}}, r"optim\.groups\.a\.every is 0: set it to 1 or more"),
        ({"a": 3}, r"optim\.groups\.a is a group of keys"),
    ],
)
def test_groups_that_cannot_be(groups, message):
    with pytest.raises(InputError, match=message):
        build(plain(groups=groups))


def test_a_groups_keys_are_flags():
    text = {"optim.groups.head.on": "^/head/", "optim.groups.head.lr": "0.25"}
    config = config_lib.load(ROOT / "configs/cnn.py", text)
    assert config.optim.groups == {"head": {"on": "^/head/", "lr": 0.25}}
    assert config_lib.from_dict(config_lib.to_dict(config)) == config
