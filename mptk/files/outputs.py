"""outputs: what may be written where: nothing that is read is replaced or changed, and no file that is not mptk's.

Files are compared by identity, as one file has many names: links, ``..``, another mount.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from mptk.errors import MptkError

PAGE_MARK = "mptk-page/1"
TABLE_MARK = "mptk-table/1"
PLOT_MARK = "mptk-plot/1"
GGUF_MARK = "mptk-gguf/1"
_PLOTS = rb"\x89PNG|%PDF|<\?xml"
_MARKS = {
    "JSON": re.compile(rb'\A\s*\{\s*"format":\s*"mptk-(advice|analysis|bench|eval|ops|rerun|shapes)/\d'),
    "plan": re.compile(rb'\A\s*\{\s*"format":\s*"mptk-plan/\d'),
    "page": re.compile(rb'\A<!doctype html>.*<meta name="generator" content="mptk-page/\d', re.S),
    "table": re.compile(rb"<!-- mptk-table/\d+ -->\s*\Z"),
    "plot": re.compile(rb"\A(" + _PLOTS + rb").*mptk-plot/\d", re.S),
    "graph": re.compile(rb"\A\x08.*mptk_version", re.S),
    "GGUF": re.compile(rb"\AGGUF.*general\.source\.writer.*mptk-gguf/\d", re.S),
}
"""Kind of a file that mptk writes → the mark that it has. Of JSON it is the first key: a user's collection of results
has it further within."""
_MARKED_BYTES = 1 << 16
"""Bytes at the beginning and at the end of a file in which its mark is: a PDF has it at the end."""


def check_apart(out: str | Path, *sources: str | Path, option: str = "--out") -> None:
    """Raise MptkError if ``out`` is read, holds what is read, or lies in a folder that is read.

    ``sources``: what is read; a name that is no file or folder (a model of the hub) is left out. ``option``: names
    ``out``.
    """
    path = expand_path(out)
    place = Path(os.path.realpath(path))
    there = _state(place)
    above = [state for folder in place.parents if (state := _state(folder)) is not None]
    for source in sources:
        read = expand_path(source)
        if (state := _state(read)) is None:
            continue
        if any(os.path.samestat(state, folder) for folder in above):
            raise MptkError(f"{out} lies in {source}, which is read; give another {option}")
        if there is not None and any(os.path.samestat(there, each) for each in _read_through(read, state)):
            raise MptkError(f"{source} is what is read, and {out} would replace it; give another {option}")


def check_file(file: str | Path, kind: str, overwrite: bool = False, option: str = "--out") -> None:
    """Raise MptkError if writing ``file`` would replace a file that mptk did not write, or follow a link.

    ``kind``: of what is written: a key of the marks. ``overwrite``: whether the user lets any file be replaced.
    """
    path = expand_path(file)
    if path.is_symlink():
        raise MptkError(f"{file} is a symbolic link; give the file that it leads to as {option}")
    state = _state(path)
    if overwrite or state is None or not stat.S_ISREG(state.st_mode) or not state.st_size:
        return
    if not _MARKS[kind].search(_ends(path)):
        raise MptkError(f"{file} exists, and mptk did not write it as a {kind}; give another {option}, or --overwrite")


def _read_through(path: Path, state: os.stat_result) -> Iterator[os.stat_result]:
    """What is read with a path, and the folders that hold it. In a folder, files may be links."""
    yield state
    for folder in Path(os.path.realpath(path)).parents:
        if (found := _state(folder)) is not None:
            yield found
    if stat.S_ISDIR(state.st_mode):
        with os.scandir(path) as entries:
            links = [entry.path for entry in entries if entry.is_symlink()]
        yield from (found for link in links if (found := _state(Path(link))) is not None)


def _state(path: Path) -> os.stat_result | None:
    """What the system says of a file; None if there is none."""
    try:
        return path.stat()
    except (OSError, ValueError):  # too long; a null character
        return None


def _ends(path: Path) -> bytes:
    """The first and the last bytes of a file; none if the user may not read it."""
    try:
        with path.open("rb") as file:
            found = file.read(_MARKED_BYTES)
            file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - _MARKED_BYTES))
            return found + file.read(_MARKED_BYTES)
    except OSError:
        return b""


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
