"""plain: text. It is escaped if its origin is unknown, so that terminals and browsers neither obey nor hide a part.

Names of models, paths, data, reports and libraries' messages go through ``escape_text`` before they are shown.
``mptk/cli/console.py`` calls it for the command line, ``mptk/report/page/render.py`` for HTML;
``mptk/report/view.py`` does the same for Markdown.
"""

from __future__ import annotations

import hashlib
import unicodedata

_KEPT = "\n\t"
# Marks that change the writing direction: they are "Cf" like harmless ones, so they are named one by one.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_WRITTEN_OUT = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, with which escape sequences begin; halves of surrogate pairs, which cannot be
written as UTF-8; line and paragraph separators."""


def escape_text(text: str, *, lines: bool = True) -> str:
    """``text`` with control characters and changes of the writing direction as ``\\x1b`` or ``\\u202e``.

    ``lines``: keep line ends and tabs.
    """
    if text.isprintable():
        return text
    kept = _KEPT if lines else ""
    acts = {c for c in set(text) if c not in kept and (c in _BIDI or unicodedata.category(c) in _WRITTEN_OUT)}
    return "".join(c.encode("unicode_escape").decode("ascii") if c in acts else c for c in text)


def hash_text(text: str, digits: int = 64) -> str:
    """The first hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
