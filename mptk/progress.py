"""progress: what long work calls to say how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Count = Callable[[int, int], None]
"""Called with how much is done and how much there is."""


class Progress(Protocol):
    """Called with a stage's name, how much of it is done and how much there is (0: unknown), and figures to show."""

    def __call__(self, stage: str, done: int, total: int, figures: str = "", /) -> None: ...


def silent(stage: str, done: int, total: int, figures: str = "", /) -> None:
    """A Progress that shows nothing."""
