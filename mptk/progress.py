"""progress: what long work calls to say how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

Item = TypeVar("Item")

Count = Callable[[int, int], None]
"""Called with how much is done and how much there is."""


class Progress(Protocol):
    """Called with a stage's name, how much of it is done and how much there is (0: unknown), and figures to show."""

    def __call__(self, stage: str, done: int, total: int, figures: str = "", /) -> None: ...


def silent(stage: str, done: int, total: int, figures: str = "", /) -> None:
    """A Progress that shows nothing."""


_STAGE: ContextVar[tuple[Progress, str]] = ContextVar("stage", default=(silent, ""))


@contextmanager
def within(progress: Progress, stage: str) -> Iterator[None]:
    """Within it, ``step`` and ``steps`` show how far this stage is. Passes need no argument for it."""
    token = _STAGE.set((progress, stage))
    try:
        yield
    finally:
        _STAGE.reset(token)


def step(done: int, total: int, figures: str = "") -> None:
    """Say how far the current stage is (``within``)."""
    progress, stage = _STAGE.get()
    progress(stage, done, total, figures)


def steps(items: Iterable[Item], figures: str | Callable[[Item], str] = "") -> Iterator[Item]:
    """The items, each of which is a step of the current stage. ``figures``: what is shown beside the count."""
    listed = list(items)
    for done, item in enumerate(listed):
        step(done, len(listed), figures(item) if callable(figures) else figures)
        yield item
    step(len(listed), len(listed))
