"""plain: text of unknown origin as text: what a terminal or a browser would obey or hide is written out.

Names of models, paths, data, reports and messages of libraries go through ``plain`` before they are shown: on the
command line in ``mptk/cli/console.py``, in HTML in ``mptk/report/page/render.py``. In Markdown it is
``mptk/report/markdown.py``.
"""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_WRITTEN_OUT = ("Cc", "Cs", "Zl", "Zp")
"""Categories of Unicode: control characters (escape sequences begin with one), halves of a pair, line separators."""


def plain(text: str, *, lines: bool = True) -> str:
    """``text`` with control characters and changes of the writing direction as ``\\x1b`` or ``\\u202e``.

    ``lines``: keep line ends and tabs.
    """
    if text.isprintable():
        return text
    kept = _KEPT if lines else ""
    acts = {c for c in set(text) if c not in kept and (c in _BIDI or unicodedata.category(c) in _WRITTEN_OUT)}
    return "".join(c.encode("unicode_escape").decode("ascii") if c in acts else c for c in text)
