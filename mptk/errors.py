"""Errors that a user can act on."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import traceback
from collections.abc import Iterable, Iterator


class MptkError(Exception):
    """A user-facing error: ``cause; remedy`` in one line. The command line prints it and exits with 1.

    Other modules may drop the remedy: the text up to the first semicolon is the cause.
    """


def suggest_name(name: str, known: Iterable[str], otherwise: str) -> str:
    """``did you mean …?`` with the name in ``known`` that is closest to ``name``; ``otherwise`` if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise


def take_first_line(error: BaseException) -> str:
    """The first line of an error's text, and the second if the first ends in a colon; without text, its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


class ProofError(MptkError):
    """A result is wrong: mptk has a bug, or somebody changed a file. Nothing is published."""


class Exhausted(MptkError):
    """The machine ran out of memory, of disk space or of files that a process may open."""


# ---- what the machine lacks, or somebody took away ----

STAGED: set[str] = set()
"""Temporary folders and files of the cache that this process uses now. If one is missing, somebody else removed it."""


def make_removed_error(path: str) -> MptkError:
    """The error for a temporary file or folder that somebody removed while mptk used it."""
    return MptkError(
        f"{path} was removed while mptk used it, as cleaners of temporary files do; run again, with TMPDIR and "
        "MPTK_CACHE in folders that are not cleaned"
    )


NO_MORE_FILES = "too many open files; let the process open more, as with `ulimit -n 4096`, and try again"

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is too large",
}
_REFUSED = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
}
_FILES = {errno.EMFILE, errno.ENFILE}
# Libraries have no common class or number for these, so their text decides.
_MEMORY = re.compile(r"out of memory|(?:can't|cannot|failed to|unable to) allocate|not enough memory|bad_alloc", re.I)
_TOO_MANY = os.strerror(errno.EMFILE)
_DEVICE = re.compile(r"(CUDA|HIP|XPU|MPS)\b.*out of memory")
_AMOUNT = re.compile(r"(?:allocate|buffer of size) ([\d.]+)(?: ([KMGTP]iB))?", re.I)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def explain_errors() -> Iterator[None]:
    """Turn a library's error about memory, disk, open files, permissions or a broken package into an MptkError."""
    try:
        yield
    except Exception as error:
        found = None if isinstance(error, Exhausted) else find_exhaustion(error) or find_broken_package(error)
        if found is None:
            raise
        raise found from error


def find_exhaustion(error: BaseException) -> MptkError | None:
    """The error to raise for a lack of memory, disk, open files or permissions; None if ``error`` is about neither.

    Libraries share no class for these: torch raises a RuntimeError, safetensors its own class. So the error and all of
    its causes are searched.
    """
    cause: BaseException | None = error
    while cause is not None:
        number = _find_errno(cause)
        # Also behind an MptkError: a reader that cannot open one more file reports that file as damaged.
        if number in _FILES or _TOO_MANY in str(cause):
            return Exhausted(NO_MORE_FILES)
        silent = not isinstance(error, MptkError)  # an MptkError already says what could not be written
        where = f" ({name})" if (name := getattr(cause, "filename", None)) else ""
        if number in _FULL and silent:
            return Exhausted(f"{_FULL[number]}{where}; free some space, or give a place on another disk")
        if number in _REFUSED and silent:
            return MptkError(f"{_REFUSED[number]}{where}; check the permissions of the files, or give another place")
        if silent and (gone := find_removed(cause)) is not None:
            return make_removed_error(gone)
        if isinstance(cause, MemoryError) or number == errno.ENOMEM or _is_memory_error(cause):
            return Exhausted(_describe_memory(str(cause)))
        cause = cause.__cause__
    return None


def find_broken_package(error: BaseException) -> MptkError | None:
    """The error to raise for an installed package that failed while it was imported; None for any other error.

    A shared library that is missing behind the package is an ImportError with the module's name, or an OSError that
    ctypes raises in the package's own code.
    """
    if not isinstance(error, ImportError | OSError) or isinstance(error, ModuleNotFoundError):
        return None
    # The innermost module that was just being imported is the one at fault.
    names = [
        frame.f_globals.get("__name__", "")
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    names += [error.name or ""] if isinstance(error, ImportError) else []
    package = names[-1].partition(".")[0] if names else ""
    if package in ("", "__main__", "mptk", "passes"):
        return None
    return MptkError(
        f"the package {package} is installed, but does not import ({take_first_line(error)}); repair it, or uninstall "
        "it if you do not need it"
    )


def find_removed(error: BaseException) -> str | None:
    """A temporary file or folder of mptk's that an error names and that no longer exists; None if there is none."""
    said = str(error)
    for place in tuple(STAGED):
        if (at := said.find(place)) >= 0:
            # The text may name a file in the folder. Its name ends at a quote, a space or a sign of punctuation.
            name = re.split(r"[\s'\",:;]", said[at + len(place) :], maxsplit=1)[0]
            for path in (place, place + name):
                if not os.path.lexists(path):
                    return path
    return None


def _find_errno(error: BaseException) -> int | None:
    """The errno of an error. Libraries written in Rust (safetensors, tokenizers) give it only in their text."""
    if isinstance(error, OSError):
        return error.errno
    told = _OS_ERROR.search(str(error))
    return int(told[1]) if told else None


def _is_memory_error(error: BaseException) -> bool:
    return not isinstance(error, MptkError | OSError) and _MEMORY.search(str(error)) is not None


def _describe_memory(text: str) -> str:
    device, amount = _DEVICE.search(text), _AMOUNT.search(text)
    where = f"the {device[1]} device is out of memory" if device else "out of memory"
    wanted = f" ({_format_amount(float(amount[1]), amount[2])} more were asked for)" if amount else ""
    return (
        f"{where}{wanted}; free some, or lower --length, --samples or --micro; "
        "`mptk prune MODEL --estimate` says what a run needs"
    )


def _format_amount(number: float, unit: str | None) -> str:
    return f"{number:g} {unit}" if unit else f"{number / 1e9:.3g} GB"
