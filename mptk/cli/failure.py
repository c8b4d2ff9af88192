"""failure: how a failed command ends: one line with cause and remedy, and an exit code by the kind of error.

Standard output and error may be closed or full; a failed write does not end the command.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.text import Text

from mptk.cli.console import VOICE, err
from mptk.cli.stopping import HungUp, Terminated
from mptk.errors import MptkError
from mptk.plain import escape_text
from mptk.plugins import explain_absent
from mptk.version import __version__

FAILED, USAGE, BUG, INTERRUPTED, TERMINATED, HUNG_UP = 1, 2, 70, 130, 143, 129
"""Exit codes: an error that the user can fix; a wrong option, like click's own; a bug in mptk (EX_SOFTWARE of
sysexits.h); and 128 + the signal's number, as a shell reports it: Ctrl-C, SIGTERM, SIGHUP."""
LOGS_KEPT = 20
"""Number of logs of mptk's own bugs to keep."""
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # click's UsageError, which typer exports under no name


UNKNOWN_WORDS = ("No such option", "No such command")
"""How click's errors begin for words that a feature may know which is not installed."""


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP stopped the command. The text says what is kept."""

    def __init__(self, stop: KeyboardInterrupt) -> None:
        super().__init__(str(stop) or "nothing was published")
        self.word, self.code = "interrupted", INTERRUPTED
        if isinstance(stop, Terminated):
            self.word, self.code = "terminated", HUNG_UP if isinstance(stop, HungUp) else TERMINATED


def report_failure(error: BaseException) -> int:
    """Say in one line what happened, and return the exit code."""
    # With -v the traceback, except for what is not a failure of code: a signal, a wrong option.
    if VOICE.verbose and isinstance(error, Exception) and not isinstance(error, Interrupted | USAGE_ERROR):
        err.print("".join(traceback.format_exception(error)), highlight=False, soft_wrap=True)
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted(error)
    if isinstance(error, Interrupted):
        err.print(f"{error.word}; {error}", highlight=False, soft_wrap=True)
        return error.code
    if isinstance(error, MptkError):
        _print_error(str(error))
        return FAILED
    if isinstance(error, USAGE_ERROR):
        return _report_usage(error)
    if isinstance(error, typer.Abort):
        _print_error("stopped; answer the question")
        return FAILED
    # Whatever no other place has translated is a bug. One line here, too; the traceback goes into a file.
    said = str(error).strip().partition("\n")[0].rstrip(".") or "no reason given"
    ours = "This is a bug in mptk, not your mistake"
    _print_error(f"{type(error).__name__}: {said}. {ours}; please report it with {_log(error)}")
    return BUG


def report_unprinted(why: str) -> int:
    """Say that the result could not be printed, and return the exit code."""
    _print_error(
        f"the result could not be printed: {why}; files that the command writes are complete, so print elsewhere"
    )
    return FAILED


def _print_error(message: str) -> None:
    line = escape_text(" ".join(message.split("\n")), lines=False)
    err.print(Text.assemble(("error:", "bold red"), f" {line}"), soft_wrap=True)


def _report_usage(error: Exception) -> int:
    if type(error).__name__ != "NoArgsIsHelpError":  # which has printed the help
        context = getattr(error, "ctx", None)
        command = getattr(context, "command_path", "mptk")
        said = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
        missing = explain_absent() if said.startswith(UNKNOWN_WORDS) else ""
        _print_error(f"{said.rstrip('.')}; {f'{missing}; ' if missing else ''}`{command} -h` has the options")
    return USAGE


def _log(error: BaseException) -> str:
    """Write the traceback of an error to a file; returns how the message names it."""
    from mptk.io import cache_dir

    text = f"mptk {__version__}\n{''.join(traceback.format_exception(error))}"
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns()}"
    # The cache folder may be full or not writable, so there is a second place, and a third answer.
    for folder in (cache_dir() / "logs", Path(tempfile.gettempdir())):
        file = folder / f"mptk-error-{stamp}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8", errors="backslashreplace") as opened:
                opened.write(text)
            for old in sorted(folder.glob("mptk-error-*.log"))[:-LOGS_KEPT]:
                old.unlink(missing_ok=True)
            return str(file)
        except OSError:
            continue
    return "what -v prints"


class Lasting(io.FileIO):
    """A stream whose writes never fail: a full disk behind a redirection must not end a run of hours.

    ``lost``: why it could not pass some text on.
    """

    lost: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(content).nbytes  # as if it were written, or the buffer above would try again for ever


def replace_streams() -> Lasting | None:
    """Make standard output and error accept all text; returns the new standard output, if this process owns it.

    A closed descriptor is opened to the null device: otherwise the next file would get its number, and libraries would
    print into that file.
    """
    for descriptor in range(3):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        os.open(os.devnull, os.O_RDWR)
    sys.stderr, _ = _replace_stream(sys.stderr, sys.__stderr__, 2)
    sys.stdout, own = _replace_stream(sys.stdout, sys.__stdout__, 1)
    return own


def _replace_stream(stream: TextIO | None, first: object, descriptor: int) -> tuple[Any, Lasting | None]:
    if stream is not first:  # the caller of main() has put it there, as tests and notebooks do
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


def find_lost_output(own: Lasting | None) -> str:
    """Why some output was lost; empty if none was, or if the reader stopped reading, like ``head``."""
    with contextlib.suppress(ValueError):  # code of a library has closed it
        sys.stdout.flush()
    if own is None or own.lost is None or own.lost.errno == errno.EPIPE:
        return ""
    return str(own.lost.strerror)
