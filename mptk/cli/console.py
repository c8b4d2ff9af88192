"""console: where commands print, how much, and the progress of a run.

They print plain text: markup and control characters have no effect.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from mptk.api.display import bars, lines
from mptk.cli.stopping import STOPPED
from mptk.plain import plain
from mptk.progress import Progress, silent

if TYPE_CHECKING:
    from mptk.ir.passes import PassRecord

WIDE_COLUMNS = 1000
"""Columns if the output is not a terminal: wide enough that no table is cut."""


@dataclass
class Voice:
    """How much a command prints. ``quiet``: no progress. ``verbose``: also passes' differences and tracebacks."""

    quiet: bool = False
    verbose: bool = False


class PlainConsole(Console):
    """A console that reads no string as markup and escapes control characters.

    Tables, colours and bars of the program itself work as usual.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        terminal = stream is not None and stream.isatty()  # None: it was closed when the process began
        width = None if terminal or "COLUMNS" in os.environ else WIDE_COLUMNS
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            renderable = self._written_out(renderable)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)

    def _written_out(self, text: Text) -> Text:
        """``text`` with escaped control characters, before it is broken into lines."""
        if plain(text.plain) == text.plain:
            return text
        made = text.blank_copy()
        for at, character in enumerate(text.plain):
            made.append(plain(character), text.get_style_at_offset(self, at))
        return made


VOICE = Voice()
out = PlainConsole()
err = PlainConsole(stderr=True)


def echo(text: str, end: str = "\n") -> None:
    """Print text without wrapping or colours; control characters are escaped."""
    sys.stdout.write(plain(text) + end)
    sys.stdout.flush()


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


def printed() -> Callable[[PassRecord], None] | None:
    """With ``-v``, a function that prints the record of a stage, with the difference if it is a pass; else None."""
    return (lambda record: err.print(str(record), highlight=False)) if VOICE.verbose else None
