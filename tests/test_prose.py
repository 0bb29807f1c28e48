"""Plain English: how docstrings begin, and words that say nothing as names."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT
from test_layout import FILES, tree

# "Returns ...", "Splits ...", "Training FLOPs per token.": what a thing does or is, not a clause about it.
BEGINNINGS = {"Of", "As", "What", "Whether", "How", "That"}
RETIRED = {"held", "told", "whole", "more", "beside", "shown", "asked", "way", "kept", "seen"}
BRITISH = re.compile(
    r"\b\w*(?:[^aeiou]alis(?:e|ing|ation)|colour|centre|neighbour|labelled|behaviour|favour|initialis|learnt)\w*"
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize(
    "path", [*(FILES[name] for name in FILES), *TESTS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_docstrings_begin_with_what_a_thing_does_or_is(path):
    kinds = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]
    found = [text.splitlines()[0] for node in nodes if (text := ast.get_docstring(node))]
    assert not [line for line in found if line.split()[0].rstrip(",:") in BEGINNINGS]


@pytest.mark.parametrize("name", FILES)
def test_names_say_something(name):
    names = set()
    for node in ast.walk(tree(FILES[name])):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    assert not RETIRED & {name.strip("_") for name in names}


def test_words_are_spelled_in_american_english():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    for folder in ("bigmodel", "configs", "examples", "scripts"):
        pages += (ROOT / folder).rglob("*.py")
    found = {str(page.relative_to(ROOT)): BRITISH.findall(page.read_text()) for page in pages}
    assert not {page: words for page, words in found.items() if words}
