"""The Program computes one thing, whatever the mesh, the microbatches or the precision."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, built, by_path, mesh_keys, random_batch, sized, start, steps, tiny

from bigmodel import config as config_lib
from bigmodel import mesh, train, units
from bigmodel.config import Config, InputError
from bigmodel.plan import calibrate, estimate, flops, layout, planner
from bigmodel.plan import compiled as compiled_lib

# Momentum, decay and clipping, but no Adam: its first steps are near lr * sign(g), which turns a rounding
# error in a gradient that is almost zero into a full step. Without that amplification, ten float32 steps
# differ between meshes only by the order of sums: measured, 5e-7 of a loss or norm and 1.2e-7 in a parameter.
SGD = {"optim__name": "sgd", "optim__lr": 0.1, "optim__weight_decay": 0.01, "optim__schedule": "constant"}
RTOL, ATOL = 5e-6, 2e-6


def assert_same_run(a: tuple[Any, dict], b: tuple[Any, dict], rtol=RTOL, atol=ATOL) -> None:
    for name in a[1]:
        np.testing.assert_allclose(a[1][name], b[1][name], rtol=rtol, err_msg=name)
    ours, theirs = by_path(a[0]["params"]), by_path(b[0]["params"])
    for path in theirs:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=atol, err_msg=path)


# ------------------------------------------------------------------------------------------------ meshes


SLOW = [pytest.param("bert", marks=pytest.mark.slow), pytest.param("vit", marks=pytest.mark.slow)]


def test_the_state_is_born_on_the_mesh_with_the_same_values():
    one, many = built("cnn", **SGD), built("cnn", **SGD, **mesh_keys({"fsdp": 4, "tensor": 2}))
    here, there = (by_path(p.init(jax.random.key(3))) for p in (one, many))
    for path, array in there.items():
        np.testing.assert_allclose(array, here[path], rtol=0, atol=1e-6, err_msg=path)
        assert array.sharding == mesh.param_sharding(many.mesh, many.model.rules, path, array.shape), path


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mesh__data": 3}, r"mesh\.data=3 needs 3 devices, but 8 are here"),
        ({"mesh__tensor": 3}, r"mesh\.tensor=3 needs a multiple of 3 devices, but 8"),
        ({"batch_size": 12}, r"batch_size=12 is not a multiple of 8 .*the next that is: 16"),
        ({"microbatches": 2}, r"batch_size=8 is not a multiple of 16 .*microbatches = 2"),
        ({"mesh__tensor": 8}, r"model\.heads is 4, which mesh\.tensor=8 does not divide"),
        ({"mesh__expert": 2}, r"mesh\.expert is 2, but model\.name=gpt .*does not shard over it"),
        ({"mesh__pipe": 2}, r"mesh\.pipe is 2, .*set it to 1"),
        ({"mesh__expert": 8, "model__experts": 4}, r"model\.experts is 4, which mesh\.expert=8 does not"),
        ({"mesh__tensor": 4, "model__kv_heads": 2}, r"model\.kv_heads is 2, which mesh\.tensor=4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(keys, message):
    with pytest.raises(InputError, match=message):
        mesh.make_mesh(tiny("gpt", **keys))


RULES = "^/embed/ -> none,fsdp; /q/kernel$ -> data+tensor,fsdp; /up/kernel$ -> none,tensor; /out/ -> none"


def test_own_rules_lay_out_parameters_and_change_no_value():
    axes = mesh_keys({"data": 2, "fsdp": 2, "tensor": 2})
    one, many = built("gpt", **SGD), built("gpt", **SGD, **axes, mesh__rules=RULES)
    state = by_path(many.state_spec)
    for path, spec in {
        "embed/table": (None, "fsdp"),
        "blocks/attention/q/kernel": (None, ("data", "tensor"), "fsdp"),
        "blocks/mlp/up/kernel": (None, None, "tensor"),
        "blocks/attention/out/kernel": (None, None, None),
        "blocks/mlp/down/kernel": (None, "tensor", "fsdp"),  # as without rules
    }.items():
        placed = [s.sharding.spec for name, s in state.items() if name.endswith(path)]
        assert len(placed) == 2  # with momentum
        assert set(placed) == {jax.sharding.PartitionSpec(*spec)}, path
    assert_same_run(steps(many, start(many), 10), steps(one, start(one), 10))


ODD = [
    ("cnn", {"data": 2, "fsdp": 2, "tensor": 2}, "/kernel$ -> none,data+tensor"),
    ("gpt", {"data": 2, "fsdp": 2, "tensor": 2}, "/kernel$ -> data+fsdp+tensor,none; /table$ -> data,tensor"),
    ("gpt", {"fsdp": 4, "tensor": 2}, "/kernel$ -> none,fsdp+tensor; /scale$ -> tensor; /bias$ -> fsdp"),
    ("moe", {"expert": 2, "fsdp": 2, "tensor": 2}, "/up/kernel$ -> none,tensor,fsdp+expert; /q/ -> expert"),
    (
        "moe",
        {"expert": 2, "fsdp": 2, "tensor": 2},
        "/experts/ -> tensor,expert,fsdp",
    ),
    ("rnn", {"data": 2, "fsdp": 2, "tensor": 2}, "/kernel$ -> tensor,none,fsdp"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "axes", "rules"), ODD, ids=str)
def test_odd_rules_change_no_value_either(family, axes, rules):
    one, many = built(family, **SGD), built(family, **SGD, **mesh_keys(axes), mesh__rules=rules)
    assert_same_run(steps(many, start(many), 4), steps(one, start(one), 4))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("/tabel$ -> fsdp", r"mesh\.rules: no parameter matches '/tabel\$'; match paths such as /"),
        ("/table$ -> fsdb", r"mesh\.rules has the rule '/table\$' -> 'fsdb'; .* axes of data, fsdp"),
        ("/table$ -> fsdp,fsdp", r"mesh\.rules .* names an axis twice"),
        ("/(table -> fsdp", r"mesh\.rules .* no regular expression"),
        ("/table$", r"mesh\.rules .* write REGEX -> AXIS,AXIS"),
        ("-> fsdp", r"mesh\.rules .* write REGEX -> AXIS,AXIS"),
    ],
)
def test_rules_that_say_nothing_are_refused(rules, message):
    with pytest.raises(InputError, match=message) as caught:
        build(tiny("gpt", mesh__rules=rules))
    assert "\n" not in str(caught.value)


def test_the_sharding_table_adds_up():
    many = built("gpt", **SGD, **mesh_keys({"data": 2, "fsdp": 2, "tensor": 2}), mesh__rules="/q/ -> tensor")
    lines = layout.table(many)
    paths = by_path(many.state_spec["params"])
    assert [line.split()[0] for line in lines[1 : len(paths) + 1]] == list(paths)
    assert any(
        re.search(r"^blocks/attention/q/kernel +\[2, 32, 32\] +float32 +\[-, -, tensor\]", x) for x in lines
    )
    assert lines[-1] == f"state      {units.size(estimate.tree_bytes(many.state_spec))} a device"
    odd = built("gpt", **mesh_keys({"tensor": 2, "data": 1}), model__vocab_size=63)
    assert "embed/table: tensor (2) does not divide 63: replicated over it" in layout.table(odd)


# ---------------------------------------------------------------------------------- microbatches and masks


@pytest.mark.parametrize("family", [pytest.param("gpt", marks=pytest.mark.slow), "cnn"])
def test_microbatches_change_only_rounding(family):
    runs = []
    for pieces in (1, 2, 4):
        part = built(family, **SGD, microbatches=pieces)
        batches = [random_batch(part.config, seed) for seed in range(3)]
        batches[1]["mask"][1:4] = 0  # so the pieces weigh differently, in targets and in examples
        runs.append(steps(part, start(part), 3, batches))
    assert_same_run(runs[1], runs[0])
    assert_same_run(runs[2], runs[0])


def test_microbatches_on_a_mesh():
    one, many = built("gpt", **SGD), built("gpt", **SGD, microbatches=2, **mesh_keys({"data": 2, "fsdp": 2}))
    assert_same_run(steps(many, start(many), 3), steps(one, start(one), 3))


@pytest.mark.parametrize("family", ["gpt", "cnn", "moe", pytest.param("t5", marks=pytest.mark.slow), *SLOW])
def test_what_is_masked_does_not_count(family):
    part = built(family, **SGD)
    batch, other = random_batch(part.config, 0), random_batch(part.config, 1)
    batch["mask"][5:] = 0
    changed = {name: value.copy() for name, value in batch.items()}
    for name in changed.keys() - {"mask"}:
        changed[name][5:] = other[name][5:]
    if family == "gpt":  # targets of padding, too
        changed["targets"] = np.where(batch["segments"] == 0, 7, changed["targets"])
        changed["targets"][:5] = np.where(batch["segments"][:5] == 0, 7, batch["targets"][:5])
    (a, a_rows), (b, b_rows) = (steps(part, start(part), 1, [x]) for x in (batch, changed))
    np.testing.assert_array_equal(a_rows["loss"], b_rows["loss"])
    for path, value in by_path(a["params"]).items():
        np.testing.assert_array_equal(value, by_path(b["params"])[path], err_msg=path)


def test_evaluation_adds_up_to_the_whole():
    part = built("gpt", **SGD)
    state, batch = start(part), random_batch(part.config)
    whole = jax.device_get(part.eval_step(state, part.put(batch)))
    halves = []
    for rows in (slice(0, 4), slice(4, 8)):
        half = {**batch, "mask": np.zeros(8, np.float32)}
        half["mask"][rows] = 1
        halves.append(jax.device_get(part.eval_step(state, part.put(half))))
    for name, (total, weight) in whole.items():
        np.testing.assert_allclose(total, sum(h[name][0] for h in halves), rtol=1e-6, err_msg=name)
        assert weight == sum(h[name][1] for h in halves), name


# ------------------------------------------------------------------------------------ state and precision


@pytest.mark.parametrize("axes", [{"data": 1}, {"fsdp": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("family", ["gpt", "cnn"])
def test_planned_bytes_are_live_bytes(family, axes):
    part = built(family, **SGD, **mesh_keys(axes))
    state, _ = steps(part, start(part), 1)
    batch = part.put(random_batch(part.config))
    for spec, live in ((part.state_spec, state), (part.batch_spec, batch)):
        held = dict.fromkeys(part.mesh.devices.flat, 0)
        for leaf in jax.tree.leaves(live):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.nbytes
        assert set(held.values()) == {estimate.tree_bytes(spec)}


def test_ema_is_the_formula_and_evaluation_uses_it():
    part = built("gpt", **SGD, optim__ema_decay=0.75)
    state = start(part)
    expected = {path: np.array(value) for path, value in by_path(state["params"]).items()}
    for path, value in by_path(state["ema"]).items():
        np.testing.assert_array_equal(value, expected[path])
    for step in range(3):
        state, _ = steps(part, state, 1, [random_batch(part.config, step)])
        params = by_path(jax.device_get(state["params"]))
        expected = {path: 0.75 * expected[path] + 0.25 * params[path] for path in expected}
    for path, value in by_path(state["ema"]).items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-7, err_msg=path)
    batch = part.put(random_batch(part.config))
    metrics = part.eval_step(state, batch)
    as_params = part.eval_step({**state, "params": state["ema"]}, batch)
    other = part.eval_step({**state, "ema": state["params"]}, batch)
    assert metrics["loss"][0] == as_params["loss"][0] != other["loss"][0]


def test_parameters_in_bfloat16_learn_like_float32():
    half = built("gpt", **SGD, compute_dtype="bfloat16", param_dtype="bfloat16")
    full = built("gpt", **SGD)
    state, rows = steps(half, start(half), 10, [random_batch(half.config)])
    _, exact = steps(full, start(full), 10, [random_batch(full.config)])
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("bfloat16")}
    # 8 bits of mantissa round at 0.4 %; half of the fall in loss is far more than what ten steps pile up.
    fall = exact["loss"][0] - exact["loss"][-1]
    np.testing.assert_allclose(rows["loss"], exact["loss"], rtol=0.02, atol=0.25 * fall)


def test_float16_skips_an_overflow_and_recovers():
    part = built("cnn", **SGD, compute_dtype="float16")
    state, batch = start(part), random_batch(part.config)
    state["loss_scale"]["scale"] = jnp.full_like(state["loss_scale"]["scale"], 2.0**24)
    before = by_path(jax.device_get({"params": state["params"], "opt": state["opt"]}))
    state, rows = steps(part, state, 1, [batch])
    assert rows["skipped"] == [1.0]
    assert np.isfinite(rows["loss"]).all()
    assert float(state["loss_scale"]["scale"]) == 2.0**23
    for path, value in by_path({"params": state["params"], "opt": state["opt"]}).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)
    state, rows = steps(part, state, 24, [batch])
    assert rows["skipped"][-5:].sum() == 0
    assert int(state["step"]) == 25
    assert float(state["loss_scale"]["scale"]) == 2.0 ** (23 - rows["skipped"].sum())
    assert rows["loss"][-1] < rows["loss"][0]


# ------------------------------------------------------------------------------------------ plan and FLOPs


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Without the compilation cache, which would hand out the first result."""
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def instructions(text: str) -> list[str]:
    """Compiled HLO without its tables of source lines, whose order depends on what was traced before."""
    text = re.sub(r", metadata=\{[^{}]*\}", "", text)
    header, *computations = text.split("\n\n")
    assert header.startswith("HloModule")
    return [header, *(c for c in computations if "{" in c.strip().partition("\n")[0])]


