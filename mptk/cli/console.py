"""console: where commands print, and how much. It is plain text: neither markup nor control characters act."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from mptk.plain import plain

WIDE = 1000
"""Columns where the output is no terminal: no table is cut."""


@dataclass
class Voice:
    """How much a command says. ``quiet``: no progress. ``verbose``: passes' differences, the traceback of an error."""

    quiet: bool = False
    verbose: bool = False


class PlainConsole(Console):
    """A console that takes no string for markup, and writes out control characters in all that it prints.

    What the program itself lays out (tables, colours, bars) stays.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        terminal = stream is not None and stream.isatty()  # None: it was closed when the process began
        width = None if terminal or "COLUMNS" in os.environ else WIDE
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            renderable = self._written_out(renderable)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)

    def _written_out(self, text: Text) -> Text:
        """``text`` with its control characters written out, before it is broken into lines."""
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
    """Print text as it is, but for control characters: nothing is wrapped or coloured."""
    sys.stdout.write(plain(text) + end)
    sys.stdout.flush()
