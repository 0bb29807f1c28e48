"""Every command of the README and of the pages beside it runs, at tiny size, in the order of the text."""

from __future__ import annotations

import ast
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, run_script, script_env

from bigmodel import config as config_lib

README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/GUIDE.md", "BENCHMARKS.md")}


def commands(text: str) -> list[str]:
    """The indented lines that run a script; a backslash goes on to the next line."""
    lines = re.findall(r"^    (.*)$", re.sub(r" *\\\n\s+", " ", text), re.MULTILINE)
    scripts = ("python scripts/", "bash scripts/")
    return [line.split("  #")[0].strip() for line in lines if line.startswith(scripts)]


COMMANDS = commands(README)
BENCHMARKS = [c for c in commands(PAGES["BENCHMARKS.md"]) if "/bench" in c]
TINY = [
    "--config.model.depth=1", "--config.model.width=32", "--config.model.heads=2",
    "--config.model.vocab_size=264", "--config.batch_size=8", "--config.seq_len=32",
    "--config.steps=3", "--config.eval.batches=2", "--config.compute_dtype=float32",
]  # fmt: skip
SMALL = {
    "v5e:16x16": "v5e:2x4", "--search=2": "--search=1",
    "microbatches=2": "microbatches=1", "v5p:8x16x16": "v5p:2x2x2", "fsdp=512": "fsdp=4",
    "tensor=4": "tensor=2", "--cap=2h": "--dry_run",
}  # fmt: skip


def test_the_readme_has_its_commands():
    scripts = {command.split()[1] for command in COMMANDS}
    names = ("quickstart.sh", "test.sh", "plan.py", "train.py", "evaluate.py", "generate.py", "compress.py")
    assert scripts >= {f"scripts/{name}" for name in names}
    benchmarks = ("bench", "bench_serve", "bench_sweep")
    assert {c.split()[1] for c in BENCHMARKS} == {f"scripts/bench/{x}.py" for x in benchmarks}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "SECURITY.md"])
def test_every_path_named_exists(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"(?:scripts|configs|notebooks|tests|bigmodel|examples|docs)/[\w./]+\w", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    for link in re.findall(r"\]\(([^):#]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link


def tiny(command: str, folder: pathlib.Path) -> tuple[str, list[str]]:
    """The script of a command, and its arguments at tiny size."""
    words = shlex.split(command)
    args = [
        word.replace("runs/", f"{folder}/").replace("=plan.json", f"={folder}/plan.json")
        for word in words[2:]
    ]
    args = [word.replace("--name=mnist", "--name=digits").replace("=DIR", f"={folder}/data") for word in args]
    if any(word.startswith("--config=") for word in args):
        args += [a for a in TINY if "gpt" in command or not re.search("model|seq_len", a)]
        args = [a for a in args if "data_dir" not in a and a != "--config.data.name=mnist"]
        args = [a.replace("cnn.py:data=mnist", "cnn.py") for a in args]
    for large, small in SMALL.items():
        args = [word.replace(large, small) for word in args]
    if "--dry_run" in args:  # tests/test_sweep.py runs studies; for these chips nothing is measured first
        args.append("--target=v5e:2x4")
    return words[1].removeprefix("scripts/"), args


def commands_of_configs() -> list[str]:
    """The commands in the docstrings of configs/ that name a config, but for those that need another run."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        text = re.sub(r"\\\n\s+", "", ast.get_docstring(ast.parse(path.read_text())) or "")
        found += re.findall(r"^ *(python scripts/.*--config=(?!.*from=).*)$", text, re.MULTILINE)
    return found


@pytest.mark.parametrize("command", commands_of_configs())
def test_commands_of_config_docstrings_load(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    (config,) = (word.removeprefix("--config=") for word in words if word.startswith("--config="))
    prefix = "--config."
    config_lib.load(config, [word.removeprefix(prefix) for word in words if word.startswith(prefix)])


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_python_commands_run(tmp_path, all_of_them):
    """The first command of each script, in the README's order; or every one."""
    done: set[str] = set()
    for command in COMMANDS:
        script, args = tiny(command, tmp_path)
        endless = script == "serve.py"  # tests/test_serve.py runs it
        if command.startswith("python") and not endless and (all_of_them or script not in done):
            ran = run_script(script, *args, limit_s=200)
            assert ran.code == 0, (command, args, ran)
            done.add(script)


@pytest.mark.slow
def test_benchmarks_run(tmp_path):
    made = [f"--config=configs/gpt.py:size=toy,seq_len=64 --workdir={tmp_path}/small".split(), TINY]
    assert run_script("train.py", *made[0], *made[1][3:], limit_s=200).code == 0
    few = {
        "bench/bench.py": ["--rivals=ours", "--rounds=1", "--steps=1"],
        "bench/bench_serve.py": [
            "--requests=4",
            "--alone=2",
            "--clients=2",
            "--tokens=4",
            "--slots=2",
            "--rounds=1",
        ],
        "bench/bench_sweep.py": ["--seeds=1", "--trials=3"],
    }
    for command in BENCHMARKS:
        script, args = tiny(command, tmp_path)
        args = [a.replace("=bench.json", f"={tmp_path}/bench.json") for a in args]
        if script == "bench/bench.py" and not any(a.startswith("--cases") for a in args):
            args.append("--cases=gpt-small")
        ran = run_script(script, *args, *few[script], limit_s=500)
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
