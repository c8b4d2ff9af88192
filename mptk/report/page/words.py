"""words: figures and lists as people read them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def figure(value: float | None) -> str:
    """Two decimals, four of what is at most 1. Infinity and NaN are null in JSON."""
    if value is None:
        return "not finite"
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"


def large(value: float) -> str:
    """``134.5 M``: three or four digits and a unit."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == ' k' else size):.1f}{unit}"
    return f"{value:,.0f}"


def ranges(widths: Sequence[int]) -> str:
    """``32…1536 step 32`` if the widths are evenly spaced, else a list."""
    if len(widths) > 3:
        steps = {b - a for a, b in itertools.pairwise(widths)}
        if len(steps) == 1:
            step = steps.pop()
            return f"{widths[0]}…{widths[-1]}" + (f" step {step}" if step > 1 else "")
    return ", ".join(map(str, widths)) if len(widths) <= 12 else f"{widths[0]}…{widths[-1]}, {len(widths)} widths"
