"""Fingerprints in checkpoints: a resumed run computes the same, or is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import pytest
from conftest import build, saved, start, tiny

from bigmodel import config as config_lib
from bigmodel import train, workdir
from bigmodel.checkpoint import fingerprint
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import InputError
from bigmodel.config.families import GPT
from bigmodel.config.task import TASKS, keys_of
from bigmodel.infer import loading

# Settings that leave every array's shape as it is.
REFUSED = {
    "gpt": [
        {"model.heads": 8, "model.kv_heads": 8, "model.head_dim": 4}, {"model.norm_eps": 1e-3},
        {"model.mlp": "relu"},
        {"model.window": 8}, {"model.rope_theta": 5e5},
        {"compute_dtype": "bfloat16"}, {"seed": 5}, {"optim.b2": 0.5}, {"optim.eps": 1e-3},
        {"task.label_smoothing": 0.1}, {"model.dropout": 0.2}, {"model.norm_order": "post"},
        {"data.tokenizer": "bpe:300"}, {"data.shuffle": False}, {"batch_size": 16},
        {"optim.weight_decay_on": "table$"},
    ],
    "resnet": [{"data.mean": (0.1,)}, {"data.augment": "flip:0.5"}, {"task.loss": "focal"}],
}  # fmt: skip
ALLOWED = [
    {"check.gradient": "always"},
    {"steps": 99}, {"optim.lr": 0.5}, {"optim.schedule": "linear"}, {"optim.weight_decay": 0.3},
    {"optim.groups.head.lr": 0.25}, {"mesh.fsdp": 2}, {"remat": "full"}, {"microbatches": 2},
    {"mesh.rules": "/q/kernel$ -> fsdp"},
    {"eval.batches": 3}, {"log.every_steps": 7}, {"checkpoint.keep": 9}, {"optim.clip_norm": 0.0},
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes"), [(family, each) for family, some in REFUSED.items() for each in some], ids=str
)
def test_settings_that_give_the_arrays_another_meaning_are_refused_by_name(family, changes, tmp_path):
    before = tiny(family)
    was = config_lib.to_dict(before)
    after = config_lib.override(before, changes)
    if after == before:
        pytest.skip("the default")
    with pytest.raises(InputError) as refusal:
        fingerprint.refuse_other_config(was, after, tmp_path)
    assert next(iter(changes)) in str(refusal.value)
    assert fingerprint.refuse_other_config(was, before, tmp_path) == {}


@pytest.mark.parametrize("changes", ALLOWED, ids=str)
def test_settings_of_training_may_change(changes, tmp_path):
    before = tiny("gpt", optim__groups={"head": {"on": "^/embed/", "lr": 0.1}})
    after = config_lib.override(before, changes)
    found = fingerprint.refuse_other_config(config_lib.to_dict(before), after, tmp_path)
    assert list(found) == list(changes)


def test_every_key_of_models_and_tasks_is_refused_unless_the_rule_names_it():
    keys = set(config_lib.flatten(config_lib.to_dict(tiny("gpt"))))
    keys |= {f"task.{key}" for task in TASKS for key in keys_of(task.name)}
    free = {key for key in keys if key.startswith(("model.", "task.")) and fingerprint.may_change(key, 1)}
    assert free == {
        "model.attention_block", "task.top_k", "task.eval_negatives", "task.most_detections",
        "task.least_score", "task.nms_overlap",
    }  # fmt: skip
    assert not fingerprint.may_change("model.a_new_key", 1)
    assert not fingerprint.may_change("task.a_new_key", 1)
    assert not fingerprint.may_change("optim.groups.head.on", 1)
    assert fingerprint.may_change("init.from", "")
    assert not fingerprint.may_change("init.from", "runs/other")


def test_a_key_that_an_older_version_did_not_have_counts_as_its_default():
    config = tiny("gpt")
    was = config_lib.to_dict(config)
    del was["model"]["norm_eps"]
    was["model"]["of_old"] = 3
    assert fingerprint.changes(was, config) == {}
    default = {field.name: field.default for field in dataclasses.fields(GPT)}["norm_eps"]
    other = config_lib.override(config, {"model.norm_eps": 0.25})
    assert fingerprint.changes(was, other) == {"model.norm_eps": (default, 0.25)}


def run(corpus: str, **keys: Any) -> config_lib.Config:
    return tiny("gpt", data__name=corpus, model__vocab_size=264, eval__batches=1, steps=2, mesh__data=1,
                log__tensorboard=False, optim__schedule="constant", **keys)  # fmt: skip


@pytest.fixture(scope="module")
def trained(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("fingerprint") / "run"
    train.run(run(corpus, mesh__fsdp=8), path)
    return path


@pytest.mark.parametrize("written", ["in the checkpoint", "in config.json alone"])
def test_a_resumed_run_with_other_heads_is_refused_and_nothing_is_lost(trained, corpus, tmp_path, written):
    config = run(corpus, mesh__fsdp=8)
    path = trained
    if written == "in config.json alone":  # as older versions wrote it
        path = tmp_path / "old"
        built = build(config)
        path.mkdir()
        workdir.write_config(path, config)
        pipeline = json.loads(json.dumps(Checkpoints(trained / "checkpoints").meta(2)["pipeline"]))
        with Checkpoints(path / "checkpoints", async_save=False) as checkpoints:
            checkpoints.save(2, {**start(built), "step": jax.numpy.int32(2)}, {"pipeline": pipeline})
    (path / ".lock").touch()
    before = sorted(file.name for file in path.rglob("*"))
    other = config_lib.override(
        config, {"model.heads": 2, "model.kv_heads": 2, "model.head_dim": 16, "steps": 3}
    )
    with pytest.raises(InputError, match=r"model\.heads was 4, now 2; .*use a new --workdir$"):
        train.run(other, path)
    assert sorted(file.name for file in path.rglob("*")) == before


def test_a_changed_config_file_is_not_served(trained, tmp_path):
    path = saved(tmp_path / "run", tiny("gpt"))
    config = tiny("gpt")
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(1, start(build(config)), fingerprint.of(config, {}))
    loading.load(path)
    workdir.write_config(path, config_lib.override(config, {"model.norm_eps": 1e-2}))
    with pytest.raises(InputError, match=r"config\.json was trained .*model\.norm_eps was 1e-05, now 0\.01"):
        loading.load(path)
    loading.load(path, 0)  # one of an older version holds no config
    workdir.write_config(path, config_lib.override(config, {"data.name": "text:elsewhere/*.txt", "seed": 3}))
    loading.load(path)  # where training data lay changes nothing that it computes


def test_facts_that_no_saved_step_relies_on_are_fitted_anew(tmp_path):
    rows = "".join(f"{i % 17},{('a', 'b')[i % 2]}\n" for i in range(90))
    (tmp_path / "t.csv").write_text("x,label\n" + rows)
    config = tiny("mlp", data__name=f"table:{tmp_path}/t.csv", model__num_classes=3, mesh__fsdp=8)
    from bigmodel.tasks import make_pipeline

    make_pipeline(config, "train", tmp_path)
    (tmp_path / "t.csv").write_text("x,label\n" + rows + "3,c\n" * 9)
    with pytest.raises(InputError, match="'c' is new"):
        make_pipeline(config, "train", tmp_path)
    from bigmodel.checkpoint import start as start_lib

    start_lib.agree(config, tmp_path, "auto")
    make_pipeline(config, "train", tmp_path)
