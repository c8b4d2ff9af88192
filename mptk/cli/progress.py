"""progress: show the stages of a run on stderr: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console

from mptk.api.display import bars, lines
from mptk.cli.console import VOICE
from mptk.cli.stopping import STOPPED
from mptk.progress import Progress, silent


@contextlib.contextmanager
def stages(console: Console) -> Iterator[Progress]:
    """Show the stages of a run: bars on a terminal; in a log, lines with the seconds since the start.

    Each update also checks for a signal whose exception was dropped.
    """
    if VOICE.quiet:
        yield _looking(silent)
    elif not console.is_interactive:
        yield _looking(lines(console))
    else:
        with bars(console) as progress:
            yield _looking(progress)


def _looking(progress: Progress) -> Progress:
    def report(stage: str, done: int, total: int, figures: str = "", /) -> None:
        STOPPED.look()
        progress(stage, done, total, figures)

    return report
