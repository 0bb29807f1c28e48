"""Fine-tuning: what is loaded, what stays frozen, adapters; and that none of it changes with the mesh."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT, build, built, by_path, mesh_keys, random_batch, run_script, start, steps, tiny

from bigmodel import config as config_lib
from bigmodel import data, models, program, train, workdir
from bigmodel.checkpoint import transfer
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.checkpoint.digests import digest
from bigmodel.config import InputError
from bigmodel.infer import loading
from bigmodel.infer.predict import Predictor
from bigmodel.models import layers
from bigmodel.plan import estimate, flops

SGD = {"optim__name": "sgd", "optim__lr": 0.1, "optim__weight_decay": 0.01, "optim__schedule": "constant"}
LORA = {"lora__rank": 4, "lora__on": r"/attention/|/mlp/"}
FROZEN = {"optim__freeze": "^/(embed|positions)/"}
FAST = {"log__tensorboard": False, "eval__batches": 1, "checkpoint__every_steps": 2, "data__cache": False}


def save_run(config: Any, directory: pathlib.Path, seed: int = 1) -> dict[str, np.ndarray]:
    """A workdir of a run that has not trained yet; -> its parameters by path."""
    state = build(config).init(jax.random.key(seed))
    directory.mkdir()
    workdir.write_config(directory, config)
    with Checkpoints(directory / "checkpoints", async_save=False) as checkpoints:
        checkpoints.save(3, state, {})
    return jax.device_get(by_path(state["params"]) | by_path(state["rest"]))


def unlike(a: Any, b: Any) -> set[str]:
    """Paths of the arrays that differ in any bit."""
    a, b = jax.device_get(by_path(a)), jax.device_get(by_path(b))
    assert a.keys() == b.keys()
    return {path for path, x in a.items() if x.tobytes() != b[path].tobytes()}


# ---------------------------------------------------------------------------------------------- loading


def test_every_array_is_loaded_skipped_or_new(tmp_path):
    there = save_run(tiny("gpt", seq_len=32), tmp_path / "old")
    new = {"model__vocab_size": 72, "model__tie_embeddings": False, "optim__ema_decay": 0.9}
    part = build(tiny("gpt", **new))
    before = start(part)
    state, report = transfer.load(part, before, str(tmp_path / "old"), skip="/mlp/down/")
    paths = by_path(state["params"]).keys()
    assert sorted([*report.loaded, *report.skipped, *report.new]) == sorted(paths)
    assert report.new == ["head/kernel"]
    assert set(report.skipped) == {"embed/table", "blocks/mlp/down/kernel", "blocks/mlp/down/bias"}
    assert "[64, 32] there, [72, 32] here" in report.skipped["embed/table"]
    for path in report.loaded:
        rows = slice(16) if path == "positions/table" else slice(None)
        np.testing.assert_array_equal(by_path(state["params"])[path], there[path][rows])
        np.testing.assert_array_equal(by_path(state["ema"])[path], by_path(state["params"])[path])


@pytest.mark.slow
def test_statistics_are_loaded_and_a_new_head_is_not(tmp_path):
    there = save_run(tiny("resnet"), tmp_path / "old")
    part = build(tiny("resnet", model__num_classes=7))
    state, report = transfer.load(part, start(part), str(tmp_path / "old"))
    assert set(report.skipped) == {"head/kernel", "head/bias"}
    assert not report.new
    mean = "stem/norm/mean"
    np.testing.assert_array_equal(by_path(state["rest"])[mean], there[mean])


@pytest.mark.slow
def test_a_run_starts_from_another_and_resumes_without_it(corpus, tmp_path):
    """And the resumed run is the straight one, with adapters, frozen parameters and an average."""
    more = {"lora__rank": 2, "lora__train": "^/norm/", "optim__ema_decay": 0.9, "optim__schedule": "constant"}
    config = tiny("gpt", data__name=corpus, model__vocab_size=264, steps=4, **FAST)
    save_run(config, tmp_path / "old")
    changes = {key.replace("__", "."): value for key, value in more.items()}
    config = config_lib.override(config, changes | {"init.from": str(tmp_path / "old")})
    straight = train.run(config, tmp_path / "straight")
    report = json.loads((tmp_path / "straight" / "init.json").read_text())
    adapters = [path for path in by_path(straight.state["params"]) if path.startswith("lora/")]
    assert sorted(report["new"]) == sorted(adapters)
    assert len(report["loaded"]) + len(adapters) == len(by_path(straight.state["params"]))
    train.run(config.replace(steps=2), tmp_path / "cut")
    shutil.rmtree(tmp_path / "old")
    resumed = train.run(config, tmp_path / "cut")
    assert resumed.step == 4
    assert digest(resumed.state) == digest(straight.state)


def test_the_sources_model_must_be_the_same(tmp_path):
    save_run(tiny("gpt"), tmp_path / "old")
    for keys, words in (
        ({"model__heads": 2}, r"model\.heads=4, this run 2"),
        ({"model__mlp": "relu"}, r"model\.mlp=gelu, this run relu"),
    ):
        part = build(tiny("gpt", **keys))
        with pytest.raises(InputError, match=words):
            transfer.load(part, start(part), str(tmp_path / "old"))
    part = build(tiny("bert"))
    with pytest.raises(InputError, match=r"model\.name=gpt, this run bert"):
        transfer.load(part, start(part), str(tmp_path / "old"))
    part = build(tiny("gpt"))
    with pytest.raises(InputError, match="no array that fits"):
        transfer.load(part, start(part), str(tmp_path / "old"), skip=".")


# --------------------------------------------------------------------------------------------- freezing


def test_what_is_frozen_stays_bit_for_bit_and_the_rest_learns_as_ever():
    part = built("gpt", **SGD, **FROZEN, optim__clip_norm=0.0, optim__ema_decay=0.5)
    whole = built("gpt", **SGD, optim__clip_norm=0.0)
    before = jax.device_get(start(part)["params"])
    state, rows = steps(part, start(part), 2)
    frozen = {"embed/table", "positions/table"}
    assert unlike(state["params"], before) == by_path(before).keys() - frozen
    for tree in (state["opt"], state["ema"]):
        assert not any("embed/table" in path or "positions" in path for path in by_path(tree))
    one, both = (by_path(steps(p, start(p), 1)[0]["params"]) for p in (part, whole))
    for path in by_path(before).keys() - frozen:  # the first step's gradients know nothing of freezing
        a, b = one[path], both[path]
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-7, err_msg=path)
    assert rows["loss"][0] != rows["loss"][1]
    averaged = by_path(program.evaluated(state))
    assert averaged.keys() == by_path(state["params"]).keys()
    ema = by_path(state["ema"])
    for path, x in averaged.items():
        np.testing.assert_array_equal(x, ema.get(path, by_path(state["params"])[path]))


def test_a_plan_knows_what_is_frozen():
    whole, part = built("gpt", **SGD), built("gpt", **SGD, optim__freeze="^/(embed|positions|blocks)/")
    assert estimate.trained_parameters(whole) == estimate.parameters(whole.model.plain_spec)
    assert estimate.trained_parameters(part) == 64  # the last norm
    assert estimate.tree_bytes(part.state_spec["opt"]) < 300
    assert flops.model_flops(part) < 0.72 * flops.model_flops(whole)  # forward, and back through the head
    lora = built("gpt", **SGD, lora__rank=1)
    assert flops.forward_flops(whole) * 2 < flops.model_flops(lora) < flops.model_flops(whole)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optim__freeze": "^/nothing/"}, r"optim\.freeze='\^/nothing/' matches no parameter; .*/blocks/"),
        ({"optim__freeze": "."}, "matches every parameter"),
        ({"lora__rank": 2, "lora__on": "^/none"}, r"lora\.on='\^/none' finds no weight .*attention/q/kernel"),
        ({"lora__rank": 2, "lora__train": "^/head/"}, r"lora\.train='\^/head/' matches no parameter"),
    ],
)
def test_patterns_that_find_nothing_are_refused(keys, message):
    with pytest.raises(InputError, match=message):
        build(tiny("gpt", **keys))


# --------------------------------------------------------------------------------------------- adapters


def jitter(state: Any) -> Any:
    """Adapters away from their start, where they do nothing."""
    params = jax.tree.map(lambda x: x, state["params"])
    rng = np.random.default_rng(0)
    params["lora"] = jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype) * 0.1, x.sharding), params["lora"]
    )
    return {**state, "params": params}


def outputs(part: Any, params: Any, rest: Any, batch: Any) -> Any:
    def run(params: Any, rest: Any, batch: Any) -> Any:
        out = part.model.apply(params, rest, batch, key=None, train=False)[0]
        return out["logits"]

    return np.asarray(jax.jit(run)(params, rest, batch))


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("moe", "t5", "resnet")]


@pytest.mark.parametrize("family", ["gpt", *SLOW])
def test_adapters_start_as_nothing_and_merge_into_the_weights(family):
    plain = build(tiny(family, **SGD))
    on = {"resnet": "/head/"}.get(family, r"/attention/|/mlp/")
    part = build(tiny(family, **SGD, lora__rank=4, lora__on=on))
    batch = random_batch(part.config)
    state = start(part)
    base = {key: value for key, value in state["params"].items() if key != "lora"}
    first = outputs(plain, base, state["rest"], batch)
    np.testing.assert_allclose(outputs(part, state["params"], state["rest"], batch), first, rtol=0, atol=1e-6)
    params = jitter(state)["params"]
    adapted = outputs(part, params, state["rest"], batch)
    assert np.abs(adapted - first).max() > 0.01
    merged = outputs(plain, jax.jit(part.model.plain)(params, state["rest"]), state["rest"], batch)
    np.testing.assert_allclose(adapted, merged, rtol=1e-4, atol=2e-5)


def test_only_the_adapters_learn_and_what_is_named():
    part = built("gpt", **SGD, **LORA, lora__train="^/norm/", param_dtype="bfloat16")
    before = jax.device_get(start(part)["params"])
    state, _ = steps(part, start(part), 2)
    changed = unlike(state["params"], before)
    assert changed
    assert changed <= {path for path in by_path(before) if path.startswith(("lora/", "norm/"))}
    assert {path.split("/")[0] for path in changed} == {"lora", "norm"}
    assert {x.dtype for x in jax.tree.leaves(before["lora"])} == {np.dtype("float32")}
    kernels = [path for path in by_path(state["opt"]) if path.endswith("/kernel")]
    assert not kernels


MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}]


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_mesh_computes_what_one_device_computes(axes):
    keys = {**SGD, **LORA, "lora__train": "^/norm/", "optim__freeze": "/mlp/up/kernel/a$", "remat": "full"}
    one, many = built("gpt", **keys), built("gpt", **keys, **mesh_keys(axes))
    (a, a_rows), (b, b_rows) = (steps(p, jitter(start(p)), 5) for p in (one, many))
    np.testing.assert_allclose(a_rows["loss"], b_rows["loss"], rtol=5e-6)
    ours, theirs = by_path(a["params"]), by_path(b["params"])
    for path, x in theirs.items():
        np.testing.assert_allclose(ours[path], x, rtol=0, atol=2e-6, err_msg=path)
    q = theirs["lora/blocks/attention/q/kernel/b"]
    assert q.sharding.spec[-1] == "tensor"


@pytest.mark.slow
def test_adapters_resume_export_and_serve_as_one_model(corpus, tmp_path):
    config = tiny("gpt", data__name=corpus, model__vocab_size=264, steps=4, optim__ema_decay=0.9, **FAST)
    there = save_run(config, tmp_path / "old")
    changes = {"init.from": str(tmp_path / "old"), "lora.rank": 4, "lora.on": "/attention/", "optim.lr": 0.05}
    config = config_lib.override(config, changes)
    straight = train.run(config, tmp_path / "straight")
    train.run(config.replace(steps=2), tmp_path / "cut")  # constant only up to the schedule's end
    config_read, arrays = transfer.read(tmp_path / "straight")
    assert config_read.lora.rank == 4
    assert arrays.keys() == there.keys()
    moved = {path for path, x in arrays.items() if x.tobytes() != there[path].tobytes()}
    assert moved == {f"blocks/attention/{name}/kernel" for name in ("q", "k", "v", "out")}
    params = program.evaluated(straight.state)
    whole = by_path(jax.jit(straight.program.model.plain)(params, {}))
    for path, x in whole.items():
        np.testing.assert_allclose(arrays[path], x, rtol=0, atol=1e-6)
    transfer.export_safetensors(tmp_path / "straight", tmp_path / "out")
    assert "lora" not in (tmp_path / "out" / "config.json").read_text()
    assert transfer.read(tmp_path / "out")[1].keys() == arrays.keys()
    ran = run_script("generate.py", f"--workdir={tmp_path}/straight", "--prompt=mesh", "--length=4")
    assert ran.code == 0, ran
    assert run_script("evaluate.py", f"--workdir={tmp_path}/straight").code == 0


@pytest.mark.slow
def test_adapters_learn_ten_examples():
    part = build(tiny("gpt", batch_size=10, lora__rank=8, lora__on="/attention/|/mlp/", optim__lr=2e-2,
                      optim__schedule="constant", lora__train="^/embed/"))  # fmt: skip
    _, rows = steps(part, start(part), 300, [random_batch(part.config)])
    assert rows["loss"][0] > 3.5
    assert rows["loss"][-1] < 0.05


# ------------------------------------------------------------------------------------------ texts and heads


HEADS = ["gpt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "rnn", "t5"))]
CLASSIFY = {"task__name": "classify", "model__num_classes": 3}


def head_of(family: str, **keys: Any) -> Any:
    return tiny(family, **CLASSIFY | keys)


@pytest.mark.parametrize("family", HEADS)
def test_a_head_reads_the_whole_text_and_no_padding(family):
    batch = {"tokens": np.arange(32, dtype=np.int32).reshape(2, 16)}
    batch["segments"] = (np.arange(16) < [[12], [16]]).astype(np.int32)
    batch["positions"] = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    model = models.define(head_of(family), specs)
    assert model.params_spec["head"]["kernel"].shape == (32, 3)
    assert not model.params_spec.keys() & {"transform", "decoder", "decoder_bias"}

    def run(params: Any, batch: Any) -> Any:
        out = model.apply(params, {}, batch, key=None, train=False)[0]
        return out["logits"]

    run = jax.jit(run)
    params = jax.jit(model.init)(jax.random.key(0))[0]
    logits = run(params, batch)
    assert logits.shape == (2, 3)
    tokens = np.where(batch["segments"] > 0, batch["tokens"], 7).astype(np.int32)
    np.testing.assert_allclose(run(params, {**batch, "tokens": tokens}), logits, rtol=0, atol=1e-6)
    for at in (0, 5, 11):  # the last of the first text
        other = {**batch, "tokens": batch["tokens"].copy()}
        other["tokens"][0, at] = 40
        changed = np.abs(run(params, other) - logits).max(1)
        assert changed[0] > 1e-4
        assert changed[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "bert", "rnn", "t5", "moe"])
def test_a_head_learns_by_heart_and_on_a_mesh_what_it_learns_on_one_device(family):
    part = build(head_of(family, batch_size=10, optim__lr=1e-2, steps=150))
    _, rows = steps(part, start(part), 150, [random_batch(part.config)])
    assert rows["accuracy"][-1] == 1
    assert rows["loss"][-1] < 0.1 * rows["loss"][0]
    one, many = (build(head_of(family, **SGD, **keys)) for keys in ({}, mesh_keys(MESHES[0])))
    (a, a_rows), (b, b_rows) = (steps(p, start(p), 3) for p in (one, many))
    np.testing.assert_allclose(a_rows["loss"], b_rows["loss"], rtol=1e-5)
    for path, x in by_path(b["params"]).items():
        np.testing.assert_allclose(by_path(a["params"])[path], x, rtol=0, atol=2e-6, err_msg=path)


def test_what_stands_for_a_text():
    x = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    segments = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    found = {how: np.asarray(layers.read(x, segments, how)) for how in ("first", "last", "mean")}
    np.testing.assert_array_equal(found["first"], x[:, 0])
    np.testing.assert_array_equal(found["last"], [x[0, 2], x[1, 3]])
    np.testing.assert_allclose(found["mean"], [x[0, :3].mean(0), x[1].mean(0)], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "rank"), [("rnn", 0), *((family, rank) for family in ("gpt", "bert", "t5") for rank in (0, 4))]
)
def test_a_pretrained_model_learns_to_tell_texts_apart(family, rank, corpus, tmp_path):
    """By configs/finetune.py: all arrays but the head are the source's; evaluation and prediction follow."""
    lengths = {"data__name": corpus, "model__vocab_size": 384, "seq_len": 32}
    there = save_run(tiny(family, **lengths), tmp_path / "old")
    rows = [f"a {word} film {i},{kind}" for i in range(60) for word, kind in WORDS]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    keys = {"data.name": f"table:{tmp_path}/t.csv", "steps": 150, "optim.lr": 1e-2, "eval.batches": -1}
    source = f"{ROOT}/configs/finetune.py:from={tmp_path}/old,task=classify,classes=3,rank={rank}"
    config = config_lib.load(source, keys)
    result = train.run(config, tmp_path / "new")
    report = json.loads((tmp_path / "new" / "init.json").read_text())
    assert {path for path in report["new"] if not path.startswith("lora/")} >= {"head/kernel"} - set(
        report["skipped"]
    )
    assert set(report["loaded"]) == there.keys() & by_path(result.state["params"]).keys() - set(
        report["skipped"]
    )
    assert result.metrics["eval/test/accuracy"] > 0.95
    ran = run_script("evaluate.py", f"--workdir={tmp_path}/new")
    assert ran.code == 0, ran
    assert json.loads(ran.out)["accuracy"] == pytest.approx(result.metrics["eval/test/accuracy"])
    (row,), _ = Predictor.load(tmp_path / "new").predict(["a awful film 61"])
    assert row["name"] == "bad"


