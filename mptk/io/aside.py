"""aside: the part of a run's own data that is only measured on, so that the quality is not that of fitted samples.

It comes first in the data, so that runs that fit to more or less of them are measured on the same. A run with
``eval_data`` sets nothing aside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ASIDE_PARTS = 4
"""A quarter of the data at most is set aside: most of a small text must be left to calibrate and train on."""
TextPart = Literal["measured", "fitted"]
"""What is set aside, or the rest."""


def count_aside(wanted: int, there: int) -> int:
    """How many of the samples that are there are set aside: as many as wanted, or a quarter; none of a single one."""
    return min(wanted, max(1, there // ASIDE_PARTS)) if there > 1 else 0


@dataclass(frozen=True)
class Aside:
    """Windows of a text to set aside: at most ``count``, of ``length`` tokens."""

    count: int
    length: int

    @property
    def least_tokens(self) -> int:
        """Tokens that must be read to know how many are set aside: if there are as many, all windows are."""
        return ASIDE_PARTS * self.count * self.length

    def count_tokens(self, there: int) -> int:
        """How many of the tokens that are there are set aside: whole windows or, of a short text, a quarter."""
        windows = min(self.count, there // (ASIDE_PARTS * self.length))
        return windows * self.length or there // ASIDE_PARTS
