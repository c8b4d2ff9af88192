"""SECURITY.md: each promise names a test that would notice if it were false."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.features

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {"crash": "crash.json", "soak": "soak.json", "fuzz-files": "fuzz_files.json", "broken": "broken.json"}
"""Command of the Makefile → its last result, which is committed in ``benchmarks/results``."""


def list_tests() -> set[str]:
    """The name of every test."""
    return {
        function.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_")
    }


def read_promises() -> list[tuple[str, str, str]]:
    """The rows of the tables: the promise, where or how it is kept, and its tests."""
    found = []
    for line in (ROOT / "SECURITY.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []
        if len(cells) == 3 and cells[0] != "promise":
            found.append((cells[0], cells[1], cells[2]))
    return found


def test_each_promise_has_a_test_that_exists():
    promises, there = read_promises(), list_tests()
    assert len(promises) >= 30
    for promise, _, tests in promises:
        names = re.findall(r"`([^`]+)`", tests)
        files = [name for name in names if name.startswith("tests/")]
        functions = [name for name in names if name.startswith("test_")]
        assert files or functions, promise
        assert [name for name in files if not (ROOT / name).is_file()] == [], promise
        assert sorted({*functions} - there) == [], promise
        for command in re.findall(r"`make ([\w-]+)`", tests):
            assert json.loads((ROOT / "benchmarks" / "results" / RESULTS[command]).read_text()), promise


def test_each_place_that_keeps_a_promise_exists():
    for promise, place, _ in read_promises():
        named = re.findall(r"`(mptk/[^`]+)`", place)
        assert [name for name in named if not (ROOT / name).exists()] == [], promise
