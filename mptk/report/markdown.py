"""markdown: write a view as Markdown; text of the view cannot become markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mptk.report.view import Name, Table, View

_ACTS = re.compile(r"([\\`*_{}\[\]<>#|~&!@]|(?<=www)\.|:(?=//))")


def format_code(said: object) -> str:
    """``said`` as a code span on one line, which cannot become markup or a link."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(said)).split())
    runs = [len(run) for run in re.findall(r"`+", line)]
    fence = "`" * next(n for n in range(1, len(runs) + 2) if n not in runs)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}" if line else "–"


def render_markdown(view: View) -> str:
    """The sections in order, each with a heading if it has a title."""
    return "\n\n".join(
        f"## {render_text(s.title)}\n\n{render_parts(s.parts)}" if s.title else render_parts(s.parts)
        for s in view.sections
    )


def render_parts(parts: Sequence[Table | str]) -> str:
    """Tables and paragraphs."""
    return "\n\n".join(render_text(part) if isinstance(part, str) else _render_table(part) for part in parts)


def render_text(said: str) -> str:
    """``said`` on one line: a name as code, other text with escaped markup."""
    return format_code(said) if isinstance(said, Name) else _ACTS.sub(r"\\\1", " ".join(said.split()))


def _render_table(table: Table) -> str:
    bars = ["---:" if align == "r" else "---" for align in table.align]
    cells = ([_render_cell(cell) for cell in row] for row in table.rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(map(_render_cell, table.columns)), bars, *cells))


def _render_cell(said: str) -> str:
    return format_code(said).replace("|", "\\|") if isinstance(said, Name) else render_text(said)
