"""Reads the code: a file imports only from lines above its own, and keeps to the house's sizes and names."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest
from conftest import ROOT

PACKAGE = ROOT / "bigmodel"
FILES = {str(p.relative_to(PACKAGE).with_suffix("")): p for p in sorted(PACKAGE.rglob("*.py"))}
# The README's tree is the one list of the import order: a file may import from files before it, wherever in
# the file the import stands. A package's __init__ that the tree does not list stands after its folder.


def readme_order() -> list[str]:
    """Files as `data/tfds`, in the order in which the README's tree lists them."""
    block = re.search(r"\n    bigmodel/\n((?: {6}.*\n)+)", (ROOT / "README.md").read_text())
    assert block is not None
    folders: list[tuple[int, str]] = []
    found = ["__init__"]

    def close(indent: int) -> None:
        while folders and folders[-1][0] >= indent:
            inside = "".join(name for _, name in folders)
            folders.pop()
            if f"{inside}__init__" in FILES and f"{inside}__init__" not in found:
                found.append(f"{inside}__init__")

    for line in block[1].splitlines():
        indent = len(line) - len(line.lstrip())
        close(indent)
        for word in re.findall(r"[\w/]+\.py\b|^\w+/", line.strip()):
            if word.endswith("/"):
                folders.append((indent, word))
            else:
                found.append("".join(name for _, name in folders) + word.removesuffix(".py"))
    close(0)
    return found


MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 420, 60, 6
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


LEVEL = {name: level for level, name in enumerate(readme_order())}


def test_every_file_has_its_place():
    assert len(LEVEL) == len(readme_order())
    assert FILES.keys() == LEVEL.keys(), "put the file into the README's tree, where its imports allow"


def test_the_root_holds_at_most_16_modules():
    assert sum("/" not in name for name in FILES) - 1 <= 16  # beside __init__


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_above(name):
    targets = {as_file(dotted) for dotted in imports(FILES[name])} - {None, name}
    below = {target for target in targets if LEVEL.get(target, 999) >= LEVEL[name]}
    assert not below, f"bigmodel/{name}.py may not import {sorted(below)}"


def test_the_reader_of_imports_sees_lazy_ones():
    assert as_file("bigmodel.data.tokenizers.Bytes") == "data/tokenizers"
    assert as_file("bigmodel.tasks.make_pipeline") == "tasks/__init__"
    assert as_file("jax.numpy") is None
    assert "tokenizers.Tokenizer" in imports(FILES["data/tokenizers"])  # inside a function


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


def functions(name: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree(FILES[name])) if isinstance(node, kinds)]


def positional(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Counts the parameters that a call may give by position; `self` and `cls` do not count."""
    names = [a.arg for a in [*node.args.posonlyargs, *node.args.args]]
    return len(names) - (names[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name):
    assert len(FILES[name].read_text().splitlines()) <= MAX_FILE_LINES
    for node in functions(name):
        assert (node.end_lineno or 0) - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name
        assert positional(node) <= MAX_PARAMETERS, node.name


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
