"""progress: show the stages of a run on stderr: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
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

from mptk.cli.voice import VOICE
from mptk.progress import Progress, silent

LINE_S = 10.0
"""Seconds between two lines of one stage in a log."""


@contextlib.contextmanager
def stages(console: Console) -> Iterator[Progress]:
    """Show the stages of a run: a bar for each on a terminal; in a log, lines with the seconds since the start."""
    if VOICE.quiet:
        yield silent
        return
    if not console.is_interactive:
        yield lines(console)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, TimeRemainingColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def finish() -> None:
            for task in tasks.values():
                bars.update(task, total=1, completed=1) if not bars.tasks[task].total else bars.stop_task(task)

        def report(stage: str, done: int, total: int, figures: str = "", /) -> None:
            if stage not in tasks:
                finish()
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None, description=f"{stage}  {figures}".rstrip())

        yield report
        finish()


def lines(console: Console, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Print a line when a stage starts, and every ``LINE_S`` seconds one with its progress."""
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
