"""docs/troubleshooting.md quotes errors as the code says them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^\|`([^`]+)`", PAGE, re.MULTILINE)


@cache
def texts() -> list[str]:
    """Every text of the code, with … for what is filled in."""
    trees = [ast.parse(path.read_text()) for folder in ("mptk", "passes") for path in (ROOT / folder).rglob("*.py")]
    return [_text(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant)]


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


@pytest.mark.features
@pytest.mark.parametrize("quoted", QUOTED)
def test_the_code_says_it(quoted: str) -> None:
    pattern = re.compile(".*".join(map(re.escape, quoted.strip("… ").split("…"))))
    assert any(pattern.search(text) for text in texts()), f"no text of the code is like: {quoted}"
