"""scripts/train.py on bad input: one line with the key and the fix, exit code 2, at once, nothing left."""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys
import time

import pytest
from conftest import run_script, script_env

from bigmodel import workdir

GPT = "--config=configs/gpt.py"
TEXT = "--config.data.name=text:scripts/*.py"  # data that is there
CASES = {  # name: (arguments, what the line must name)
    "unknown key": ([GPT, "--config.optim.leanring_rate=1"], ["optim.leanring_rate", "unknown"]),
    "nearest key": ([GPT, "--config.optm.lr=1"], ["'optm'", "did you mean 'optim'?"]),
    "unknown flag": ([GPT, "--stpes=3"], ["--stpes", "--help"]),
    "no config": ([], ["--config", "--help"]),
    "wrong type": ([GPT, "--config.steps=1e5"], ["steps='1e5'", "whole number such as 1000"]),
    "NaN": ([GPT, "--config.optim.lr=nan"], ["optim.lr", "finite number", "3e-4"]),
    "negative": ([GPT, "--config.steps=-1"], ["steps is -1", "1 or more"]),
    "no config file": (["--config=configs/gtp.py"], ["configs/gtp.py", "configs/gpt.py"]),
    "heads": ([GPT, "--config.model.heads=3"], ["model.heads is 3", "model.width=128"]),
    "batch": ([GPT, TEXT, "--config.batch_size=12"], ["batch_size=12", "mesh.data", "16"]),
    "mesh product": ([GPT, TEXT, "--config.mesh.data=3"], ["mesh.data=3", "8 are here", "-1"]),
    "mesh heads": ([GPT, TEXT, "--config.mesh.tensor=8"], ["model.heads is 4", "mesh.tensor=8"]),
    "no such dataset": (
        ["--config=configs/cnn.py:data=mnits"],
        ["data.name='mnits'", "did you mean 'mnist'?"],
    ),
    "not prepared": (
        ["--config=configs/cnn.py:data=mnist"],
        ["data.name='mnist'", "scripts/prepare_data.py"],
    ),
    "no data_dir": (
        ["--config=configs/cnn.py:data=mnist", "--config.data.data_dir=/nowhere"],
        ["data.data_dir='/nowhere'", "does not exist", "scripts/prepare_data.py"],
    ),
    "no text": ([GPT, "--config.data.name=text:/nowhere/*.txt"], ["text:/nowhere/*.txt", "matches no file"]),
    "small vocabulary": ([GPT, TEXT, "--config.model.vocab_size=100"], ["model.vocab_size is 100", "257"]),
    "nothing to resume": ([GPT, TEXT, "--resume=must"], ["--resume=must", "no checkpoint", "--resume=auto"]),
}


@functools.cache
def limit_s() -> float:
    """Three times what the imports alone take, on this machine and under its load; idle, 2 s of 6."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import bigmodel.train"], env=script_env(), check=True)
    return 3 * (time.perf_counter() - began)


def contents(path: pathlib.Path) -> dict[str, bytes]:
    files = (p for p in path.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def assert_one_line(args: list[str], words: list[str], path: pathlib.Path) -> None:
    before = contents(path)
    ran = run_script("train.py", *args, f"--workdir={path}")
    print(f"{ran.seconds:.2f} s: {ran.err.strip()}")
    assert ran.code == 2, ran
    said = {line.split()[0] for line in ran.out.splitlines()}
    assert said <= {"start", "sizes", "data"}  # and nothing was trained
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    for word in words:
        assert word in line
    assert ran.seconds < limit_s()
    assert contents(path) == before


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, tmp_path):
    (tmp_path / "notes.txt").write_text("of the user")
    assert_one_line(*CASES[name], tmp_path)


def test_a_bad_config_makes_no_directory(tmp_path):
    assert_one_line([GPT, "--config.steps=x"], ["steps"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_runs_in_one_workdir(tmp_path):
    with workdir.claim(tmp_path):
        assert_one_line([GPT, TEXT], [f"--workdir={tmp_path} is in use by process", "wait for it"], tmp_path)


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    ran = run_script("train.py", GPT, TEXT, f"--workdir={tmp_path}/run")
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 1
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("script", ["evaluate.py", "export.py"])
def test_scripts_that_read_a_workdir_refuse_keys_of_the_config(script, tmp_path):
    out = [f"--out={tmp_path}/out"] if script == "export.py" else []
    ran = run_script(script, f"--workdir={tmp_path}/run", *out, "--config.model.depth=2")
    assert ran.code == 2, ran
    assert "--config.model.depth=2: the config comes from the workdir" in ran.err
