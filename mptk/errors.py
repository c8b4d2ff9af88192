"""Errors that a user can act on."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from types import FrameType


class MptkError(Exception):
    """A user-facing error: one line that names the cause and the remedy. The command line prints it and exits 1."""


def suggest_name(name: str, known: Iterable[str], otherwise: str) -> str:
    """Ask whether the closest name in ``known`` was meant by a mistyped one; ``otherwise`` if no name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise


def take_first_line(error: BaseException) -> str:
    """The first line of an error's text, and the second if the first ends with a colon; its class if it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


class ProofError(MptkError):
    """A result is wrong: mptk has a bug, or somebody changed a file. Nothing is published."""


class Exhausted(MptkError):
    """The machine ran out of memory, of disk space or of files that a process may open."""


STAGED: set[str] = set()
"""Folders, or files of the cache, that this process uses now and that only mptk removes."""


def removed_meanwhile(path: str) -> MptkError:
    """The error for a file or folder of mptk's that went while it was used."""
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
_MEMORY = re.compile(r"out of memory|(?:can't|cannot|failed to|unable to) allocate|not enough memory|bad_alloc", re.I)
_TOO_MANY = os.strerror(errno.EMFILE)
_DEVICE = re.compile(r"(CUDA|HIP|XPU|MPS)\b.*out of memory")
_AMOUNT = re.compile(r"(?:allocate|buffer of size) ([\d.]+)(?: ([KMGTP]iB))?", re.I)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def explain_errors() -> Iterator[None]:
    """Raise MptkError if a library reports that memory, disk space, open files or permissions are missing.

    So does an installed package that cannot be imported.
    """
    try:
        yield
    except Exception as error:
        found = None if isinstance(error, Exhausted) else find_exhaustion(error) or find_broken_package(error)
        if found is None:
            raise
        raise found from error


def find_exhaustion(error: BaseException) -> MptkError | None:
    """The message for an error about memory, disk, open files or permissions, also of its cause; None for any other.

    Libraries share no class for these errors: torch raises a RuntimeError, safetensors its own class.
    """
    cause: BaseException | None = error
    while cause is not None:
        number = _find_errno(cause)
        if number in _FILES or _TOO_MANY in str(cause):
            return Exhausted(NO_MORE_FILES)
        silent = not isinstance(error, MptkError)  # an MptkError knows what it could not write
        where = f" ({name})" if (name := getattr(cause, "filename", None)) else ""
        if number in _FULL and silent:
            return Exhausted(f"{_FULL[number]}{where}; free some space, or give a place on another disk")
        if number in _REFUSED and silent:
            return MptkError(f"{_REFUSED[number]}{where}; check the permissions of the files, or give another place")
        if silent and (gone := find_removed(cause)) is not None:
            return removed_meanwhile(gone)
        if isinstance(cause, MemoryError) or number == errno.ENOMEM or _is_memory_error(cause):
            return Exhausted(_describe_memory(str(cause)))
        cause = cause.__cause__
    return None


def find_broken_package(error: BaseException) -> MptkError | None:
    """The message for an installed package that failed while it was imported; None for any other error.

    A library behind it that is not there is an ImportError with the module's name, or an OSError of ctypes within it.
    """
    if not isinstance(error, ImportError | OSError) or isinstance(error, ModuleNotFoundError):
        return None
    names = [
        frame.f_globals.get("__name__", "")
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if _is_first_import(frame)
    ]
    names += [error.name or ""] if isinstance(error, ImportError) else []
    package = names[-1].partition(".")[0] if names else ""
    if package in ("", "__main__", "mptk", "passes"):
        return None
    return MptkError(
        f"the package {package} is installed, but does not import ({take_first_line(error)}); repair it, or uninstall "
        "it if "
        "you do not need it"
    )


def _is_first_import(frame: FrameType) -> bool:
    """Whether a frame is a module on its first import."""
    return frame.f_code.co_name == "<module>"


def find_removed(error: BaseException) -> str | None:
    """A file or folder of mptk's that an error names and that is no more there, though this process uses it."""
    said = str(error)
    for place in tuple(STAGED):
        if (at := said.find(place)) >= 0:
            name = re.split(r"[\s'\",:;]", said[at + len(place) :], maxsplit=1)[0]
            for path in (place, place + name):
                if not os.path.lexists(path):
                    return path
    return None


def _find_errno(error: BaseException) -> int | None:
    """The errno of an error; libraries written in Rust have it only in their text."""
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
