"""progress: show the stages of a run on stderr: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console

from mptk.cli.voice import VOICE
from mptk.driver.display import bars, lines
from mptk.progress import Progress, silent


@contextlib.contextmanager
def stages(console: Console) -> Iterator[Progress]:
    """Show the stages of a run: a bar for each on a terminal; in a log, lines with the seconds since the start."""
    if VOICE.quiet:
        yield silent
    elif not console.is_interactive:
        yield lines(console)
    else:
        with bars(console) as progress:
            yield progress
