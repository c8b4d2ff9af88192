"""console: where commands print, how much, and the progress of a run.

Text is printed as it is: neither rich's markup nor control characters in it have an effect. Names of models, paths and
messages of libraries are other people's text.
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

from mptk.api.display import show_bars, show_lines
from mptk.cli.stopping import STOPPED
from mptk.plain import escape_text
from mptk.progress import Progress, show_nothing

if TYPE_CHECKING:
    from mptk.ir import PassRecord

WIDE_COLUMNS = 120
"""Columns if the output is not a terminal: what a log and a mail show. Longer cells go on in the next line."""


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
        return super().render_str(escape_text(text), **options)

    # Text objects go around ``render_str``. Segments are the last that rich makes before it writes; the ones with
    # ``control`` are its own (movements of the cursor, for bars).
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            renderable = self._escape_controls(renderable)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escape_text(segment.text), segment.style)

    def _escape_controls(self, text: Text) -> Text:
        """``text`` with escaped control characters. Now: once it is broken into lines, an escape would not fit."""
        if escape_text(text.plain) == text.plain:
            return text
        made = text.blank_copy()
        for at, character in enumerate(text.plain):
            made.append(escape_text(character), text.get_style_at_offset(self, at))
        return made


VOICE = Voice()
out = PlainConsole()
err = PlainConsole(stderr=True)


def print_text(text: str, end: str = "\n") -> None:
    """Print text without wrapping or colours; control characters are escaped."""
    sys.stdout.write(escape_text(text) + end)
    sys.stdout.flush()  # text that streams token by token has no line ends for long


@contextlib.contextmanager
def show_stages(console: Console) -> Iterator[Progress]:
    """Show the stages of a run: bars on a terminal; in a log, lines with the seconds since the start.

    Each update also checks for a signal whose exception a library dropped: no other code runs as often.
    """
    if VOICE.quiet:
        yield _watch_signals(show_nothing)
    elif not console.is_interactive:
        with show_lines(console) as lines:
            yield _watch_signals(lines)
    else:
        with show_bars(console) as progress:
            yield _watch_signals(progress)


def _watch_signals(progress: Progress) -> Progress:
    def report(stage: str, done: int, total: int, figures: str = "", /) -> None:
        STOPPED.look()
        progress(stage, done, total, figures)

    return report


def make_pass_printer() -> Callable[[PassRecord], None] | None:
    """With ``-v``, a function that prints the record of a stage, with the difference if it is a pass; else None."""
    return (lambda record: err.print(str(record), highlight=False)) if VOICE.verbose else None
