"""docs/settings.md has every setting and environment variable of the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "settings.md").read_text()
PAGES = [PAGE, (ROOT / "docs" / "deploy.md").read_text()]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.features
def test_tables_are_those_of_the_code(tables: ModuleType) -> None:
    assert [tables.written(page) for page in PAGES] == PAGES, f"run {sys.executable} docs/tables.py"
    assert {name for page in PAGES for name in re.findall(r"^<!-- (\w+) -->$", page, re.MULTILINE)} == {
        *tables.TABLES,
        "end",
    }


def test_environment_variables_that_the_code_names_are_there() -> None:
    files = [path.read_text() for folder in ("mptk", "passes") for path in (ROOT / folder).rglob("*.py")]
    readers = [source for source in files if re.search(r"os\.environ|from_env", source)]
    named = {name for source in readers for name in re.findall(r"\"([A-Z]+(?:_[A-Z]+)+|COLUMNS|RANK)\"", source)}
    assert {"MPTK_CACHE", "RANK", "TQDM_DISABLE"} <= named
    assert {name for name in named if f"`{name}" not in PAGE} == set()
