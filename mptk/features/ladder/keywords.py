"""keywords: the types of settings as keywords. ``python docs/tables.py`` writes this file."""

from __future__ import annotations

from mptk.api.keywords import CutKeywords


class LadderKeywords(CutKeywords, total=False):
    """The settings of ``mptk.ladder``."""

    shared: bool
