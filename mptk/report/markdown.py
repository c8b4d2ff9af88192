"""markdown: write a view as Markdown; text of the view cannot become markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mptk.report.view import Name, Table, View

_ACTS = re.compile(r"([\\`*_{}\[\]<>#|~&!@]|(?<=www)\.|:(?=//))")


def code(said: object) -> str:
    """``said`` as a code span on one line, which cannot become markup or a link."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(said)).split())
    runs = [len(run) for run in re.findall(r"`+", line)]
    fence = "`" * next(n for n in range(1, len(runs) + 2) if n not in runs)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}" if line else "–"


def rendered(view: View) -> str:
    """The sections in order, each with a heading if it has a title."""
    return "\n\n".join(f"## {text(s.title)}\n\n{body(s.parts)}" if s.title else body(s.parts) for s in view.sections)


def body(parts: Sequence[Table | str]) -> str:
    """Tables and paragraphs."""
    return "\n\n".join(text(part) if isinstance(part, str) else _table(part) for part in parts)


def text(said: str) -> str:
    """``said`` on one line: a name as code, other text with escaped markup."""
    return code(said) if isinstance(said, Name) else _ACTS.sub(r"\\\1", " ".join(said.split()))


def _table(table: Table) -> str:
    bars = ["---:" if align == "r" else "---" for align in table.align]
    cells = ([_cell(cell) for cell in row] for row in table.rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(map(_cell, table.columns)), bars, *cells))


def _cell(said: str) -> str:
    return code(said).replace("|", "\\|") if isinstance(said, Name) else text(said)
