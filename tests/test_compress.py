"""Compression: what is said to be smaller is smaller, and what comes out is an ordinary workdir."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ROOT,
    build,
    by_path,
    mesh_keys,
    random_batch,
    run_script,
    start,
    steps,
    tiny,
)

from bigmodel import config as config_lib
from bigmodel import evaluate, mesh, program, sparsity, tasks, train, trees, workdir
from bigmodel.checkpoint import transfer
from bigmodel.compress import (
    channels,
    observe,
    prune,
    quantize,
    recipe,
    report,
    solve,
    stages,
    structure,
    trained,
)
from bigmodel.config import InputError, Prune
from bigmodel.infer import loading
from bigmodel.models import attention, rounding, weights
from bigmodel.plan import estimate, flops
from bigmodel.tasks import distill

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
    assert [s.steps for s in recipe.parse(text)] == [s.steps for s in recipe.parse(str(path))]
    assert recipe.parse(text)[2].steps == (recipe.QuantizeStep("int4", group=32),)


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
    packed = rounding.pack(codes)
    assert packed.nbytes == 3 * 4 * 4
    assert (rounding.unpack(packed, 7) == codes).all()


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(("shape", "sums"), [((3, 3, 8, 5), (-4, -3, -2)), ((6, 8), (-1,))])
def test_rounding_is_off_by_half_a_step_of_its_own_group(kind, shape, sums):
    w = jax.random.normal(jax.random.key(0), shape) * jnp.linspace(0.1, 9, shape[-1])

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def error(group, search):
        held = weights.quantize(w, sums, kind, group, search)
        return jnp.abs(held.astype(jnp.float32) - w), rounding.spread(held.scale, w.shape), held.scale

    for group in (0, 4):
        off, step, scale = error(group, False)
        assert (off <= 0.5001 * step * (32 if kind == "fp8" else 1)).all()  # a float's steps grow
        assert scale.size <= w.size // (4 if group else 6)
    assert jnp.square(error(4, True)[0]).sum() <= jnp.square(off).sum()


def test_zero_weights_stay_zero():
    w = jnp.zeros((4, 4)).at[0, 0].set(1.0)
    for kind in ("int8", "int4"):
        assert (weights.quantize(w, (-2,), kind).astype(jnp.float32) == w).all()


@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int8", 16), ("int4", 0), ("int4", 16)])
def test_products_in_blocks_are_as_exact_as_whole_ones(kind, group, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(weights.InBlocks, "BLOCK", 48 * 10)
    for sums, shape, ask in (((-2,), (48, 37), weights.product), ((-1,), (37, 48), weights.attend)):
        w = weights.quantize(jnp.asarray(rng.normal(size=shape), jnp.float32), sums, kind, group)
        held = weights.InBlocks.of(w)
        assert held.shape == w.shape
        whole = np.asarray(w.astype(jnp.float32))
        np.testing.assert_array_equal(held.astype(jnp.float32), whole)
        x = rng.normal(size=(2, 3, 48)) * np.array([1, 1e-6, 1e6])[:, None]
        exact = x @ (whole if sums == (-2,) else whole.T).astype(np.float64)
        largest = np.abs(exact).max(-1, keepdims=True)
        for dtype, most in ((jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)):
            y = ask(jnp.asarray(x, dtype), held)
            assert y.dtype == dtype
            assert (np.abs(np.asarray(y, np.float64) - exact) <= most * largest).all()
        assert (ask(jnp.zeros((2, 48)), held) == 0).all()
    experts = weights.quantize(jnp.asarray(rng.normal(size=(3, 48, 6)), jnp.float32), (-2,), kind, group)
    other = weights.InBlocks.of(experts)
    assert other.shape == (3, 48, 6)
    np.testing.assert_array_equal(other.astype(jnp.float32), experts.astype(jnp.float32))


def test_a_decoding_loop_keeps_no_floats_of_what_is_in_blocks():
    layers = [weights.quantize(jnp.ones((256, 256)), (-2,), "int8") for _ in range(4)]

    def many(x, held):
        return jax.lax.fori_loop(0, 9, lambda _, y: functools.reduce(weights.product, held, y), x)

    held = [weights.InBlocks.of(w) for w in layers]
    used = jax.jit(many).lower(jnp.ones((1, 256)), held).compile().memory_analysis()
    assert used.temp_size_in_bytes < 256 * 256 * 4


@pytest.mark.parametrize(("family", "kind"), [("cnn", "int8"), ("moe", "int4")])
def test_planned_bytes_are_live_bytes_and_a_fraction_of_dense(family, kind):
    built = build(tiny(family, quantize__weights=kind))
    state = start(built)
    assert estimate.tree_bytes(built.state_spec) == sum(x.nbytes for x in jax.tree.leaves(state))
    sums = built.model.products
    names = [name for name in sums if "router" not in name]
    dense_bytes = sum(x.size * 4 for path, x in by_path(built.model.plain_spec).items() if path in names)
    codes = sum(x.nbytes for x in jax.tree.leaves(state["rest"]["codes"]))
    assert codes * {"int8": 4, "int4": 8}[kind] == dense_bytes


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("family", "recipe_text"),
    [pytest.param("gpt", "quantize:int8:gptq", marks=pytest.mark.slow), ("cnn", "quantize:w8a8")],
)
def test_other_ways_to_quantize_stay_near_the_dense_model(family, recipe_text, monkeypatch):
    model = model_of(family, monkeypatch)
    small = quantize.apply(model, recipe.parse(recipe_text)[0].steps[0])
    assert loss_of(small) == pytest.approx(loss_of(model), rel=0.02)
    if "w8a8" in recipe_text:
        text = str(jax.make_jaxpr(lambda *a: small.program.model.apply(*a, key=None, train=False)[0])(
            small.params, small.rest, random_batch(small.config, 0)))  # fmt: skip
        assert "preferred_element_type=int32" in text  # integers are what is multiplied


def test_float8_multiplies_float8_where_there_is_a_chip_and_is_refused_elsewhere(monkeypatch):
    x, w = jax.random.normal(jax.random.key(0), (5, 16)), jax.random.normal(jax.random.key(1), (16, 8))
    held = weights.quantize(w, (-2,), "fp8")
    held = dataclasses.replace(held, activation=jnp.abs(x).max() / rounding.LARGEST["fp8"])
    np.testing.assert_allclose(jax.jit(held.product)(x), x @ w, atol=0.6)
    with pytest.raises(InputError, match="float8; use int8"):
        quantize.apply(model_of("cnn", monkeypatch), recipe.QuantizeStep("fp8"))


def test_a_model_trained_to_be_rounded_is_rounded_without_loss(monkeypatch):
    op = recipe.parse("quantize:int4:aware:steps=3:group=8:on=hidden/kernel")[0].steps[0]
    model = quantize.aware(model_of("cnn", monkeypatch), op)
    state = program.start(model.program, model.params, model.rest, jax.random.key(0))
    state, metrics = steps(model.program, state, 3, [random_batch(model.config, 0)])
    assert metrics["loss"][-1] < metrics["loss"][0]
    model = dataclasses.replace(model, params=state["params"])
    small = quantize.apply(model, op)
    assert loss_of(small) == pytest.approx(loss_of(model), rel=1e-5)
    assert by_path(small.rest)["codes/hidden/kernel"].dtype == jnp.uint8


# ----------------------------------------------------------------------------------------------- distilling


def test_a_teacher_costs_what_the_plan_says_and_evaluation_does_without(dense):
    config = tiny("cnn", model__channels=(4, 4), model__width=8, **DIGITS | {"distill__teacher": str(dense)})
    alone, small = build(tiny("cnn", **DIGITS)), build(config)
    student = build(config.replace(distill=config_lib.Distill()))
    held = [estimate.tree_bytes(p.state_spec["params"]) for p in (alone, small, student)]
    assert estimate.tree_bytes(small.state_spec["rest"]) == held[0]
    assert held[1] == held[2]
    assert flops.teacher_flops(small) == flops.forward_flops(alone)
    assert flops.model_flops(small) == flops.model_flops(student) + flops.forward_flops(alone)
    state = program.start(small, *small.model.init(jax.random.key(0)), jax.random.key(0))
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == estimate.tree_bytes(small.state_spec)
    batch = small.put(random_batch(config, 0))
    rest = {key: value for key, value in state["rest"].items() if key != "teacher"}
    own = student.eval_step({"params": state["params"], "rest": rest}, batch)
    assert float(small.eval_step(state, batch)["loss"][0]) == float(own["loss"][0])


def test_the_distance_from_a_teacher_is_zero_at_the_teacher_and_nowhere_below():
    config = tiny("cnn")
    logits = jax.random.normal(jax.random.key(0), (6, 10))
    assert distill.distance(config, logits, logits) == pytest.approx(np.zeros(6), abs=1e-6)
    assert distill.distance(config, logits + 3, logits) == pytest.approx(np.zeros(6), abs=1e-5)
    assert (distill.distance(config, logits[::-1], logits) > 0).all()
    assert distill.likeness(2 * logits, logits, (6,)) == pytest.approx(np.zeros(6), abs=1e-6)


def test_maps_are_no_way_from_themselves_and_learning_brings_them_near():
    key = jax.random.split(jax.random.key(0), 6)
    told = attention.Attended(
        *(jax.random.normal(k, (2, 6, heads, 8)) for k, heads in zip(key, (4, 2, 2), strict=False))
    )
    mask = attention.visible(jnp.asarray([[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]), 6, 6, causal=True)
    told = told._replace(mask=mask)
    np.testing.assert_allclose(distill.maps_apart(told, told), np.zeros((2, 6)), atol=1e-6)
    own = [jax.random.normal(k, (2, 6, 3, 4)) for k in key[3:]]  # other heads, another width

    @jax.jit
    def far(own):
        return distill.maps_apart(attention.Attended(*own, mask), told).sum()

    first, slope = jax.value_and_grad(far)(own)
    assert first > 0
    assert far(jax.tree.map(lambda x, g: x - 0.05 * g, own, slope)) < first
    later = told._replace(k_BSGK=told.k_BSGK.at[:, 5].set(9.0))  # nobody sees it in the first document
    np.testing.assert_allclose(distill.maps_apart(later, told)[:, :4], np.zeros((2, 4)), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "bert", "t5", "vit"])
def test_a_narrower_student_learns_its_teachers_maps(family, tmp_path):
    config = tiny(family)
    built = build(config)
    state = start(built)
    sharp = jax.tree.map(lambda x: 4 * x, state["params"])  # at first all attend to all alike
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    keys = {"distill__teacher": str(tmp_path), "distill__attention": 10.0, "distill__weight": 0.0}
    taught = build(tiny(family, model__width=24, model__heads=2, **keys))
    student = start(taught)
    rest = {**student["rest"], "teacher": {"params": sharp, "rest": state["rest"]}}
    both = program.start(taught, student["params"], rest, jax.random.key(0))
    _, metrics = steps(taught, both, 20, [random_batch(config, 0)])
    assert metrics["attention_loss"][-1] < 0.9 * metrics["attention_loss"][0]


@pytest.mark.slow
def test_a_plan_counts_the_maps_that_are_compared(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_dict(tiny("gpt"))))
    programs = [
        build(tiny("gpt", distill__teacher=str(tmp_path), distill__attention=how)) for how in (0.0, 1.0)
    ]
    plain, maps = map(flops.gradient_flops, programs)
    c = programs[0].config
    one = 2 * c.batch_size * c.seq_len**2 * c.model.width  # a product of the heads of the last layer
    assert maps - plain == 2 * (1 + 3) * one  # queries by keys, values by values: the teacher's, and trained
    assert flops.model_flops(programs[1]) == maps


def test_what_has_no_attention_teaches_none(dense):
    with pytest.raises(InputError, match=r"distill\.attention finds no attention in the model \(cnn\)"):
        build(tiny("cnn", distill__teacher=str(dense), distill__attention=1.0))


@pytest.mark.slow
def test_a_distilled_student_is_an_ordinary_smaller_model(dense, tmp_path):
    text = "distill:4:student.channels=[4,4]:student.width=8:hidden=0.5"
    rows = stages.run(dense, recipe.parse(text), tmp_path / "out")
    assert rows[1]["params"] < rows[0]["params"]
    config = workdir.read_config(tmp_path / "out")
    assert config.model.channels == (4, 4)
    assert config.distill.teacher == ""


@pytest.mark.slow
def test_a_teacher_may_lie_in_hugging_faces_layout(gpt, tmp_path):
    transfer.export_safetensors(gpt, tmp_path / "hf")
    rows = stages.run(gpt, recipe.parse(f"distill:2:teacher={tmp_path}/hf"), tmp_path / "out")
    assert rows[1]["params"] == rows[0]["params"]
    with pytest.raises(InputError, match="does not exist"):
        stages.run(gpt, recipe.parse(f"distill:2:teacher={tmp_path}/nothing"), tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "bert", "t5", "vit", "moe", "mlp"])
def test_every_task_can_have_a_teacher(family, tmp_path, monkeypatch):
    """The student starts as its teacher: the distance is zero, then it is not."""
    attends = family != "mlp"
    config = tiny(family)
    built = build(config)
    state = start(built)
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    keys = {"distill__teacher": str(tmp_path), "distill__hidden": 1.0, "distill__attention": float(attends)}
    taught = build(tiny(family, **keys))
    rest = {**state["rest"], "teacher": {"params": state["params"], "rest": state["rest"]}}
    both = program.start(
        taught, jax.tree.map(jnp.copy, state["params"]), jax.tree.map(jnp.copy, rest), jax.random.key(0)
    )
    _, metrics = steps(taught, both, 3, [random_batch(config, 0)])
    for name in ("distill_loss", "hidden_loss", *(["attention_loss"] if attends else [])):
        assert metrics[name][0] == pytest.approx(0, abs=1e-5)
        assert metrics[name][-1] > 0


# ------------------------------------------------------------------------------------------------- pruning


RECOMMENDERS = {
    "model__users": 1024, "model__items": 512, "model__width": 8, "model__widths": (16, 8),
    "model__bottom": (8,), "batch_size": 16, "steps": 4, "microbatches": 1,
}  # fmt: skip


def config_of(family, **keys):
    if family not in ("mf", "ncf", "two_tower", "dlrm"):
        return tiny(family, **keys)
    changes = {key.replace("__", "."): value for key, value in {**RECOMMENDERS, **keys}.items()}
    return tasks.sized(config_lib.load(f"{ROOT}/configs/recommender.py:kind={family}", changes))


def build_of(config):
    if config.model.name != "recommender":
        return build(config)
    return program.build(config, mesh.make_mesh(config, jax.devices()[:1]), tasks.batch_spec(config))


def batch_of(config, seed):
    if config.model.name != "recommender":
        return random_batch(config, seed)
    return tasks.make_pipeline(config, "train")[seed]


def model_of(family, monkeypatch, **keys):
    """A model that is not trained, whose calibration batches are random ones."""
    config = config_of(family, **keys)
    built = build_of(config)
    state = built.init(jax.random.key(0)) if config.model.name == "recommender" else start(built)
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape),
        jax.device_get(state["params"]),
    )
    params = jax.device_put(params, jax.tree.map(lambda s: s.sharding, built.state_spec["params"]))
    batches = [built.put(batch_of(config, index)) for index in range(2)]
    monkeypatch.setattr(observe, "batches", lambda model: iter(batches))
    return trained.Trained(built, params, state["rest"], pathlib.Path("nowhere"))


def loss_of(model):
    batch = model.program.put(batch_of(model.config, 0))
    total, weight = model.program.eval_step({"params": model.params, "rest": model.rest}, batch)["loss"]
    return float(total / weight)


def zeros(model, name):
    return 1 - float(jnp.count_nonzero(by_path(model.params)[name]) / by_path(model.params)[name].size)


UP, KERNEL = "blocks/mlp/up/kernel", "convs/1/kernel"


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "amount"),
    [
        ("sparsegpt", "2:4"), pytest.param("sparsegpt", "0.5", marks=SLOW),
        pytest.param("wanda", "0.5", marks=SLOW), pytest.param("wanda", "2:4", marks=SLOW),
        pytest.param("magnitude", "0.5", marks=SLOW),
    ],
)  # fmt: skip
def test_one_shot_pruning_sets_the_share_that_was_asked_for(method, amount, monkeypatch):
    model = model_of("gpt", monkeypatch)
    small = prune.apply(model, recipe.parse(f"prune:{amount}:{method}")[0].steps[0])
    w = by_path(small.params)[UP]
    assert zeros(small, UP) == pytest.approx(0.5, abs=0.01)
    if amount == "2:4":
        assert (jnp.count_nonzero(w.reshape(2, -1, 4, w.shape[-1]), axis=2) == 2).all()
    elif method == "magnitude":  # of each layer, the largest
        kept = jnp.abs(jnp.where(w != 0, w, jnp.inf)).min((1, 2))
        gone = jnp.where(w == 0, jnp.abs(by_path(model.params)[UP]), 0).max((1, 2))
        assert (gone <= kept).all()
    assert zeros(small, "embed/table") == 0


@pytest.mark.slow
def test_global_pruning_compares_all_layers(monkeypatch):
    model = model_of("cnn", monkeypatch)
    small = prune.apply(model, recipe.parse("prune:0.6:global")[0].steps[0])
    names = [name for name in by_path(model.params) if name.endswith("kernel")]
    sizes = np.array([by_path(model.params)[name].size for name in names])
    shares = np.array([zeros(small, name) for name in names])
    assert (shares * sizes).sum() / sizes.sum() == pytest.approx(0.6, abs=1e-3)
    assert shares.max() - shares.min() > 0.05
    gone, kept = 0.0, np.inf
    for name in names:
        was, now = (np.abs(np.asarray(by_path(m.params)[name])) for m in (model, small))
        gone, kept = max(gone, was[now == 0].max()), min(kept, now[now > 0].min())
    assert gone <= kept


def test_what_is_told_of_the_inputs_is_what_the_product_sees(monkeypatch):
    """The first layer's MLP reads a norm of the stream; its gram's trace is known: tokens x width x scale."""
    model = model_of("gpt", monkeypatch)
    gram = observe.inputs(model, [UP], "gram")[UP]
    largest = observe.inputs(model, [UP], "largest")[UP]
    assert gram.shape == (2, 32, 32)
    assert (jnp.linalg.eigvalsh(gram) > -1e-3).all()
    assert (jnp.diagonal(gram, axis1=1, axis2=2).max(1) >= jnp.square(largest)).all()
    tokens = 2 * 8 * 16
    scale = by_path(model.params)["blocks/mlp_norm/scale"]
    bias = by_path(model.params)["blocks/mlp_norm/bias"]
    assert scale.shape == bias.shape == (2, 32)
    assert jnp.trace(gram, axis1=1, axis2=2) == pytest.approx(np.full(2, tokens * 32), rel=0.3)


@pytest.mark.parametrize(("pattern", "group"), [("2:4", 16), ("", 0)])
@pytest.mark.slow
def test_solvers_beat_rounding_and_magnitude_on_the_layers_own_error(pattern, group):
    key = jax.random.split(jax.random.key(0), 3)
    mixed = jax.random.normal(key[0], (512, 16)) @ jax.random.normal(key[1], (16, 64))  # as features are
    x = mixed + 0.5 * jax.random.normal(key[1], (512, 64))
    w = jax.random.normal(key[2], (64, 48))
    gram = x.T @ x

    def error(new):
        return float(jnp.square(x @ (w - new)).sum())

    how = Prune(sparsity=0.5, pattern=pattern)
    new = jax.jit(solve.sparsegpt, static_argnums=2)(w, gram, how)
    keep = sparsity.masks(how, {"w": (-2,)}, {"w": jnp.abs(w)}, 0.5)["w"]
    assert float((new == 0).mean()) == pytest.approx(0.5, abs=0.01)
    assert error(new) < 0.6 * error(jnp.where(keep, w, 0))
    nearest = jax.jit(weights.quantize, static_argnums=(1, 2, 3, 4))(w, (-2,), "int4", group, True)
    solved = jax.jit(solve.gptq, static_argnums=(2, 3))(w, gram, "int4", group)
    assert error(solved.astype(jnp.float32)) < 0.4 * error(nearest.astype(jnp.float32))


@pytest.mark.parametrize("meshes", [[{}], pytest.param([{}, {"fsdp": 2, "tensor": 2}], marks=SLOW)])
def test_masks_hold_through_training_on_any_mesh(meshes, monkeypatch):
    model = model_of("cnn", monkeypatch)
    small = prune.apply(model, recipe.parse("prune:0.7")[0].steps[0])
    ends = []
    for axes in meshes:
        built = build(dataclasses.replace(small.config, mesh=config_lib.Mesh(**{"data": 1, **axes})))
        sharding = jax.tree.map(lambda s: s.sharding, (built.state_spec["params"], built.state_spec["rest"]))
        laid = jax.device_put(jax.device_get((small.params, small.rest)), sharding)
        state = program.start(built, *laid, jax.random.key(0))
        state, metrics = steps(built, state, 4, [random_batch(built.config, 0)])
        assert metrics["loss"][-1] < metrics["loss"][0]
        new = by_path(state["params"])
        for name in (KERNEL, "hidden/kernel"):
            np.testing.assert_array_equal(new[name] == 0, by_path(small.params)[name] == 0)
        ends.append(jax.device_get(new[KERNEL]))
    np.testing.assert_allclose(ends[0], ends[-1], atol=2e-5)


@pytest.mark.parametrize("method", ["magnitude", pytest.param("movement", marks=SLOW)])
def test_a_schedule_prunes_step_by_step_up_to_the_share(method):
    keys = {"sparsity": 0.8, "end_step": 8, "every_steps": 2, "method": method}
    built = build(tiny("cnn", **{f"prune__{key}": value for key, value in keys.items()}))
    state, shares, gone = start(built), [], np.zeros((3, 3, 8, 16), bool)
    for index in range(10):
        state, _ = built.train_step(state, built.put(random_batch(built.config, index)))
        zero = np.asarray(by_path(state["params"])[KERNEL] == 0)
        assert zero[gone].all()  # what is pruned stays so
        gone = zero
        shares.append(zero.mean())
    assert shares == sorted(shares)
    assert shares[0] < 0.05
    assert shares[-1] == pytest.approx(0.8, abs=0.01)
    assert len(set(shares)) == 5  # on the schedule's steps and at the end, and on no other


STRUCTURES = [
    ("cnn", "channels", {}),
    *(pytest.param(family, unit, keys, marks=SLOW) for family, unit, keys in [
        ("gpt", "heads", {}), ("gpt", "mlp", {}), ("moe", "mlp", {}), ("t5", "heads", {}), ("vit", "mlp", {}),
        ("mlp", "channels", {}), ("vgg", "channels", {"model__batch_norm": True}),
        ("alexnet", "channels", {}), ("resnet", "channels", {}), ("resnet", "channels", {"model__depth": 50}),
        ("rnn", "channels", {}), ("rnn", "channels", {"model__cell": "gru", "model__tie_embeddings": True}),
        ("rnn", "channels", {"model__embed_width": 24, "model__tie_embeddings": True}),
        ("inception", "channels", {"model__multiplier": 0.125, "model__aux": True}),
        ("inception", "channels", {"model__multiplier": 0.125, "model__aux": True, "model__version": "v3"}),
        ("gan", "channels", {"model__norm": "spectral", "model__num_classes": 10}),
        ("gan", "channels", {"data__image_size": 16}),
        ("gan", "channels", {"model__arch": "resnet", "model__norm": "spectral", "model__num_classes": 10}),
        ("gan", "channels", {"model__arch": "resnet", "model__norm": "none", "task__gan_loss": "wgan-gp"}),
        ("detector", "channels", {}), ("detector", "channels", {"model__head_depth": 2}),
        *((kind, "channels", {}) for kind in ("mf", "ncf", "two_tower", "dlrm")),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "unit", "keys"), STRUCTURES)
def test_taking_out_units_that_do_nothing_changes_nothing(family, unit, keys, monkeypatch):
    """Half of the units of every layer are set to zero, then half are taken out; what is left trains."""
    model = model_of(family, monkeypatch, **keys)
    flat = {name: np.array(x) for name, x in structure.arrays(vars(model)).items()}
    rng = np.random.default_rng(0)
    for group in channels.find(model.config.model, unit, flat):
        lead = flat[group.cuts[0].path].shape[: group.lead]
        half = np.arange(group.count) < group.count // 2
        off = rng.permuted(np.broadcast_to(half, (*lead, group.count)), axis=-1)
        for cut in group.cuts:
            if cut.path.startswith("params/"):
                x = np.moveaxis(flat[cut.path], cut.axis, group.lead)
                places = cut.places(x.shape[group.lead], group.count)
                for index in np.ndindex(*lead):
                    x[*index, places[off[index]].ravel()] = 0
    zeroed = {name.removeprefix("params/"): x for name, x in flat.items() if name.startswith("params/")}
    sharding = jax.tree.map(lambda x: x.sharding, model.params)
    model = dataclasses.replace(
        model, params=jax.device_put(trees.with_leaves(model.params, zeroed), sharding)
    )
    small = structure.apply(model, recipe.PruneStep(0.5, unit=unit))
    assert loss_of(small) == pytest.approx(loss_of(model), rel=1e-5)
    was, now = (sum(x.size for x in jax.tree.leaves(m.params)) for m in (model, small))
    assert now < 0.9 * was
    assert flops.forward_flops(small.program) < 0.9 * flops.forward_flops(model.program)
    if family != "cnn":
        state = program.start(small.program, small.params, small.rest, jax.random.key(0))
        _, metrics = small.program.train_step(state, next(observe.batches(small)))
        assert np.isfinite(metrics["loss"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rnn", "inception", "gan", "detector", "ncf"])
def test_what_is_left_is_saved_loaded_and_trained_on(family, corpus, tmp_path):
    sources = {"rnn": corpus, "inception": "digits", "gan": "digits"}
    keys = {key: value for key, value in DIGITS.items() if key != "data__data_dir"} | {"steps": 2}
    if family in sources:
        keys |= {"data__name": sources[family], "data__eval_split": "train" if family == "rnn" else "test"}
    keys |= {"model__vocab_size": 264} if family == "rnn" else {}
    train.run(config_of(family, **keys), tmp_path / "run")
    rows = stages.run(tmp_path / "run", recipe.parse("prune:0.5:channels+finetune:2"), tmp_path / "out")
    assert rows[1]["params"] < 0.8 * rows[0]["params"]
    program, state = loading.load(tmp_path / "out")
    again = evaluate.run(program, state, trained.eval_data(trained.load(tmp_path / "out")))
    assert again == pytest.approx(rows[1]["metrics"], rel=1e-4, abs=1e-5)
    config = workdir.read_config(tmp_path / "out")
    assert train.run(config.replace(steps=4), tmp_path / "out").step == 4


@pytest.mark.slow
def test_the_layer_that_matters_least_goes_first(monkeypatch):
    model = model_of("gpt", monkeypatch, model__depth=3)
    flat = by_path(model.params)
    idle = {
        name: x.at[1].set(0)
        for name, x in flat.items()
        if name.startswith("blocks/") and ("/out/" in name or "/down/" in name)
    }
    model = dataclasses.replace(model, params=trees.with_leaves(model.params, idle))
    small = structure.apply(model, recipe.PruneStep(0.33, unit="layers"))
    assert small.config.model.depth == 2
    assert structure._loss(small) <= structure._loss(model) + 1e-6  # as good as without the idle one


# -------------------------------------------------------------------------------------------- from end to end


def test_a_compressed_workdir_is_a_workdir(dense, tmp_path):
    out = tmp_path / "out"
    rows = stages.run(dense, recipe.parse("quantize:int8"), out)
    assert [row["stage"] for row in rows] == ["dense", "quantize:int8"]
    assert rows[0]["memory_bytes"] / rows[1]["memory_bytes"] > 3
    assert rows[0]["params"] == rows[1]["params"]
    told = json.loads((out / "report.json").read_text())["stages"]
    for row in told:
        assert set(row["latency_s"]) == {"1", "32"}
        assert all(value > 0 for value in row["latency_s"].values())
        assert row["joules_per_example"]["1"] > 0
        assert row["joules_from"].startswith(("measured", "modelled"))
    assert (out / "report.png").stat().st_size > 1000
    program, state = loading.load(out)
    again = evaluate.run(program, state, trained.eval_data(trained.load(out)))
    assert again == pytest.approx(told[-1]["metrics"], rel=1e-5)


@pytest.mark.slow
def test_steps_that_train_compose_and_training_goes_on(dense, tmp_path):
    text = (
        "prune:0.5+finetune:2,prune:0.8:steps=8:movement,prune:0.5:channels+finetune:2,"
        "quantize:int4:aware:steps=2:group=4"
    )
    rows = stages.run(dense, recipe.parse(text), tmp_path / "out")
    kernels = 0.9  # of the parameters are in kernels
    assert rows[1]["nonzero_params"] < (1 - 0.5 * kernels) * rows[1]["params"]
    assert rows[2]["nonzero_params"] < (1 - 0.75 * kernels) * rows[2]["params"]
    assert rows[3]["flops_per_example"] < 0.7 * rows[0]["flops_per_example"]
    assert rows[4]["memory_bytes"] < 0.4 * rows[3]["memory_bytes"]  # a scale for every 4 codes is as large
    config = workdir.read_config(tmp_path / "out")
    assert train.run(config.replace(steps=config.steps + 2), tmp_path / "out").step == config.steps + 2


@pytest.mark.slow
def test_a_language_model_shrinks_on_disk_too(gpt, tmp_path):
    rows = stages.run(gpt, recipe.parse("quantize:int4:group=16"), tmp_path / "out")
    assert rows[1]["memory_bytes"] < 0.3 * rows[0]["memory_bytes"]
    assert rows[1]["disk_bytes"] < rows[0]["disk_bytes"]
    ran = run_script("generate.py", f"--workdir={tmp_path / 'out'}", "--length=3", "--prompt=mesh")
    assert ran.code == 0, ran


def test_a_gain_is_told_from_chance():
    runs = [
        [{"stage": "a", "metrics": {"accuracy": x}}, {"stage": "b", "metrics": {"accuracy": x + d}}]
        for x, d in ((0.90, 0.010), (0.93, 0.012), (0.91, 0.008))
    ]
    found = report.spread(runs)[1]["metrics"]["accuracy"]
    assert found["gain"] == pytest.approx(0.01)
    assert found["mean"] == pytest.approx(np.mean([0.91, 0.942, 0.918]))
    assert found["p"] == pytest.approx(
        0.01307, abs=1e-4
    )  # t = 0.01 / (0.002 / sqrt(3)), 2 degrees of freedom
    assert report.paired_t([0.01, -0.012, 0.008, -0.009]) > 0.5
    assert report.paired_t([0.0, 0.0]) is None
    assert (
        "+0.0100 from the stage before (p = 0.013, paired t)" in report.spread_table(report.spread(runs))[1]
    )


@pytest.mark.slow
def test_students_of_one_seed_differ_by_their_teacher_alone(dense, tmp_path):
    """Alone twice: alike. The repetitions differ from each other."""
    text = "distill:4:student.channels=[4,4]:student.width=8:weight={}"
    steps = recipe.parse(",".join(text.format(weight) for weight in (0, 0, 5)))
    rows = stages.repeat(dense, steps, tmp_path / "out", 2)
    alone, again, taught = (row["metrics"]["loss"]["values"] for row in rows[1:])
    assert alone == again != taught
    assert alone[0] != alone[1]
    assert rows[2]["metrics"]["loss"]["p"] is None
    assert json.loads((tmp_path / "out" / "report.json").read_text())["stages"] == rows
    assert loading.load(tmp_path / "out" / "2")[0].config.model.width == 8


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
        ("prune:2:4", "multiple of 4 inputs, but convs/0/kernel has 1"),
        ("prune:0.5:heads", "a cnn has no unit=heads"),
    ],
)
def test_bad_recipes_leave_the_output_untouched(dense, tmp_path, recipe_text, said, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(report, "describe", lambda name, model: {})
    with pytest.raises(InputError, match=said):
        stages.run(dense, recipe.parse(recipe_text), out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe_text", "message"),
    [
        ("finetune:2,quantize:int8,prune:0.5", "prune it before"),
        ("finetune:2,quantize:int8+quantize:int4", "int8 already"),
        ("finetune:2,prune:0.5:heads", "no unit=heads"),
        ("finetune:2,distill:2:student.widht=8", "'model.width'"),
    ],
)
def test_a_recipe_is_checked_before_its_first_stage(dense, tmp_path, capsys, recipe_text, message):
    with pytest.raises(InputError, match=message):
        stages.run(dense, recipe.parse(recipe_text), tmp_path / "out")
    assert "step" not in capsys.readouterr().out  # no training step ran
    assert list(tmp_path.iterdir()) == []


def test_a_new_student_may_be_pruned_after_its_model_was_quantized(dense):
    config = workdir.read_config(dense)
    stages.check(config, recipe.parse("quantize:int8,distill:2:student.width=8,prune:0.5"))


def test_bad_workdirs_are_one_line_and_exit_code_2(dense, tmp_path):
    empty, broken, out = (tmp_path / name for name in ("empty", "broken", "out"))
    empty.mkdir()
    shutil.copyfile(dense / "config.json", empty / "config.json")
    shutil.copytree(dense, broken)
    for path in (broken / "checkpoints").rglob("*"):
        if path.is_file() and "ocdbt.process" in str(path) and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    ran = run_script("compress.py", f"--workdir={tmp_path}/none", "--recipe=quantize:int8", f"--out={out}")
    assert ran.code == 2, ran
    assert sum(line.startswith("error: ") for line in ran.err.splitlines()) == 1
    assert "config.json" in ran.err
    for where, said in ((empty, "no checkpoint"), (broken, "no good checkpoint")):
        with pytest.raises(InputError, match=said):
            stages.run(where, recipe.parse("quantize:int8"), out)
    assert not out.exists()


def test_an_output_directory_that_holds_something_is_refused(dense, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(InputError, match="not an empty directory"):
        stages.run(dense, recipe.parse("quantize:int8"), tmp_path)
    assert (tmp_path / "kept").read_text() == "mine"
