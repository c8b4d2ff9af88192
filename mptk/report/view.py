"""view: a result as plain values for renderers: sections with tables and sentences.

``sections``, ``analysis`` and ``advice`` make views. A console prints a view as it is; ``render_markdown`` makes
Markdown of it, and ``page/`` HTML.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table as Drawn
from rich.text import Text

from mptk.plain import escape_text

# Kinds of text. They are strings, so a renderer that does not know a kind prints it all the same.


class Name(str):
    """Text that comes from a model, a file or a library. Markdown shows it as code, in which nothing is markup."""


class Good(str):
    """A good result."""


class Bad(str):
    """A bad result."""


class Command(str):
    """A command to type. A page shows it on lines of its own, so that it can be copied."""


class Share(str):
    """A figure that is a ``part`` of a whole. A page also draws it as a bar."""

    part: float

    def __new__(cls, said: str, part: float) -> Share:
        made = super().__new__(cls, said)
        made.part = part
        return made


@dataclass(frozen=True)
class Table:
    """``align``: a letter for each column: ``l`` for text, ``r`` for numbers. ``ends``: rows that end a part."""

    align: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    ends: Collection[int] = ()


@dataclass(frozen=True)
class Section:
    """A part of a view. Strings are paragraphs."""

    title: str
    parts: Sequence[Table | str]


@dataclass(frozen=True)
class View:
    """Sections in order. A console of rich prints it as it is."""

    sections: Sequence[Section]
    title: str = ""

    def __rich__(self) -> RenderableType:
        title = [_make_text(self.title, "bold")] if self.title else []
        return Group(*title, *(part for section in self.sections for part in _render_section(section)))


# ---- figures and lists as people read them ----


def format_figure(value: float | None) -> str:
    """A perplexity or another metric: two decimals, or four if it is at most 1. Null in JSON means infinity or NaN."""
    if value is None:
        return "not finite"
    if abs(value) >= 1e5:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"


def format_difference(value: float | None) -> str:
    """A difference or a tolerance: two digits and a power of ten."""
    return "not finite" if value is None else f"{value:.1e}" if value else "0"


def format_megabytes(size: float) -> str:
    """Bytes as ``1,234 MB`` or ``0.2 MB``."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def format_large(value: float) -> str:
    """``134.5 M``: three or four digits and a unit."""
    # Thousands begin at 10,000: 1,234 is as short as 1.2 k and says more.
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == ' k' else size):.1f}{unit}"
    return f"{value:,.0f}"


def format_count(count: int, noun: str) -> str:
    """``1 thread``, ``4 threads``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def format_ranges(widths: Sequence[int]) -> str:
    """``32…1536 step 32`` if the widths are evenly spaced, else a list."""
    if len(widths) > 3:
        steps = {b - a for a, b in itertools.pairwise(widths)}
        if len(steps) == 1:
            step = steps.pop()
            return f"{widths[0]}…{widths[-1]}" + (f" step {step}" if step > 1 else "")
    return ", ".join(map(str, widths)) if len(widths) <= 12 else f"{widths[0]}…{widths[-1]}, {len(widths)} widths"


# ---- a view on a terminal ----


def _render_section(section: Section) -> list[RenderableType]:
    title = [_make_text(section.title, "bold")] if section.title else []
    return [*title, *(_make_text(part) if isinstance(part, str) else _draw_table(part) for part in section.parts)]


def _draw_table(table: Table) -> Drawn:
    drawn = Drawn(show_header=any(table.columns))
    for column, align in zip(table.columns, table.align, strict=True):
        # Folded, and not cut off: two names that begin alike would look the same.
        drawn.add_column(_make_text(column), justify="right" if align == "r" else "left", overflow="fold")
    for number, row in enumerate(table.rows):
        cells = (_make_text(cell, "red" if isinstance(cell, Bad) else "") for cell in row)
        drawn.add_row(*cells, end_section=number in table.ends)
    return drawn


def _make_text(said: str, style: str = "") -> Text:
    return Text(escape_text(said), style)  # before rich drops control characters


# ---- a view as Markdown ----


# What Markdown could act on. ``www.`` and ``://`` begin links in GitHub's dialect without any brackets.
_ACTS = re.compile(r"([\\`*_{}\[\]<>#|~&!@]|(?<=www)\.|:(?=//))")


def format_code(said: object) -> str:
    """``said`` as a code span on one line, which cannot become markup or a link."""
    # A span ends at a run of as many backticks as it began with, so the fence is a run that the text lacks. A space
    # keeps a backtick at an end of the text apart from it.
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
    """``said`` on one line: a name or a command as code, other text with escaped markup."""
    return format_code(said) if isinstance(said, Name | Command) else _ACTS.sub(r"\\\1", " ".join(said.split()))


def _render_table(table: Table) -> str:
    bars = ["---:" if align == "r" else "---" for align in table.align]
    cells = ([_render_cell(cell) for cell in row] for row in table.rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(map(_render_cell, table.columns)), bars, *cells))


def _render_cell(said: str) -> str:
    # A bar ends a cell even inside a code span.
    return format_code(said).replace("|", "\\|") if isinstance(said, Name) else render_text(said)
