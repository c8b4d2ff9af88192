"""Errors that a user can act on."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from typing import Any, Self


class MptkError(Exception):
    """A user-facing error: ``cause; remedy`` in one line. The command line prints it and exits with 1.

    name: what it is about: a setting as in Python (``"sparsity"``), else a path, a module, an operator, a family, a
        file in a folder or a package; empty if it is about no single thing.
    nearest: what would work instead: the closest names, the nearest reachable budget or widths, the choices; it may be
        empty.
    """

    def __init__(self, message: str, *, name: object = "", nearest: Iterable[Any] = ()) -> None:
        super().__init__(message)
        self.name = str(name)
        self.nearest = tuple(nearest)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it in place of a traceback: its one line, as on the command line."""
        return [f"{type(self).__name__}: {self}"]

    @property
    def cause(self) -> str:
        """What is wrong: the sentence up to its first semicolon."""
        return str(self).partition(";")[0]

    @property
    def remedy(self) -> str:
        """What to do about it: the sentence after its first semicolon; empty if it has none."""
        return str(self).partition(";")[2].strip()

    def reword(self, message: str) -> Self:
        """An error of the same class, about the same thing, in another sentence: with a place in front, for example."""
        return type(self)(message, name=self.name, nearest=self.nearest)


class InputError(MptkError):
    """A setting, option or argument is wrong, or contradicts another: the caller gives another value."""


class KeywordError(InputError, TypeError):
    """A function has no such keyword: the caller gives one of ``nearest``. It is a TypeError, as of any function."""


class DataError(MptkError):
    """Samples, texts or inputs do not fit the model: the caller gives others."""


class FileError(MptkError):
    """A file or folder is missing, damaged or of another kind: the caller names or downloads another one."""


class PlanError(MptkError):
    """A plan is malformed or does not fit the model: its author mends it."""


class BudgetError(MptkError):
    """No legal widths reach the budget: the caller asks for what ``nearest`` has, or lets more be cut."""


class ModelError(MptkError):
    """mptk cannot open this model, run it or compare it: the caller gives another one, or mends its config or code."""


class TraceError(MptkError):
    """The model's code cannot be traced: its author writes the named place with tensors."""


class AnalysisError(MptkError):
    """Nothing can be cut at an operator, layer or family: the caller cuts others, or registers a rule for it."""


class TargetError(MptkError):
    """A class, ONNX or GGUF cannot hold this model or this cut: the caller chooses another target or other units."""


class ProofError(MptkError):
    """A result is wrong: mptk has a bug, or somebody changed a file. Nothing is published."""


class ChangedError(MptkError):
    """A file, a folder or a model in memory changed since mptk read or proved it: the caller restores it or starts
    again.
    """


class OutputError(MptkError):
    """What is to be written is in the way of something, in use or not writable: the caller gives another place."""


class MachineError(MptkError):
    """The machine lacks memory, disk space, open files, permissions or a device: its user provides them or asks for
    less.
    """


class PackageError(MptkError):
    """An installed package or plugin is missing, broken or collides with another: its user installs or removes it."""


def list_close_names(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The names in ``known`` that are like ``name``, the closest first; with a ``cutoff`` of 0, all of them."""
    names = list(known)
    return difflib.get_close_matches(name, names, n=max(1, len(names)), cutoff=cutoff)


def suggest_name(name: str, known: Iterable[str], otherwise: str) -> str:
    """``did you mean …?`` with the name in ``known`` that is closest to ``name``; ``otherwise`` if none is close."""
    close = list_close_names(name, known)
    return f"did you mean {close[0]!r}?" if close else otherwise


def take_first_line(error: BaseException) -> str:
    """The first line of an error's text, and the second if the first ends in a colon; without text, its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


# ---- what the machine lacks, or somebody took away ----

STAGED: set[str] = set()
"""Temporary folders and files of the cache that this process uses now. If one is missing, somebody else removed it."""


def make_removed_error(path: str) -> MptkError:
    """The error for a temporary file or folder that somebody removed while mptk used it."""
    return MachineError(
        f"{path} was removed while mptk used it, as cleaners of temporary files do; run again, with TMPDIR and "
        "MPTK_CACHE in folders that are not cleaned",
        name=path,
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
        found = None if isinstance(error, MachineError) else find_exhaustion(error) or find_broken_package(error)
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
            return MachineError(NO_MORE_FILES)
        silent = not isinstance(error, MptkError)  # an MptkError already says what could not be written
        name = getattr(cause, "filename", None) or ""
        where = f" ({name})" if name else ""
        if number in _FULL and silent:
            return MachineError(f"{_FULL[number]}{where}; free some space, or give a place on another disk", name=name)
        if number in _REFUSED and silent:
            return MachineError(
                f"{_REFUSED[number]}{where}; check the permissions of the files, or give another place", name=name
            )
        if silent and (gone := find_removed(cause)) is not None:
            return make_removed_error(gone)
        if isinstance(cause, MemoryError) or number == errno.ENOMEM or _is_memory_error(cause):
            return MachineError(_describe_memory(str(cause)))
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
    return PackageError(
        f"the package {package} is installed, but does not import ({take_first_line(error)}); repair it, or uninstall "
        "it if you do not need it",
        name=package,
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
