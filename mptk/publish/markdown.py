"""markdown: text of unknown origin in Markdown, so that it stays text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def code(text: object) -> str:
    """``text`` as a code span on one line: neither markup nor a link comes of it."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    runs = [len(run) for run in re.findall(r"`+", line)]
    fence = "`" * next(n for n in range(1, len(runs) + 2) if n not in runs)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}" if line else "–"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose other columns are numbers. Cells are Markdown already."""
    align = ["---", *["---:"] * (len(header) - 1)]
    bars = [[cell.replace("|", "\\|") for cell in row] for row in (header, align, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in bars)
