"""outputs: what may be written where, and why a place cannot be written.

Nothing that is read is replaced or changed, and no file that mptk did not write. Files are compared by identity, since
one file has many names: links, ``..``, another mount.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from mptk.errors import FileError, InputError, MptkError, OutputError

PAGE_MARK = "mptk-page/1"
TABLE_MARK = "mptk-table/1"
PLOT_MARK = "mptk-plot/1"
GGUF_MARK = "mptk-gguf/1"
_PLOTS = rb"\x89PNG|%PDF|<\?xml"
# Kind of file → the mark that mptk's own files of it have.
_MARKS = {
    # The first key: a user's collection of results has the same key further in, and is not mptk's.
    "JSON": re.compile(rb'\A\s*\{\s*"format":\s*"mptk-(advice|analysis|bench|eval|ops|rerun|shapes)/\d'),
    "plan": re.compile(rb'\A\s*\{\s*"format":\s*"mptk-plan/\d'),
    "page": re.compile(rb'\A<!doctype html>.*<meta name="generator" content="mptk-page/\d', re.S),
    "table": re.compile(rb"<!-- mptk-table/\d+ -->\s*\Z"),
    "plot": re.compile(rb"\A(" + _PLOTS + rb").*mptk-plot/\d", re.S),
    "graph": re.compile(rb"\A\x08.*mptk_version", re.S),
    "GGUF": re.compile(rb"\AGGUF.*general\.source\.writer.*mptk-gguf/\d", re.S),
}
# Bytes at each end of a file in which its mark is looked for. A PDF has its mark at the end, and files may be large.
_MARKED_BYTES = 1 << 16


def check_apart(out: str | Path, *sources: str | Path, option: str = "--out") -> None:
    """Raise MptkError if ``out`` is read, holds what is read, or lies in a folder that is read.

    ``sources``: what is read; names that are not there (a model of the hub) are left out. ``option``: names ``out``.
    """
    path = expand_path(out)
    # Links are followed before places are compared. ``out`` may not exist yet, so the folders above it count.
    place = Path(os.path.realpath(path))
    there = _state(place)
    above = [state for folder in place.parents if (state := _state(folder)) is not None]
    for source in sources:
        read = expand_path(source)
        if (state := _state(read)) is None:
            continue
        if any(os.path.samestat(state, folder) for folder in above):
            raise OutputError(f"{out} lies in {source}, which is read; give another {option}", name=out)
        if there is not None and any(os.path.samestat(there, each) for each in _read_through(read, state)):
            raise OutputError(f"{source} is what is read, and {out} would replace it; give another {option}", name=out)


def check_file(file: str | Path, kind: str, overwrite: bool = False, option: str = "--out") -> None:
    """Raise MptkError if writing ``file`` would replace a file that mptk did not write, or follow a link.

    ``kind``: a key of ``_MARKS``. ``overwrite``: whether the user lets any file be replaced.
    """
    path = expand_path(file)
    if path.is_symlink():
        raise OutputError(f"{file} is a symbolic link; give the file that it leads to as {option}", name=file)
    state = _state(path)
    # Nothing is lost with an empty file, and a device or a pipe is written to, not replaced.
    if overwrite or state is None or not stat.S_ISREG(state.st_mode) or not state.st_size:
        return
    if not _MARKS[kind].search(_read_ends(path)):
        raise OutputError(
            f"{file} exists, and mptk did not write it as a {kind}; give another {option}, or --overwrite", name=file
        )


def _read_through(path: Path, state: os.stat_result) -> Iterator[os.stat_result]:
    """The states of what is read with a path: itself, the folders above it, and what the links in a folder lead to.

    Snapshots in the hub's cache are such folders: their files are links to blobs elsewhere.
    """
    yield state
    for folder in Path(os.path.realpath(path)).parents:
        if (found := _state(folder)) is not None:
            yield found
    if stat.S_ISDIR(state.st_mode):
        with os.scandir(path) as entries:
            links = [entry.path for entry in entries if entry.is_symlink()]
        yield from (found for link in links if (found := _state(Path(link))) is not None)


def _state(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):  # too long; a null character
        return None


def _read_ends(path: Path) -> bytes:
    """The first and the last bytes of a file; none if the user may not read it."""
    try:
        with path.open("rb") as file:
            found = file.read(_MARKED_BYTES)
            # The end begins where the beginning ended, at the earliest: no byte counts twice.
            file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - _MARKED_BYTES))
            return found + file.read(_MARKED_BYTES)
    except OSError:
        return b""


# ---- why a place cannot be written ----

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
# Only writing raises these, so a file that they name was written, not read.
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def make_write_error(path: Path, error: OSError, remedy: str | None = None) -> MptkError:
    """The error of a file or folder that cannot be written, with the cause that the system names."""
    remedy = remedy or _REMEDIES.get(error.errno or 0, "check its folder, or give another place")
    return OutputError(f"cannot write {path}: {error.strerror or error}; {remedy}", name=path)


@contextlib.contextmanager
def name_write_errors(target: Path, staging: Path, remedy: str | None = None) -> Iterator[None]:
    """Turn each OSError into an MptkError: about ``target`` if it is of that or of ``staging``, else about its file."""
    try:
        yield
    except OSError as error:
        # The user knows the target and not the hidden folder beside it.
        about = target if error.filename is None else Path(os.fsdecode(error.filename))
        if about.is_relative_to(staging) or about == target:
            raise make_write_error(target, error, remedy) from error
        if error.errno in _OF_WRITING:
            raise make_write_error(about, error) from error
        raise FileError(f"{about}: {error.strerror or error}; check this file and its rights", name=about) from error


def check_text(name: str | Path) -> None:
    """Raise MptkError for a name that is not UTF-8: no report and no recipe could hold it."""
    try:
        str(name).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the name {str(name)!r} is not UTF-8, which reports and recipes are; rename it", name=name
        ) from error


def expand_path(name: str | Path) -> Path:
    """``name`` as a path, with ``~`` as a home. An unknown user's ``~name`` stays as it is, as in a shell."""
    # Not Path.expanduser, which raises an error for an unknown user.
    return Path(os.path.expanduser(name))
