"""Every command of the README runs, at tiny size, in the order in which it is written."""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, run_script, script_env

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for line in re.findall(r"^    (.*)$", README, re.MULTILINE)
    if line.startswith(("python scripts/", "bash scripts/"))
]
TINY = [
    "--config.model.depth=1", "--config.model.width=32", "--config.model.heads=2",
    "--config.model.vocab_size=264", "--config.batch_size=8", "--config.seq_len=32",
    "--config.steps=3", "--config.eval.batches=2", "--config.compute_dtype=float32",
]  # fmt: skip
SMALL = {
    "v5e:16x16": "v5e:2x4", "--search=2": "--search=1",
    "v5p:8x16x16": "v5p:2x2x2", "fsdp=512": "fsdp=4", "tensor=4": "tensor=2",
}  # fmt: skip


def test_the_readme_has_its_commands():
    scripts = {command.split()[1] for command in COMMANDS}
    names = ("quickstart.sh", "test.sh", "plan.py", "train.py", "evaluate.py", "generate.py", "bench.py")
    assert scripts >= {f"scripts/{name}" for name in names}


def test_every_path_named_in_the_readme_exists():
    for path in re.findall(r"(?:scripts|configs|notebooks|tests|bigmodel)/[\w./]+\w", README):
        assert (ROOT / path).exists(), path


def test_python_commands_run(tmp_path):
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] != "python":
            continue
        args = [word.replace("runs/", f"{tmp_path}/") for word in words[2:]]
        args = [
            word.replace("--name=mnist", "--name=digits").replace("=DIR", f"={tmp_path}/data")
            for word in args
        ]
        script = pathlib.Path(words[1]).name
        if any(word.startswith("--config=") for word in args):
            args += [a for a in TINY if "gpt" in command or not re.search("model|seq_len", a)]
            args = [a for a in args if "data_dir" not in a and a != "--config.data.name=mnist"]
            args = [a.replace("cnn.py:data=mnist", "cnn.py") for a in args]
        if script == "bench.py":
            args = [
                "--cases=gpt-small",
                "--rivals=ours,bare",
                "--rounds=1",
                "--steps=1",
                f"--json={tmp_path}/b",
            ]
        args = [word.replace("=plan.json", f"={tmp_path}/plan.json") for word in args]
        for large, small in SMALL.items():
            args = [word.replace(large, small) for word in args]
        ran = run_script(script, *args, limit_s=200)
        assert ran.code == 0, (command, args, ran)


@pytest.mark.skipif(
    not sys.prefix.startswith(str(ROOT / ".venv")), reason="needs the .venv of scripts/test.sh"
)
def test_quickstart_runs_and_then_says_it_is_done(tmp_path):
    workdir = tmp_path / "quickstart"
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), str(workdir), *TINY]
    for said in ("step 3/3", "done: "):
        ran = subprocess.run(
            command, env=script_env(), capture_output=True, text=True, timeout=200, check=False
        )
        assert ran.returncode == 0, ran
        assert said in ran.stdout
        assert "a sample" in ran.stdout
    for name in (
        "config.json",
        "plan.json",
        "ledger.json",
        "metrics.jsonl",
        "loss.png",
        "tb",
        "checkpoints/3",
    ):
        assert (workdir / name).exists(), name
