"""A run checks its own gradient: it refuses the layouts that were wrong, and rounding does not trip it."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from conftest import build, config_flag, mesh_keys, random_batch, run_script, start, tiny

from bigmodel import selfcheck
from bigmodel.config import Config
from bigmodel.models import weights
from bigmodel.program import Program

AUTO = {"check__gradient": "auto"}
THREE = {"data": 2, "fsdp": 2, "tensor": 2}


def check(built: Program) -> selfcheck.Check:
    return selfcheck.check(built, start(built), random_batch(built.config))


def program(family: str = "gpt", **keys) -> Program:
    return build(tiny(family, **mesh_keys(THREE), **AUTO, **keys))


@pytest.mark.parametrize(
    ("family", "keys"),
    [pytest.param("gpt", {"seq_len": 8}, marks=pytest.mark.slow), ("cnn", {"batch_size": 32})],
    ids=["gpt", "cnn"],
)
def test_layouts_that_are_left_to_the_compiler_are_refused(family, keys, monkeypatch):
    """Rows at data x width, where the partitioner is wrong by itself."""
    found = check(program(family, **keys))
    assert found.problems(selfcheck.TOLERANCES["float32"]) == []
    assert found.along < 2e-3
    assert found.gradient < 1e-5
    assert found.outputs < 1e-5
    monkeypatch.setattr(weights, "lay_out", lambda params, rules: params)
    wrong = check(program(family, **keys))
    assert wrong.problems(selfcheck.TOLERANCES["float32"])
    with pytest.raises(
        selfcheck.WrongProgram, match=r"compiled for this mesh is wrong: .* choose other mesh"
    ):
        selfcheck.refuse_wrong(wrong, tiny(family))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_bfloat16_does_not_trip_it(seed):
    built = program(compute_dtype="bfloat16", param_dtype="bfloat16", seq_len=8, seed=seed)
    found = selfcheck.check(built, start(built, seed), random_batch(built.config, seed))
    assert found.problems(selfcheck.TOLERANCES["bfloat16"]) == []
    assert found.along is not None


def test_a_gradient_that_is_off_by_a_part_is_seen(monkeypatch):
    """One parameter's gradient, scaled: the loss and the outputs stay right.

    Private: nothing outside makes a wrong gradient beside a right loss, but for faults of the compiler."""
    built, gradient = program(seq_len=8), selfcheck._gradient

    def scaled(built):
        def wrong(state, batch):
            loss, grads = gradient(built)(state, batch)
            return loss, {**grads, "embed": jax.tree.map(lambda g: 0.7 * g, grads["embed"])}

        return wrong

    monkeypatch.setattr(selfcheck, "_gradient", scaled)
    found = check(built)
    assert found.along > 0.02
    assert found.outputs < 1e-5


def test_when_it_is_due():
    two, one = (tiny("gpt", **AUTO, **mesh_keys(axes)) for axes in (THREE, {"data": 8}))
    assert selfcheck.is_due(two, build(two).mesh)
    assert not selfcheck.is_due(one, build(one).mesh)
    never = tiny("gpt", **mesh_keys(THREE), check__gradient="never")
    assert not selfcheck.is_due(never, build(never).mesh)
    always = tiny("gpt", check__gradient="always")
    assert selfcheck.is_due(always, build(always).mesh)


@pytest.mark.slow
def test_what_is_not_the_slope_of_a_loss_is_said():
    found = check(program("gan"))
    assert found.along is None
    assert "not along itself" in found.line()
    assert found.problems(selfcheck.TOLERANCES["float32"]) == []


def test_rows_that_are_swapped_are_seen(monkeypatch):
    """Outputs of one row where another's belong, and NaN in one order alone."""
    built = program(seq_len=8)
    rows = random_batch(built.config)
    batch, other = built.put(rows), built.put(selfcheck.reordered(built, rows))
    for wrong in (lambda x: x.at[0].set(x[1]), lambda x: x.at[0].set(np.nan)):
        digest = lambda state, each, wrong=wrong: [  # noqa: E731
            wrong(each["tokens"].sum(1).astype("float32")) if each is other else each["tokens"].sum(1)
        ]
        off = selfcheck.rows_differ(digest, {}, rows, batch, other, built)
        assert not off <= 1e-3


def test_nan_is_a_problem():
    found = selfcheck.Check(along=np.nan, gradient=0.0, outputs=np.nan)
    assert len(found.problems(selfcheck.TOLERANCES["float32"])) == 2


def test_the_train_step_is_compared_with_what_was_checked():
    found = selfcheck.Check(0.0, 0.0, 0.0, loss=2.0, norm=1.0)
    selfcheck.refuse_other_step(found, {"loss": 2.0001, "grad_norm": 1.0}, tiny("gpt"))
    for step in ({"loss": 2.1, "grad_norm": 1.0}, {"loss": 2.0, "grad_norm": 0.9}):
        with pytest.raises(selfcheck.WrongProgram, match="where the checked program has"):
            selfcheck.refuse_other_step(found, step, tiny("gpt"))


def config_of_a_run(corpus: str) -> Config:
    keys = {"data__name": corpus, "steps": 1, "seq_len": 8, "model__vocab_size": 384}
    return tiny("gpt", **AUTO, **mesh_keys(THREE), **keys)


@pytest.mark.slow
def test_a_run_says_what_it_found_and_keeps_it(corpus, tmp_path):
    config = tiny(
        "gpt", **AUTO, **mesh_keys(THREE), data__name=corpus, steps=1, seq_len=8, model__vocab_size=384
    )
    ran = run_script("train.py", config_flag(config, tmp_path), f"--workdir={tmp_path / 'run'}")
    assert ran.code == 0, ran.err
    assert "gradient checked on this mesh: " in ran.err + ran.out
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["gradient_check"]["along"] < 0.02


def test_a_wrong_program_ends_with_4_before_its_first_step(corpus, tmp_path):
    config = tiny(
        "gpt", **AUTO, **mesh_keys(THREE), data__name=corpus, steps=1, seq_len=8, model__vocab_size=384
    )
    flag = config_flag(config, tmp_path)
    file = tmp_path / "config_of_test.py"
    # A config file is a program: this one puts the old layouts back.
    file.write_text(
        "from bigmodel.models import weights\nweights.lay_out = lambda params, rules: params\n"
        + file.read_text()
    )
    ran = run_script("train.py", flag, f"--workdir={tmp_path / 'run'}")
    assert ran.code == 4, ran.out + ran.err
    assert "error: the program compiled for this mesh is wrong" in ran.err
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
