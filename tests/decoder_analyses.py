"""Analyses of tiny decoders (``mptk.testing.DECODERS``), each made once in a process, to be read."""

from __future__ import annotations

import functools
from typing import Any

from mptk import analyze, trace
from mptk.ir import Analysis
from mptk.testing import draw_tokens, make_decoder


@functools.cache
def analyze_decoder(architecture: str, **changes: Any) -> Analysis:
    """The analysis of ``make_decoder(architecture, **changes)``, which has the same weights each time."""
    return analyze(trace(make_decoder(architecture, **changes), (draw_tokens(),)))
