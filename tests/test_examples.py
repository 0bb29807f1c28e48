"""A family that the package does not know goes through every command, by its file's name alone."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest
from conftest import MESHES, ROOT, built, mesh_keys, random_batch, run_script, start, steps

from bigmodel import config as config_lib
from bigmodel import tasks, workdir
from bigmodel.config import InputError
from bigmodel.plan import target

SMALL = ["depth=1", "width=16", "token_width=8", "channel_width=16"]
QUICK = [
    "batch_size=16",
    "check.gradient=never",
    "eval.batches=1",
    "log.tensorboard=false",
    "optim.warmup_steps=1",
]


def test_examples_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path


@pytest.mark.parametrize("axes", [MESHES[3], {"tensor": 8}], ids=str)
def test_the_mixer_on_a_mesh_computes_what_one_device_computes(axes):
    keys = {"optim__name": "sgd", "optim__schedule": "constant", "optim__lr": 0.1}
    one, many = built("own_model", **keys), built("own_model", **keys, **mesh_keys(axes))
    batches = [random_batch(one.config, seed) for seed in range(3)]
    (a, losses), (b, others) = (steps(part, start(part), 3, batches) for part in (one, many))
    np.testing.assert_allclose(losses["loss"], others["loss"], rtol=1e-5)
    np.testing.assert_allclose(a["params"]["embed"]["kernel"], b["params"]["embed"]["kernel"], atol=1e-5)


def run(script: str, *args: str) -> str:
    ran = run_script(script, *args, limit_s=200)
    assert ran.code == 0, ran
    return ran.out + ran.err


def flags(file: pathlib.Path, *more: str) -> list[str]:
    keys = [f"model.{key}" for key in SMALL] + QUICK + list(more)
    return [f"--config=configs/own_model.py:model={file}:Mixer", *(f"--config.{key}" for key in keys)]


@pytest.mark.slow
def test_the_mixer_is_trained_resumed_evaluated_and_quantized_by_the_scripts(tmp_path):
    file, there, small = tmp_path / "net.py", tmp_path / "run", tmp_path / "small"
    shutil.copy(ROOT / "examples" / "mixer.py", file)
    run("train.py", *flags(file, "steps=2", "mesh.fsdp=2", "mesh.tensor=2"), f"--workdir={there}")
    assert workdir.read_config(there).model.name == f"{file}:Mixer"
    file.write_text(file.read_text() + "# another line\n")
    said = run("train.py", *flags(file, "steps=4", "mesh.fsdp=8"), f"--workdir={there}")
    assert "resuming from step 2" in said
    assert f"the file of {file}:Mixer has changed since the checkpoint" in said
    assert "has changed" not in run("evaluate.py", f"--workdir={there}")
    said = run("compress.py", f"--workdir={there}", "--recipe=quantize:int8", f"--out={small}")
    assert "quantize:int8" in said
    assert "int8" in str(workdir.read_config(small).quantize)
    file.unlink()
    ran = run_script("evaluate.py", f"--workdir={there}")
    assert ran.code == 2
    assert f"model.name='{file}:Mixer': '{file}' does not exist" in ran.err
    assert len(ran.err.splitlines()) == 1


@pytest.mark.skipif(not target.installed("libtpu"), reason="needs libtpu: pip install -e '.[plan]'")
def test_the_mixer_is_planned_for_chips_that_are_not_here():
    said = run("plan.py", *flags(ROOT / "examples" / "mixer.py", "mesh.tensor=2"), "--target=v5e:2x4")
    assert "8 x v5e (data 4 x tensor 2)" in said
    assert "libtpu's own schedule" in said


TRIPLET = [
    f"--config.task.name={ROOT}/examples/triplet.py:Triplet", "--config.model.num_classes=16",
    "--config.model.width=32", "--config.model.channels=8,8", "--config.batch_size=32",
    "--config.eval.batches=2", "--config.log.tensorboard=false",
]  # fmt: skip


def test_the_triplet_loss_is_that_of_a_loop_over_anchors():
    name = f"{ROOT}/examples/triplet.py:Triplet"
    config = config_lib.from_dict({"model": {"name": "cnn", "num_classes": 5}, "task": {"name": name}})
    rng = np.random.default_rng(0)
    z, label = rng.normal(size=(12, 5)).astype(np.float32), rng.integers(0, 3, 12)
    mask = np.ones(12, np.float32)
    mask[3] = 0
    terms = tasks.make(config).terms({"logits": z}, {"label": label, "mask": mask}, True)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    real = [i for i in range(12) if mask[i]]
    expected, nearest = 0.0, 0
    for i in real:
        far = {j: ((z[i] - z[j]) ** 2).sum() for j in real if j != i}
        positive = max(far[j] for j in far if label[j] == label[i])
        negative = min(far[j] for j in far if label[j] != label[i])
        expected += max(positive - negative + config_lib.to_dict(config)["task"]["margin"], 0)
        nearest += label[min(far, key=far.__getitem__)] == label[i]
    assert float(terms["loss"][0]) == pytest.approx(expected, rel=1e-5)
    assert float(terms["nearest"][0]) == nearest


@pytest.mark.slow
def test_the_triplet_loss_goes_through_the_ordinary_commands(tmp_path):
    there, small, cnn = tmp_path / "run", tmp_path / "small", "--config=configs/cnn.py"
    axes = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    run("train.py", cnn, *TRIPLET, *axes, "--config.steps=10", f"--workdir={there}")
    said = run("train.py", cnn, *TRIPLET, "--config.mesh.fsdp=8", "--config.steps=40", f"--workdir={there}")
    assert "resuming from step 10" in said
    found = json.loads(run("evaluate.py", f"--workdir={there}").partition("{")[2].join(["{", ""]))
    assert found["nearest"] > 0.3  # a tenth by chance
    said = run("compress.py", f"--workdir={there}", "--recipe=quantize:int8", f"--out={small}")
    assert "quantize:int8" in said


@pytest.mark.skipif(not target.installed("libtpu"), reason="needs libtpu: pip install -e '.[plan]'")
def test_the_triplet_loss_is_planned_for_chips_that_are_not_here():
    said = run("plan.py", "--config=configs/cnn.py", *TRIPLET, "--config.mesh.tensor=2", "--target=v5e:2x4")
    assert "8 x v5e (data 4 x tensor 2)" in said


def test_a_task_without_code_is_named(tmp_path):
    file = tmp_path / "task.py"
    lines = [
        "from dataclasses import dataclass",
        "from bigmodel.config import Labels",
        "@dataclass(frozen=True)",
    ]
    file.write_text("\n".join([*lines, "class Bare(Labels):", "    like = 'classify'"]))
    tree = {"model": {"name": "cnn"}, "task": {"name": f"{file}:Bare"}}
    with pytest.raises(
        InputError, match=r"task\.name=.*task\.py:Bare: Bare has no method `task`; let it return"
    ):
        tasks.make(config_lib.from_dict(tree))
