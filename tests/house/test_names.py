"""How functions are named: a verb and what it acts on. Each count may only fall; lower its number here when it does."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from words import IRREGULAR, PREDICATES, VERBS

ROOT = Path(__file__).parents[2]
MOST = {"participle": 0, "noun": 111, "in several files": 0}


@pytest.mark.features
def test_functions_are_named_by_what_they_do():
    counts, homes = Counter[str](), defaultdict[str, set[Path]](set)
    for file in [file for top in ("mptk", "passes") for file in (ROOT / top).rglob("*.py")]:
        tree = ast.parse(file.read_text())
        counts.update(find_kind(function.name) for function in list_functions(tree, file))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                homes[node.name].add(file)
    counts["in several files"] = sum(len(files) > 1 for files in homes.values())
    assert {name: counts[name] for name in MOST} == MOST


def list_functions(tree: ast.Module, file: Path) -> Iterator[ast.FunctionDef]:
    """The functions with names of their own: no properties, nor rules, whose names are those of ops.

    A name between underscores is Python's or IPython's.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or re.fullmatch(r"__.*|_.*_", node.name):
            continue
        decorators = " ".join(map(ast.unparse, node.decorator_list))
        if "property" not in decorators and not (decorators and "rules" in file.parts):
            yield node


def find_kind(name: str) -> str:
    """What the first word of a name is."""
    first = name.strip("_").split("_")[0].lower()
    if first in PREDICATES:
        return "predicate"
    if first in VERBS:
        return "verb"
    return "participle" if first in IRREGULAR or (first.endswith("ed") and len(first) > 4) else "noun"


def test_the_reading_path_is_short():
    page = (ROOT / "docs/architecture.md").read_text()
    path = re.findall(r"^\d+\. `([\w/.]+)`:", page, re.MULTILINE)
    assert 8 <= len(path) <= 12
    assert sum(len((ROOT / file).read_text().splitlines()) for file in path) <= 2500
