"""display: show the progress of a run: bars on a terminal and in a notebook, plain lines in a log."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)

from mptk.progress import Progress, show_nothing

LINE_S = 10.0
"""Seconds between two lines of one stage in a log."""


@contextlib.contextmanager
def show_progress(console: Console | None = None) -> Iterator[Progress]:
    """Progress for calls from Python: bars on a terminal and in a notebook, nothing in a script's log.

    A notebook without ipywidgets cannot move bars and gets lines.
    """
    console = console or Console(stderr=True)  # what a script prints on its standard output stays its own
    if console.is_jupyter:
        if importlib.util.find_spec("ipywidgets") is None:
            yield make_line_progress(console)
            return
    elif not console.is_interactive:
        yield show_nothing
        return
    with show_bars(console) as progress:
        yield progress


@contextlib.contextmanager
def show_bars(console: Console) -> Iterator[Progress]:
    """A bar for each stage."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, TimeRemainingColumn(), console=console) as drawn:
        tasks: dict[str, TaskID] = {}

        # Stages follow each other, so a new one ends those before it. A stage of unknown length is then filled; others
        # stop where they are.
        def finish() -> None:
            for task in tasks.values():
                drawn.update(task, total=1, completed=1) if not drawn.tasks[task].total else drawn.stop_task(task)

        def report(stage: str, done: int, total: int, figures: str = "", /) -> None:
            if stage not in tasks:
                finish()
                tasks[stage] = drawn.add_task(stage, total=total or None)
            drawn.update(tasks[stage], completed=done, total=total or None, description=f"{stage}  {figures}".rstrip())

        yield report
        finish()


def make_line_progress(console: Console, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Print a line when a stage starts, and its progress every ``LINE_S`` seconds."""
    start, current, printed = clock(), "", 0.0

    def report(stage: str, done: int, total: int, figures: str = "", /) -> None:
        nonlocal current, printed
        now = clock()
        if stage == current and now - printed < LINE_S:
            return
        current, printed = stage, now
        reached = (f" {done}/{total}" if done else "") + (f"  {figures}" if figures else "")
        console.print(f"{now - start:5.0f} s  {stage}{reached}", markup=False, highlight=False, soft_wrap=True)

    return report
