"""Plans for machines that need not be here, on whichever compilers are installed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pytest
from conftest import build, run_script, tiny

from bigmodel import config as config_lib
from bigmodel import mesh, units
from bigmodel.config import InputError
from bigmodel.infer import serving_plan
from bigmodel.machines import chips
from bigmodel.plan import planner, receipt, search, target, timeline

LIBTPU = target.installed("libtpu")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("v9:4x4", "unknown"),
        ("v5e", "dimensions"),
        ("v5e:4x4x4", "dimensions"),
        ("v5e:32x32", "several slices"),
        ("h100:2x16", "at most 8"),
        ("cpu:2x4", "cpu:8"),
        ("v5e:0x4", "no devices"),
        ("v5e:16,16", "not a target"),
    ],
)
def test_a_target_that_does_not_exist_is_one_line(spec, says):
    with pytest.raises(InputError, match=says) as caught:
        target.make(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("chip", sorted(chips.BY_NAME))
def test_a_dtype_that_a_chip_does_not_multiply_is_refused_at_once(chip, dtype, monkeypatch):
    """TPUs have no float16; nothing is compiled, and no compiler loaded, to say so."""
    known = chips.BY_NAME[chip]
    monkeypatch.setattr(target, "installed", lambda package: False)
    monkeypatch.setattr(planner, "compile_for", lambda *args: pytest.fail("compiled"))
    spec = f"{chip}:{'x'.join('1' * (known.dimensions or 2))}"
    config = tiny("gpt", compute_dtype=dtype)
    if dtype in known.flops:
        # Private: no process has a pod's count of devices, and no compiler is to be loaded.
        monkeypatch.setattr(target, "_cpu_devices", lambda count: jax.devices("cpu")[:1] * count)
        assert chips.check_dtype(target.of(config, spec).chip, dtype) is None
        assert known.flops[dtype] > 0
        return
    assert (known.platform, dtype) == ("tpu", "float16")
    monkeypatch.setattr(target, "_tpu", lambda *args: pytest.fail("libtpu loaded"))
    for plan in (planner.plan, search.search, serving_plan.plan):
        with pytest.raises(InputError, match=rf"compute_dtype=float16: {chip} has no .*=bfloat16"):
            plan(config, spec)


def test_a_run_on_such_a_chip_is_refused_before_it_compiles(monkeypatch):
    monkeypatch.setattr(chips, "chip", lambda device: chips.BY_NAME["v5p"])
    build(tiny("cnn", compute_dtype="bfloat16"))
    with pytest.raises(InputError, match="compute_dtype=float16: v5p"):
        build(tiny("cnn", compute_dtype="float16"))


def test_a_plan_for_eight_tpus_says_what_a_run_costs(tmp_path, monkeypatch):
    """Without libtpu, CPU devices stand in and the plan says so; with it, the same plan is libtpu's."""
    monkeypatch.setattr(target, "installed", lambda package: False)
    plan = planner.plan(tiny("gpt", mesh__data=2, mesh__fsdp=2, mesh__tensor=2), "v5e:2x4")
    r = plan.receipt
    assert r["compiler"] == "analytic"
    printed = "\n".join(receipt.table(r))
    assert "ANALYTIC" in printed
    assert re.search(r"time    [\d.]+ [um]s a step .*tokens/s a chip", printed)
    most = max(r["breakdown_s"], key=r["breakdown_s"].get)
    assert r["limited_by"].startswith({"matmul": "matrix", "memory": "memory bandwidth"}.get(most, most))
    assert f"headroom {units.size(r['capacity_bytes'] - r['peak_bytes'])}" in printed
    assert r["chips"] == 8
    assert r["fits"]
    assert 0 < r["mfu_causal_attention"] < r["mfu_full_attention"] < 1
    assert sum(r["breakdown_s"].values()) == pytest.approx(r["step_s"])
    assert {row["axes"] for row in r["collectives"]} & {"tensor", "fsdp", "data"}
    assert r["model_flops_per_token"] == pytest.approx(r["formula_flops_per_token"], rel=0.01)
    assert r["dollars"] == pytest.approx(r["chip_hours"] * 1.2)
    trace, picture = timeline.write(plan.schedule, tmp_path, "tiny GPT on v5e:2x4")
    events = json.loads(trace.read_text())["traceEvents"]
    assert events[0]["args"]["name"] == "tiny GPT on v5e:2x4"
    phases = [event for event in events if event["ph"] == "X" and event["tid"] == 0]
    middle = {  # compilers move single instructions
        name: np.average([e["ts"] for e in each], weights=[e["dur"] for e in each])
        for name in ("forward", "backward", "optimizer")
        if (each := [e for e in phases if e["name"] == name])
    }
    assert middle["forward"] < middle["backward"] < middle["optimizer"]
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in itertools.pairwise(phases))
    assert picture.stat().st_size > 10_000


def test_what_does_not_fit_on_gpus_names_settings_that_do(monkeypatch):
    monkeypatch.setattr(target, "installed", lambda package: False)
    config = tiny("gpt", seq_len=128, batch_size=256, mesh__data=8)
    small = dataclasses.replace(chips.BY_NAME["h100"], memory_bytes=1.5e9 + 6e6)
    monkeypatch.setitem(chips.BY_NAME, "h100", small)
    with pytest.raises(
        planner.DoesNotFit, match=r"MiB a device too much .*likely to fit: --config"
    ) as caught:
        planner.plan(config, "h100:1x8")
    assert caught.value.missing_bytes > 0
    flags = str(caught.value).split("likely to fit: ")[1].split(", or ")[0].split()
    assert any("microbatches" in flag for flag in flags)
    found = config_lib.override(config, [flag.removeprefix("--config.") for flag in flags])
    assert planner.plan(found, "h100:1x8").receipt["fits"]


