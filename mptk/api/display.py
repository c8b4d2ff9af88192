"""display: show the progress of a run: bars on a terminal and in a notebook, plain lines in a log."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
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

from mptk.progress import CALLED, Progress, show_nothing

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
            with show_lines(console) as lines:
                yield lines
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


@contextlib.contextmanager
def show_lines(console: Console) -> Iterator[Progress]:
    """Lines for a log. Stages that report nothing for long, as a trace, get lines, too, which show that they go on."""
    lines, ended = LineProgress(console), threading.Event()

    def repeat() -> None:
        while not ended.wait(1.0):
            lines.repeat()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()


class LineProgress:
    """A Progress that prints a line when a stage starts, and its progress every ``LINE_S`` seconds.

    Lines begin with the seconds since the command or, in Python, the progress began.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock, self.lock = console, clock, threading.Lock()
        self.start, self.said, self.printed = CALLED.get() or clock(), ("", "", ""), 0.0

    def __call__(self, stage: str, done: int, total: int, figures: str = "", /) -> None:
        """As ``Progress``."""
        with self.lock:
            begins = stage != self.said[0]
            self.said = (stage, f" {done}/{total}" if done else "", f"  {figures}" if figures else "")
            if begins or self.clock() - self.printed >= LINE_S:
                self._print()

    def repeat(self) -> None:
        """Print the last stage and number once more, if that was long ago."""
        with self.lock:
            if self.said[0] and self.clock() - self.printed >= LINE_S:
                self._print()

    def _print(self) -> None:
        self.printed = self.clock()
        line = f"{self.printed - self.start:5.0f} s  {''.join(self.said)}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self.said = (*self.said[:2], "")  # figures are printed once: a line that repeats them would look like news
