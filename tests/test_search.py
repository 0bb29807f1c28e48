"""The planner's search: what it considers, what it drops, what it ranks first; and the plans it keeps."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from conftest import run_script, tiny

from bigmodel import config as config_lib
from bigmodel.config import InputError
from bigmodel.machines import chips
from bigmodel.plan import candidates, compiled, planner, search, target


@pytest.fixture
def no_compilers(monkeypatch):
    """CPU devices stand in for the target's."""
    monkeypatch.setattr(target, "installed", lambda package: False)


def gpt(**keys):
    return tiny("gpt", **{"batch_size": 8, "microbatches": 1} | keys)


def test_every_legal_mesh_is_considered(no_compilers):
    aim = target.make("v5e:2x4")
    found = list(candidates.candidates(gpt(), aim, over=()))
    heads = gpt().model.heads
    sizes = [(c.config.mesh.data, c.config.mesh.fsdp, c.config.mesh.tensor) for c in found]
    legal = [(d, f, t) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) for t in (1, 2, 4, 8)
             if d * f * t == 8 and heads % t == 0]  # fmt: skip
    assert sorted(sizes) == sorted(legal)
    more = list(candidates.candidates(gpt(), aim, over=candidates.OVER))
    assert {c.config.remat for c in more} == set(candidates.RECOMPUTED)
    assert len({c.config.batch_size for c in more}) > 1
    for c in more:  # each is a config that could be run
        config_lib.from_dict(config_lib.to_dict(c.config))


def test_the_closed_form_knows_what_costs_memory_and_time(no_compilers):
    aim = target.make("v5e:2x4")
    found = {(c.config.mesh.fsdp, c.config.remat, c.config.microbatches): c
             for c in candidates.candidates(gpt(batch_size=32), aim, over=("remat", "microbatches"))
             if c.config.mesh.tensor == 1}  # fmt: skip
    assert found[8, "full", 1].least_bytes < found[8, "minimal", 1].least_bytes
    assert found[8, "none", 2].least_bytes < found[8, "none", 1].least_bytes
    assert found[8, "none", 1].least_bytes < found[1, "none", 1].least_bytes
    assert found[8, "none", 1].step_s < found[8, "full", 1].step_s
    assert found[8, "none", 1].step_s < found[8, "none", 4].step_s


def test_what_is_ranked_first_fits_and_can_be_pasted(no_compilers):
    found = search.search(gpt(), "v5e:2x4", compile_best=2, over=())
    times = [row.receipt["step_s"] for row in found.rows]
    assert times == sorted(times)
    best = found.best.candidate.config
    flags = dict(flag.removeprefix("--config.").split("=") for flag in candidates.overrides(best))
    again = config_lib.to_dict(gpt())
    for key, value in flags.items():
        group, _, name = key.rpartition(".")
        (again[group] if group else again)[name] = value
    assert config_lib.from_dict(again) == best
    lines = search.table(found)
    assert any("--config.mesh.data" in line for line in lines)
    assert len(search.ranking(found)) == found.considered - found.dropped
    assert sum(line.startswith("  ~") for line in lines) == found.considered - found.dropped - 2


def test_what_does_not_fit_is_never_first(no_compilers, monkeypatch):
    """The compiler has the last word: here it refuses what the closed form likes best."""
    real, refused = planner.on, []

    def on(config, aim, **keys):
        if len(refused) < 2:
            refused.append(config)
            raise planner.DoesNotFit("1 GiB a device too much", 2**30)
        return real(config, aim, **keys)

    monkeypatch.setattr(planner, "on", on)
    found = search.search(gpt(), "v5e:2x4", compile_best=1, over=())
    assert found.best.candidate.config not in refused
    assert [row.receipt is None for row in found.rows] == [False, True, True]
    assert "\n".join(search.table(found)).count("does not fit") == 2
    tiny_memory = dataclasses.replace(chips.BY_NAME["v5e"], memory_bytes=2**28 + 1.0)
    monkeypatch.setitem(chips.BY_NAME, "v5e", tiny_memory)
    found = search.search(gpt(), "v5e:2x4", compile_best=1, over=())
    assert found.considered == found.dropped > 0
    with pytest.raises(InputError, match="nothing fits"):
        search.table(found)


def test_a_finished_plan_is_kept_and_so_is_a_refusal(tmp_path, no_compilers, monkeypatch):
    aim = target.make("v5e:2x4")
    built = planner.build(gpt(), aim)
    first = compiled.compile_for(built, aim, tmp_path)

    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    assert compiled.compile_for(built, aim, tmp_path) == first
    other = planner.build(gpt(seq_len=24), aim)
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            compiled.compile_for(other, aim, tmp_path)
        monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *a, **k: pytest.fail("compiled again"))
    for path in (tmp_path / "plans").iterdir():  # a damaged file costs only time
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    monkeypatch.undo()
    assert dataclasses.replace(compiled.compile_for(built, aim, tmp_path), text="") == dataclasses.replace(
        first, text=""
    )


def test_assumptions_come_from_yaml(tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("watts: 250\npue: 1.2\n")
    bad.write_text("watts: many\n")
    plan = ["plan.py", "--config=configs/gpt.py:size=toy", "--target=cpu:8"]
    result = run_script(*plan, f"--assume={bad}")
    assert result.code == 2
    assert "watts=many" in result.err
    result = run_script(*plan, f"--assume={tmp_path / 'none.yaml'}")
    assert result.code == 2
    assert "cannot be read" in result.err
    result = run_script(*plan, f"--assume={good}", "--search=2", "--search_over=colour")
    assert result.code == 2
    assert "'colour'" in result.err
