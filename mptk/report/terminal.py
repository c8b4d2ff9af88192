"""terminal: a view as tables and lines of text."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table as Drawn
from rich.text import Text

from mptk.plain import plain
from mptk.report.view import Bad, Section, Table, View


def rendered(view: View) -> Group:
    """The sections in order."""
    title = [_text(view.title, "bold")] if view.title else []
    return Group(*title, *(part for section in view.sections for part in _lines(section)))


def _lines(section: Section) -> list[RenderableType]:
    title = [_text(section.title, "bold")] if section.title else []
    return [*title, *(_text(part) if isinstance(part, str) else _table(part) for part in section.parts)]


def _table(table: Table) -> Drawn:
    drawn = Drawn(show_header=any(table.columns))
    for column, align in zip(table.columns, table.align, strict=True):
        drawn.add_column(_text(column), justify="right" if align == "r" else "left")
    for number, row in enumerate(table.rows):
        cells = (_text(cell, "red" if isinstance(cell, Bad) else "") for cell in row)
        drawn.add_row(*cells, end_section=number in table.ends)
    return drawn


def _text(said: str, style: str = "") -> Text:
    return Text(plain(said), style)  # before rich drops control characters
