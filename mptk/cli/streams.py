"""streams: standard output and error that may be closed or full. A failed write does not end the command."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any


class Lasting(io.FileIO):
    """A stream that accepts all text. ``lost``: why it could not pass some of it on."""

    lost: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(content).nbytes


def lasting() -> Lasting | None:
    """Make standard output and error accept all text; returns the new standard output, if this process owns it.

    A closed descriptor is opened to the null device: else the next file would get its number, and libraries would print
        into that file.
    """
    for descriptor in range(3):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        os.open(os.devnull, os.O_RDWR)
    sys.stderr, _ = _taken(sys.stderr, sys.__stderr__, 2)
    sys.stdout, own = _taken(sys.stdout, sys.__stdout__, 1)
    return own


def _taken(stream: Any, first: Any, descriptor: int) -> tuple[Any, Lasting | None]:
    if stream is not first:  # whoever calls main() has put it there
        if isinstance(stream, io.TextIOWrapper):  # a name or a sign that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
        return stream, None
    own = Lasting(os.devnull, "w") if stream is None else Lasting(descriptor, "w", closefd=False)
    made = io.TextIOWrapper(
        io.BufferedWriter(own),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=descriptor == 2 or own.isatty(),
        write_through=getattr(stream, "write_through", False),
    )
    return made, own


def lost(own: Lasting | None) -> str:
    """Why some output was lost; empty if none was, or if the reader stopped reading, as ``head`` does."""
    with contextlib.suppress(ValueError):  # somebody has closed it
        sys.stdout.flush()
    if own is None or own.lost is None or own.lost.errno == errno.EPIPE:
        return ""
    return str(own.lost.strerror)
