"""What the pages name is there: files, modules, commands of mptk, targets of make, links, and the errors that they quote."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

import mptk
from mptk.cli.main import app

pytestmark = pytest.mark.features

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/**/*.md")]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def found(page: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, (ROOT / page).read_text(), re.MULTILINE))


def test_the_site_lists_every_page():
    tree = ast.parse((ROOT / "docs/conf.py").read_text())  # to run it would need sphinx
    (contents,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONTENTS"
    )
    listed = {f"{page}.md" for part in contents.values() for page in part.split()}
    assert listed == set(NAMES) - {"README.md"}


@pytest.mark.parametrize("page", NAMES)
def test_files_links_and_modules_are_there(page):
    files = found(page, r"(?<![\w./-])((?:mptk|passes|tests|benchmarks|docs|examples)/[\w./*-]*\w)")
    files = {name for name in files if not re.search(r"/[A-Z]+$", name)}  # placeholders
    assert [name for name in files if not any(ROOT.glob(name)) and not any(ROOT.glob(f"{name}.py"))] == []
    links = found(page, r"\]\(([^)#:]+?)(?:#[^)]*)?\)")
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
    named = found(page, r"(?<![\w./])((?:mptk|passes|benchmarks)(?:\.[a-z_]+)+)(?![\w(])")
    modules = [name for name in named if not _public(name) and not name.endswith((".json", ".onnx"))]
    assert [name for name in modules if not _there(name)] == []


@pytest.mark.parametrize("page", NAMES)
def test_imports_of_examples_work(page):
    for code in found(page, r"```python\n([^`]+)```"):
        for module, names in re.findall(r"^from ((?:mptk|passes)[\w.]*) import ([\w, ]+)", code, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("page", NAMES)
def test_commands_exist(page):
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / page).read_text()
    shown = "\n".join(
        [*text.split("```")[1::2], *re.findall(r"`([^`\n]+)`", text), *re.findall(r"^    (.+)", text, re.M)]
    )
    assert set(re.findall(r"^(?:.* -m )?mptk ([a-z]+(?:-[a-z]+)*)", shown, re.MULTILINE)) <= commands
    assert set(re.findall(r"^make ([a-z-]+)", shown, re.MULTILINE)) <= targets


def _public(name: str) -> bool:
    """``mptk.prune`` and the like, and names of entry-point groups."""
    groups = {"mptk.rules", "mptk.criteria", "mptk.methods", "mptk.targets", "mptk.tasks"}
    return name in groups or name.removeprefix("mptk.") in mptk.__all__


def _there(name: str) -> bool:
    """A module, or something that a module holds."""
    for candidate in (name, name.rpartition(".")[0]):
        try:
            if find_spec(candidate) is not None:
                return True
        except (ModuleNotFoundError, AttributeError):
            continue
    return False


def test_reference_has_every_public_name():
    shown = found("docs/api.md", r"^\.\. auto(?:function|class):: ([\w.]+)")
    assert {f"mptk.{name}" for name in mptk.__all__} - {"mptk.__version__"} <= shown
    assert [name for name in shown if not _holds(name)] == []


def _holds(name: str) -> bool:
    module, _, own = name.rpartition(".")
    return hasattr(import_module(module), own)


def test_the_page_of_architectures_is_made_of_the_sweeps_rows(tmp_path):
    from benchmarks.zoo_table import main

    main(output=tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == (ROOT / "docs/architectures.md").read_text()


# ---- errors ----

QUOTED = re.findall(r"^\|`([^`]+)`", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


@cache
def list_texts() -> list[str]:
    """Every text of the code, with … for what is filled in."""
    trees = [ast.parse(path.read_text()) for folder in ("mptk", "passes") for path in (ROOT / folder).rglob("*.py")]
    return [_text(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant)]


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_code_says_what_troubleshooting_quotes(quoted):
    pattern = re.compile(".*".join(map(re.escape, quoted.strip("… ").split("…"))))
    assert any(pattern.search(text) for text in list_texts()), f"no text of the code is like: {quoted}"
