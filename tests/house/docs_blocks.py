"""Reads the blocks of a page: command lines, Python, and what is marked as not run by the tests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/tutorial.md"]
PAGES += sorted(
    {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")} - {*PAGES},
    key=lambda page: ("how-to" not in page, page),
)
PAGES += ["CONTRIBUTING.md", "examples/plugin/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("*.md"))
MARK = re.compile(r"\bneeds (a network|a GPU|another (program|package))|not run by the tests", re.IGNORECASE)
"""What says, above a block or in a command's comment, that the tests do not run it."""
ELSEWHERE = re.compile(r"\b(runs|does what) the blocks of this page\b")
"""What says that another test does what a page does."""
PROGRAMS = ("mptk", "pip", "make", "python", "torchrun", "accelerate")
SHELLS = ("bash", "console", "sh")


@dataclass(frozen=True)
class Block:
    """``kind``: python, a language of data such as yaml, or commands. ``lines``: for commands, one a line."""

    kind: str
    lines: list[str]
    marked: bool

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def blocks(page: str) -> list[Block]:
    """The blocks of a page that are Python, data or commands, in order; output and drawings are left out."""
    source = (ROOT / page).read_text()
    above = source.splitlines()
    found = []
    for token in MarkdownIt().parse(source):
        if token.type not in ("fence", "code_block"):
            continue
        assert token.map is not None
        said = next((line for line in reversed(above[: token.map[0]]) if line.strip()), "")
        kind, lines = token.info.strip(), token.content.splitlines()
        if kind in ("", *SHELLS):
            kind, lines = "commands", _commands(lines, every=kind in SHELLS)
        if lines:
            found.append(Block(kind, lines, (MARK.search(said) or ELSEWHERE.search(source)) is not None))
    return found


def inline(page: str) -> list[str]:
    """Commands with options in the text."""
    children = [
        child
        for token in MarkdownIt().enable("table").parse((ROOT / page).read_text())
        for child in token.children or ()
    ]
    spans = [child.content for child in children if child.type == "code_inline"]
    return [span for span in spans if re.match(r"mptk [a-z]+ .*--", span)]


def _commands(lines: list[str], *, every: bool) -> list[str]:
    """One command a line: without prompts, with continued lines joined. ``every``: not only those of ``PROGRAMS``."""
    joined: list[str] = []
    for line in lines:
        if joined and (joined[-1].endswith("\\") or line.startswith(" ")):
            joined[-1] = f"{joined[-1].removesuffix(chr(92))} {line.strip()}"
        else:
            joined.append(line.removeprefix("$ "))
    return [line for line in joined if line.strip() and not line.startswith("#") and (every or _is_command(line))]


def _is_command(line: str) -> bool:
    words = line.split()
    return words[0] in PROGRAMS and len(words) > 1