def planned(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The program that scripts/plan.py reads for this machine, compiled now."""
    found, compile_for = [], planner.compile_for

    def seen(*args: Any) -> Any:
        found.append(compile_for(*args))
        return found[-1]

    with monkeypatch.context() as patch, compiled_anew():
        patch.setattr(planner, "compile_for", seen)
        # Private: what an earlier plan left in the cache would be another process's program.
        patch.setattr(compiled_lib, "_read", lambda path: None)
        patch.setattr(calibrate, "load", lambda folder: None)  # no minute of measuring
        planner.plan(config)
    (only,) = found
    return instructions(only.text)


def trained(config: Config, directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The program that the steps of a run were made with."""
    found = []

    class Loop(train.Loop):
        def step(self, *args: Any) -> None:
            found.append(instructions(self.compiled.as_text()))
            super().step(*args)

    with monkeypatch.context() as patch, compiled_anew():
        patch.setattr(train, "Loop", Loop)
        result = train.run(config, directory)
    assert result.step == len(found) == 1
    return found[0]


OTHERS: list[dict[str, Any]] = [
    {"optim.weight_decay": 0.02},
    {"microbatches": 2},
    {"mesh.fsdp": 4, "mesh.tensor": 1},
    {"compute_dtype": "bfloat16"},
]


@pytest.mark.parametrize(
    ("family", "others"),
    [("cnn", OTHERS[:1]), *(pytest.param(name, OTHERS, marks=pytest.mark.slow) for name in ("cnn", "gpt"))],
)
def test_the_planned_program_is_the_trained_one(family, others, corpus, tmp_path, monkeypatch):
    """Instruction for instruction; any other setting is another program, so a drift would be seen."""
    source = {"data__name": "digits"} if family == "cnn" else {"data__name": corpus, "model__vocab_size": 264}
    few = {"steps": 1, "eval__batches": 1, "log__tensorboard": False, "batch_size": 16}
    config = tiny(family, **SGD, **source, **few, **mesh_keys({"data": 2, "fsdp": 2, "tensor": 2}))
    ran = trained(config, tmp_path / "run", monkeypatch)
    assert sum(text.count(" = ") for text in ran) > 100
    assert planned(config, monkeypatch) == ran
    for changes in others:
        assert planned(config_lib.override(config, changes), monkeypatch) != ran, changes


@pytest.mark.parametrize("size", ["124m", "llama-toy", "moe-toy"])
def test_flops_on_the_jaxpr_are_the_formula(size):
    """6 N T + 12 depth heads head_dim L T (PaLM, appendix B); N leaves out tables that are only looked up."""
    config = sized(size, seq_len=256, batch_size=2)
    part, m = build(config), config.model
    looked_up = {"positions/table"} | (set() if m.tie_embeddings else {"embed/table"})
    params = by_path(part.state_spec["params"])
    n = sum(np.prod(spec.shape) for path, spec in params.items() if path not in looked_up)
    n -= estimate.parameters(params) - estimate.active_parameters(part)
    tokens = config.batch_size * config.seq_len
    formula = (6 * n + 12 * m.depth * m.heads * m.head_dim * config.seq_len) * tokens
    assert flops.model_flops(part) == pytest.approx(formula, rel=0.01)


def test_flops_do_not_depend_on_scan_mesh_or_microbatches():
    keys = [{}, {"model__scan": False}, {"microbatches": 4}, {"mesh__tensor": 2}, {"remat": "full"}]
    assert len({flops.model_flops(built("gpt", **key)) for key in keys}) == 1


def test_flops_of_the_cnn_by_hand():
    part = built("cnn")
    image = 2 * (8 * 8 * 9 * 1 * 8 + 4 * 4 * 9 * 8 * 16 + 4 * 4 * 16 * 16 + 16 * 10)
    assert flops.model_flops(part) == 3 * 8 * image
