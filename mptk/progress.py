"""progress: the functions that long work calls to report its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

Item = TypeVar("Item")

Count = Callable[[int, int], None]
"""Called with the amount done and the total."""


class Progress(Protocol):
    """Called with a stage's name, the amount done, the total (0: unknown), and figures to show."""

    def __call__(self, stage: str, done: int, total: int, figures: str = "", /) -> None: ...


def show_nothing(stage: str, done: int, total: int, figures: str = "", /) -> None:
    """A Progress that shows nothing."""


CALLED: ContextVar[float | None] = ContextVar("called", default=None)
"""When the user's command began, on ``time.monotonic``; its minutes count from then on, imports included."""

# A context variable, and not an argument: passes call each other through code that knows nothing of progress.
_STAGE: ContextVar[tuple[Progress, str]] = ContextVar("stage", default=(show_nothing, ""))


@contextmanager
def enter_stage(progress: Progress, stage: str) -> Iterator[None]:
    """Make ``step`` and ``step_through`` report on this stage within a ``with`` block."""
    token = _STAGE.set((progress, stage))
    try:
        yield
    finally:
        _STAGE.reset(token)


def step(done: int, total: int, figures: str = "") -> None:
    """Report the progress of the current stage (``enter_stage``)."""
    progress, stage = _STAGE.get()
    progress(stage, done, total, figures)


def step_through(items: Iterable[Item], figures: str | Callable[[Item], str] = "") -> Iterator[Item]:
    """Iterate over the items and report each as a step of the current stage. ``figures``: shown beside the count."""
    listed = list(items)
    for done, item in enumerate(listed):
        step(done, len(listed), figures(item) if callable(figures) else figures)
        yield item
    step(len(listed), len(listed))
