"""writing: names that users give as paths, and why a place cannot be written, in one line with a remedy."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mptk.errors import MptkError

_ROOM = "free some space, or give a place on another disk"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EROFS: "give a place that can be written",
    errno.EACCES: "check the rights of its folder, or give another place",
    errno.EPERM: "check the rights of its folder, or give another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "a part of its path is a file; give another place",
    errno.EISDIR: "a folder has this name; give another",
    errno.ELOOP: "it is a symbolic link; give the place that it leads to",
}


_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that only writing raises."""


def cannot_write(path: Path, error: OSError, remedy: str | None = None) -> MptkError:
    """The error of a file or folder that cannot be written, with the cause that the system names."""
    remedy = remedy or _REMEDIES.get(error.errno or 0, "check its folder, or give another place")
    return MptkError(f"cannot write {path}: {error.strerror or error}; {remedy}")


@contextlib.contextmanager
def writing(target: Path, staging: Path, remedy: str | None = None) -> Iterator[None]:
    """Within it, an OSError about ``target`` or its staging folder names the target, another one its own file.

    Raises:
        MptkError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        about = target if error.filename is None else Path(os.fsdecode(error.filename))
        if about.is_relative_to(staging) or about == target:
            raise cannot_write(target, error, remedy) from error
        if error.errno in _OF_WRITING:
            raise cannot_write(about, error) from error
        raise MptkError(f"{about}: {error.strerror or error}; check this file and its rights") from error


def check_text(name: str | Path) -> None:
    """Raise MptkError for a name that no report and no recipe could hold, as they are UTF-8."""
    try:
        str(name).encode()
    except UnicodeEncodeError as error:
        raise MptkError(f"the name {str(name)!r} is not UTF-8, which reports and recipes are; rename it") from error


def expand_path(name: str | Path) -> Path:
    """``name`` as a path, with ``~`` as a home. An unknown user's ``~name`` stays as it is, as in a shell."""
    return Path(os.path.expanduser(name))
