"""notebook: what objects show in a notebook: a caption, tables and lines, as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from mptk.plain import escape_text


def build_html(caption: str, *parts: str) -> str:
    """A caption in bold, and below it parts that ``build_table`` and ``build_line`` made."""
    return f"<div><b>{escape_html(caption)}</b>{''.join(parts)}</div>"


def build_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a head."""
    head = "".join(f"<th>{escape_html(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape_html(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def build_line(text: str, *, code: bool = False) -> str:
    """A line of text; with ``code`` one to copy."""
    tag = "pre" if code else "div"
    return f"<{tag}>{escape_html(text)}</{tag}>"


def escape_html(text: str) -> str:
    """Text of unknown origin as a browser shows it, and does not obey it."""
    return html.escape(escape_text(text, lines=False))