@pytest.mark.parametrize(
    ("s", "text"),
    [(0.00463, "4.63 ms"), (320e-6, "320 us"), (12.34567, "12.35 s"), (0.9996, "999.6 ms"), (0, "0 us")],
)
def test_seconds_in_the_unit_that_reads_best(s, text):
    assert units.seconds(s) == text


def test_assumptions_are_replaced(monkeypatch):
    monkeypatch.setattr(target, "installed", lambda package: False)
    once = planner.plan(tiny("gpt"), "h100:1x8").receipt
    twice = planner.plan(tiny("gpt"), "h100:1x8", assume={"watts": 2 * 805.0, "pue": 1.1}).receipt
    assert twice["kwh"] == pytest.approx(2 * once["kwh"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install -e '.[plan]'")
def test_libtpu_plans_and_says_what_does_not_fit():
    result = run_script(
        "plan.py",
        "--config=configs/gpt.py:size=124m",
        "--config.model.depth=2",
        "--target=v5e:2x4",
        limit_s=500,
    )
    assert result.code == 0
    assert "libtpu" in result.out
    result = run_script(
        "plan.py",
        "--config=configs/gpt.py:size=13b",
        "--target=v5e:2x4",
        "--config.batch_size=8",
        limit_s=500,
    )
    assert result.code == 2
    assert "does not fit" in result.err


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install -e '.[plan]'")
def test_a_mesh_lies_on_slices_and_split_dimensions():
    """Only the data axis crosses slices; an axis may be a part of a torus's dimension."""
    two = target.make("2*v5e:4x4").devices
    made = mesh.make_mesh(tiny("gpt", mesh__data=4, mesh__fsdp=8, batch_size=32), two)
    for row in made.devices.reshape(4, 8):
        assert len({device.slice_index for device in row}) == 1
    with pytest.raises(InputError, match=r"mesh.data=1 is no multiple of the 2 slices"):
        mesh.make_mesh(tiny("gpt", mesh__data=1, mesh__fsdp=32, batch_size=32), two)
    whole = target.make("v5p:2x4x4").devices
    made = mesh.make_mesh(tiny("gpt", mesh__data=1, mesh__fsdp=16, mesh__tensor=2, batch_size=32), whole)
    assert made.devices.size == 32


def test_what_the_compiler_refuses_is_one_line(monkeypatch):
    """Also where a run starts: how much is missing, or what the compiler says."""
    built = planner.build(tiny("gpt"), target.here(jax.devices()))

    def refuse(said):
        def compile(*args, **keys):
            raise jax.errors.JaxRuntimeError(said)

        monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
        with pytest.raises(InputError) as caught:
            planner.compile_to_run(built)
        assert "\n" not in str(caught.value)
        return caught.value

    short = refuse(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.\nMore"
    )
    assert isinstance(short, planner.DoesNotFit)
    assert short.missing_bytes == pytest.approx(4.25 * 2**30)
    assert "check compiler_options" in str(refuse("INVALID_ARGUMENT: No such compile option: 'xla_nonsense'"))


@pytest.mark.slow
def test_a_plan_for_serving_fills_the_memory_and_names_its_price(monkeypatch, tmp_path):
    monkeypatch.setattr(target, "installed", lambda package: False)
    config = tiny("gpt", batch_size=8, model__position="rope")
    r = serving_plan.plan(config, "h100:1x1", prompt=5)
    assert r["peak_bytes"] <= r["capacity_bytes"]
    assert r["batch"] > 1000
    assert r["cache_bytes_per_token"] == 2 * 2 * 32 * 4  # keys and values, layers, width, bytes
    assert r["tokens_per_s"] == pytest.approx(r["batch"] / r["token_s"])
    hour = r["tokens_per_s"] * 3600 / 1e6 * r["dollars_per_million_tokens"]
    twice = serving_plan.plan(config, "h100:1x1", prompt=5, assume={"dollars_per_chip_hour": 2 * hour})
    assert twice["dollars_per_million_tokens"] == pytest.approx(2 * r["dollars_per_million_tokens"])
    batches = [point["batch"] for point in r["curve"]]
    assert batches[:3] == [1, 8, 64]
    assert batches == sorted(batches)
    assert batches[-1] == r["batch"]
    assert all(point["peak_bytes"] <= r["capacity_bytes"] for point in r["curve"])
    assert r["context_at_batch_1"] == r["context"] == 16 < r["room_at_batch_1"]
    rows = [line.split()[0] for line in serving_plan.table(r)[-1 - len(batches) : -1]]
    assert rows == [f"{n:,}" for n in batches]
    assert serving_plan.draw(r, tmp_path, "tiny GPT").stat().st_size > 5_000
    with pytest.raises(InputError, match="--mode=serve is for Transformers"):
        serving_plan.plan(tiny("mlp"), "h100:1x1")
    with pytest.raises(InputError, match="--prompt=16: choose 1 to 15"):
        serving_plan.plan(config, "h100:1x1", prompt=16)
