"""Reads the code: a file imports only from lines above its own, and keeps to the house's sizes and names."""

from __future__ import annotations

import ast
import pathlib

import pytest
from conftest import ROOT

# A file may import from files above it, wherever in the file the import stands. `|` joins equals that do
# not import each other. A package's __init__ collects its own files and stands below them.
ORDER = """
    __init__
    typed | saved_model | memory | ending
    disk | ranges
    families/checks | smaller
    families/transformers | families/images | families/recurrent | families/recommenders
    families/__init__
    tuning
    config
    workdir | hardware
    fitted
    energy
    mesh
    data/builders/__init__ | data/builders/python_source | data/builders/digits | data/builders/shapes
    data/builders/lowrank_ratings | data/builders/clicks | data/builders/python_packages
    data/builders/prepare | data/files
    data/cells
    data/delimited
    data/sources | data/randaugment | data/tokenizing
    data/tokenizer_files | data/chat | data/generation | data/token_cache
    data/backends
    data/pretrained
    data/transforms
    data/text | data/objectives | data/balance | data/labels
    data/facts
    data/images | data/tables | data/ratings
    data/objects
    data/batches
    data/pipeline
    data/__init__
    models/products
    models/ops
    models/weights
    models/module
    models/layers | models/attention | models/cache | models/held | models/embedding
    models/lora | models/distilled
    models/moe | models/recommender | models/vision | models/resnet | models/gan | models/recurrent
    models/transformer | models/inception | models/detector
    models/gpt | models/bert | models/t5 | models/vit
    models/__init__
    metrics | detection
    ranking
    tasks
    optim | sparsity
    program
    selfcheck
    digests
    manifest
    checkpoint
    parameters | fingerprint
    distill
    huggingface/files | huggingface/layouts | huggingface/known | huggingface/names | huggingface/processors
    huggingface/configs | huggingface/companions
    huggingface/__init__
    transfer
    plan/__init__
    plan/flops
    plan/hlo
    plan/schedule | plan/calibrate | plan/target
    plan/costs | plan/cpu_costs | plan/compiled
    plan/thunks
    plan/estimate
    plan/receipt | plan/candidates
    plan/planner | plan/timeline | plan/fits
    plan/search
    ledger
    log
    sampling | stops | image_files
    decoder | pictures
    infer
    engine | predict | openai_api | scoring | speculative | beam | export | plan/serve
    worker | connections | logprobs
    service
    access | answers
    serve
    evaluate | start
    train
    compress/__init__ | compress/recipe | compress/trained | compress/units
    compress/observe
    compress/solve | compress/structure | compress/report
    compress/quantize | compress/prune | compress/distill
    compress/stages
"""
# Imported by name when asked for (`importlib`), which is why they stand above: data/builders/__init__.
LEVEL = {
    name.strip(): level for level, line in enumerate(ORDER.strip().splitlines()) for name in line.split("|")
}
PACKAGE = ROOT / "bigmodel"
FILES = {str(p.relative_to(PACKAGE).with_suffix("")): p for p in sorted(PACKAGE.rglob("*.py"))}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 70
VAGUE = {"utils", "util", "common", "helpers", "helper", "manager", "factory", "misc"}


def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def as_file(dotted: str) -> str | None:
    """`bigmodel.data.corpus` -> data/text; a name inside a file -> that file; other packages -> None."""
    parts = dotted.split(".")
    if parts[0] != "bigmodel":
        return None
    while parts:
        inner = "/".join(parts[1:])
        for name in (inner, f"{inner}/__init__" if inner else "__init__"):
            if name in FILES:
                return name
        parts = parts[:-1]
    return None


def imports(path: pathlib.Path) -> set[str]:
    """Every dotted name that a file imports, lazily too; relative imports are not used here."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_file_has_its_place():
    assert FILES.keys() == LEVEL.keys(), "put the file into ORDER, where its imports allow"


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_above(name):
    targets = {as_file(dotted) for dotted in imports(FILES[name])} - {None, name}
    below = {target for target in targets if LEVEL.get(target, 999) >= LEVEL[name]}
    assert not below, f"bigmodel/{name}.py may not import {sorted(below)}"


def test_the_reader_of_imports_sees_lazy_ones():
    assert as_file("bigmodel.data.tokenizers.Bytes") == "data/tokenizing"
    assert as_file("bigmodel.data.make_pipeline") == "data/__init__"
    assert as_file("jax.numpy") is None
    assert "tokenizers.Tokenizer" in imports(FILES["data/tokenizing"])  # inside a function


def test_flax_stays_under_models():
    users = {name for name in FILES if any(i.split(".")[0] == "flax" for i in imports(FILES[name]))}
    assert users
    assert all(name.startswith("models/") for name in users), users


def test_flags_are_parsed_by_scripts_only():
    for name, path in FILES.items():
        modules = imports(path)
        assert not any(m.startswith(("absl.flags", "absl.app", "argparse", "click")) for m in modules), name
        assert "sys.argv" not in path.read_text(), name


def test_scripts_and_configs_do_not_import_each_other():
    """Some files of scripts/ are no commands: these may be imported."""
    paths = (ROOT / "scripts").glob("*.py")
    scripts = {p.stem for p in paths if 'if __name__ == "__main__"' in p.read_text()}
    assert len(scripts) > 10
    for path in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "configs").glob("*.py")]:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & (scripts | {"scripts", "configs"}), path


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name):
    text = FILES[name].read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree(FILES[name])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("name", FILES)
def test_files_say_what_they_are_for(name):
    assert not VAGUE & set(name.split("/"))
    assert FILES[name].stat().st_size == 0 or ast.get_docstring(tree(FILES[name]))


def test_public_things_have_docstrings():
    silent = []
    for name, path in FILES.items():
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                # A name and a signature of two lines can say it all: only longer ones must be told.
                assert node.end_lineno is not None
                if ast.get_docstring(node) is None and node.end_lineno - node.lineno > 12:
                    silent.append(f"{name}.{node.name}")
    assert not [item for item in silent if not item.endswith(tuple(DATACLASSES))], silent


DATACLASSES = ["Optim", "Task"]  # lists of commented fields
