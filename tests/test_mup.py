"""muP: what a step changes does not grow with the width; at its base width the model is the standard one."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from conftest import ROOT, build, by_path, mesh_keys, random_batch, start, steps, tiny

from bigmodel import config as config_lib
from bigmodel.config import InputError
from bigmodel.study import coordinates

WIDTHS = (32, 256)
KEYS = {
    "model__depth": 2, "model__width": 32, "model__heads": 2, "optim__lr": 1e-2, "optim__warmup_steps": 0,
    "optim__schedule": "constant", "optim__clip_norm": 0.0, "seq_len": 16, "batch_size": 4,
}  # fmt: skip


def growth(family: str = "gpt", widths: tuple[int, int] = WIDTHS, **keys: object) -> dict[str, float]:
    """Changes of the last step at the largest width, times those at the smallest."""
    base = tiny(family, **{**KEYS, **keys})
    found = []
    for width in widths:
        config = coordinates.of_width(base, width)
        found.append(coordinates.changes(build(config), random_batch(config), 4))
    return {name: float(found[1][name][-1] / found[0][name][-1]) for name in found[0]}


@pytest.mark.parametrize("tied", [True, False])
def test_logits_change_as_much_at_any_width_under_mup_alone(tied):
    keys = {"model__tie_embeddings": tied}
    mup, standard = growth(**keys, model__mup_base_width=32), growth(**keys)
    assert 0.4 < mup["logits"] < 1.3
    assert 0.4 < mup["scores"] < 1.3 < standard["scores"]
    assert standard["logits"] > max(1.5, 3 * mup["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_so_do_those_of_other_transformers(family):
    keys = {"model__norm_order": "pre"} if family == "bert" else {}
    mup, standard = growth(family, model__mup_base_width=32, **keys), growth(family, **keys)
    assert 0.3 < mup["logits"] < 2
    assert standard["logits"] > 2 * mup["logits"]


@pytest.mark.parametrize("keys", [{}, {"model__tie_embeddings": False, "model__scan": False}])
def test_at_its_base_width_the_model_is_the_standard_one_bit_for_bit(keys):
    plain, mup = (tiny("gpt", **keys, model__mup_base_width=width) for width in (0, 32))
    assert build(plain).lower().as_text() == build(mup).lower().as_text()
    one, other = (by_path(jax.device_get(build(each).init(jax.random.key(3)))) for each in (plain, mup))
    assert all((one[name] == other[name]).all() for name in one)


def test_rates_and_multipliers_are_those_of_table_8():
    """Steps of Adam are lr times a sign at first: hidden kernels' lr / 4, all others' lr."""
    config = tiny(
        "gpt", **{**KEYS, "model__width": 128}, model__mup_base_width=32, model__tie_embeddings=False
    )
    built = build(config)
    state = start(built)
    before = by_path(jax.device_get(state["params"]))
    after = by_path(jax.device_get(steps(built, state, 1)[0]["params"]))
    for name, value in before.items():
        if name.endswith("/k/bias"):  # the softmax does not see it
            continue
        moved = np.abs(after[name] - value).max()
        hidden = "blocks/" in name and name.endswith("/kernel")
        assert moved == pytest.approx(1e-2 / 4 if hidden else 1e-2, rel=0.02), name
    assert np.std(before["head/kernel"]) == pytest.approx((2 / 5 / 32) ** 0.5, rel=0.05)
    assert np.std(before["blocks/mlp/up/kernel"]) == pytest.approx((2 / 5 / 128) ** 0.5, rel=0.05)


def test_weight_decay_is_as_strong_for_all():
    keys = {**KEYS, "model__width": 128, "optim__weight_decay": 0.5, "model__mup_base_width": 32}
    with_decay, without = (
        build(tiny("gpt", **keys)),
        build(tiny("gpt", **{**keys, "optim__weight_decay": 0.0})),
    )
    params, decayed, plain = (
        by_path(jax.device_get(each["params"]))
        for each in (
            start(with_decay),
            steps(with_decay, start(with_decay), 1)[0],
            steps(without, start(without), 1)[0],
        )
    )
    for name in ("blocks/mlp/up/kernel", "embed/table"):
        assert plain[name] - decayed[name] == pytest.approx(1e-2 * 0.5 * params[name], abs=1e-7)


def test_scores_are_divided_by_the_head_s_size():
    model = tiny(
        "gpt", model__width=128, model__heads=2, model__mup_base_width=32, model__mup_base_head_dim=16
    ).model
    assert model.head_dim == 64
    assert model.score_scale == pytest.approx(16**0.5 / 64)
    heads = {"model__mup_base_head_dim": 16, "model__mup_base_width": 32}
    grown = growth(**heads, model__head_dim=0)
    assert 0.3 < grown["scores"] < 1.7


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 4}, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_on_a_mesh_it_is_the_same_run(axes):
    keys = {"model__mup_base_width": 16, "model__tie_embeddings": False}
    one, many = build(tiny("gpt", **keys)), build(tiny("gpt", **keys, **mesh_keys(axes)))
    losses = [steps(each, start(each), 3)[1]["loss"] for each in (one, many)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"optim__name": "muon"}, "optim.name is muon: model.mup_base_width is for adamw, adam, lion"),
        ({"model__experts": 4}, "no rule for experts"),
        ({"optim__groups": {"head": {"on": "^embed", "name": "sgd"}}}, "optim.groups.head.name is sgd"),
    ],
)
def test_settings_for_which_there_is_no_rule_are_refused(keys, words):
    with pytest.raises(InputError, match=words):
        tiny("gpt", model__mup_base_width=16, **keys)
    with pytest.raises(InputError, match=r"set model\.mup_base_width too"):
        tiny("gpt", model__mup_base_head_dim=16)


def test_an_export_that_would_lose_the_multiplier_is_refused():
    from bigmodel.huggingface import configs, layouts

    plain = tiny("gpt", model__mup_base_width=32)
    layout = layouts.of(plain)
    assert configs.write(plain, layout)["n_embd"] == 32
    with pytest.raises(InputError, match="has no multiplier of the logits; export with --format=stablehlo"):
        configs.write(tiny("gpt", model__mup_base_width=16), layout)


def test_the_ladder_has_budgets_of_flops_and_the_widths_of_each():
    spec = f"{ROOT}/configs/gpt.py:ladder"
    spent: dict[float, set[int]] = {}
    for keys in config_lib.sweep(spec):
        config = config_lib.load(spec, keys)
        per_token = config.model.flops_per_token(config.seq_len)
        flops = per_token * config.seq_len * config.batch_size * config.steps
        spent.setdefault(round(math.log(flops), 1), set()).add(config.model.width)
        assert config.model.head_dim == 16
        assert config.model.mup_ratio == 32 / config.model.width
        assert config.optim.warmup_steps == config.steps // 10
    assert [len(widths) for widths in spent.values()] == [
        4,
        4,
        4,
        4,
    ]  # budgets are within 10 %, as parabolas want
    other = config_lib.sweep(f"{ROOT}/configs/gpt.py:size=small")
    assert all(keys.keys() == {"optim.lr"} for keys in other)
