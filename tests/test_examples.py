"""A family that the package does not know goes through every command, by its file's name alone."""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
import pytest
from conftest import MESHES, ROOT, built, mesh_keys, random_batch, run_script, start, steps

from bigmodel import workdir
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