WORDS = [("awful", "bad"), ("nice", "good"), ("so-so", "fine"), ("great", "good")]


@pytest.mark.slow
def test_embeddings_of_a_text_do_not_depend_on_its_neighbors(corpus, tmp_path):
    config = tiny("bert", data__name=corpus, model__vocab_size=264, seq_len=48, task__next_sentence=False)
    save_run(config, tmp_path / "run")
    built_, state = loading.load(tmp_path / "run")
    tokenizer = data.get_tokenizer(built_.config, tmp_path / "run")
    texts = ["a", "mesh shard token layer", "loss " * 30, "scan"]
    predictor = Predictor(built_, state, tokenizer=tokenizer)
    together = np.array(predictor.embed(texts)[0])
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-5)
    alone = np.concatenate([predictor.embed([text])[0] for text in texts])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_ten_pairs_learned_by_heart_are_answered_without_a_fault(tmp_path):
    rng = np.random.default_rng(0)
    words = ["red", "blue", "one", "two", "cat", "dog", "sun", "sea"]
    lines = [" ".join(rng.choice(words, 3)) + "\t" + " ".join(rng.choice(words, 4)) for _ in range(10)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    config = tiny(
        "t5", data__name=f"pairs:{tmp_path}/pairs.tsv", data__eval_split="train", model__vocab_size=264,
        model__width=64, seq_len=24, steps=600, optim__lr=2e-3,
        **FAST | {"eval__batches": -1, "eval__every_steps": 1000, "checkpoint__every_steps": 1000},
    )  # fmt: skip
    result = train.run(config, tmp_path / "run")
    assert result.metrics["eval/train/accuracy"] > 0.99
    ran = run_script("evaluate.py", f"--workdir={tmp_path}/run")
    assert ran.code == 0, ran
    values = json.loads(ran.out)
    assert values["bleu"] > 99
    assert values["chrf"] > 99


def test_a_config_takes_over_the_sources_shapes(tmp_path):
    config = tiny("gpt", model__mlp="relu", seq_len=32)
    save_run(config, tmp_path / "old")
    tuned = config_lib.load(f"{ROOT}/configs/finetune.py:from={tmp_path}/old")
    assert tuned.model == config.model
    assert (tuned.seq_len, tuned.lora.rank, tuned.init.from_) == (32, 8, str(tmp_path / "old"))
    plain = config_lib.load(f"{ROOT}/configs/finetune.py:rank=0", {"init.skip": "/head/"})
    assert config_lib.to_dict(plain)["init"] == {"from": "", "skip": "/head/"}
    assert config_lib.from_dict(config_lib.to_dict(plain)) == plain
