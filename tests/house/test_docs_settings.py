"""docs/settings.md has every setting and environment variable of the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from mptk.config import Settings, list_names

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "settings.md").read_text()
PAGES = [PAGE, (ROOT / "docs" / "deploy.md").read_text()]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.features
def test_tables_are_those_of_the_code(tables):
    assert [tables.written(page) for page in PAGES] == PAGES, f"run {sys.executable} docs/tables.py"
    assert {name for page in PAGES for name in re.findall(r"^<!-- (\w+) -->$", page, re.MULTILINE)} == {
        *tables.TABLES,
        "end",
    }


@pytest.mark.features
def test_keywords_of_functions_are_the_settings_of_the_code(tables):
    written = {name: (ROOT / name).read_text() for name in tables.KEYWORDS}
    assert {name: tables.declare_keywords(each) for name, each in tables.KEYWORDS.items()} == written
    for each in (each for functions in tables.KEYWORDS.values() for each in functions if not each.common):
        hints = get_type_hints(each.function)  # as an editor and a type checker see it
        (typed,) = get_args(hints["keywords"])
        assert typed.__name__ == each.name
        assert {"device", "length", "trust_remote_code"} <= {*typed.__annotations__} <= {*list_names(Settings)}


def test_environment_variables_that_the_code_names_are_there():
    files = [path.read_text() for folder in ("mptk", "passes") for path in (ROOT / folder).rglob("*.py")]
    readers = [source for source in files if re.search(r"os\.environ|from_env", source)]
    named = {name for source in readers for name in re.findall(r"\"([A-Z]+(?:_[A-Z]+)+|COLUMNS|RANK)\"", source)}
    assert {"MPTK_CACHE", "RANK", "TQDM_DISABLE"} <= named
    assert {name for name in named if f"`{name}" not in PAGE} == set()
