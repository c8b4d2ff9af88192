"""replace: files and folders get their names when they are complete; what was there before goes at that moment."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from mptk.errors import MptkError
from mptk.files.staging import OLD, Staging, staged, tidy
from mptk.files.writing import cannot_write

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path, then rename the file to ``path``.

    If ``write`` fails, ``path`` stays as it was. Several processes may write the same path. A link at ``path`` is
    replaced, not followed.

    Raises:
        OSError: the file cannot be renamed. Errors of ``write`` pass through.
    """
    with staged(path.parent) as staging:
        temporary = staging.folder / path.name
        write(temporary)
        ordinary(staging.folder)
        os.replace(temporary, path)


@contextlib.contextmanager
def write_together(folder: Path, *names: str) -> Iterator[Path]:
    """A temporary folder for the files ``names``. If nothing fails, they move to ``folder`` in this order.

    Name a file last if it refers to the others. Other files in ``folder`` stay.
    """
    tidy(folder)
    with staged(folder) as staging:
        yield staging.folder
        ordinary(staging.folder)
        for name in names:
            os.replace(staging.folder / name, folder / name)


def put_folder(staging: Staging, target: Path, kept: Iterable[str] = ()) -> None:
    """Give the staging folder's ``new`` the name ``target``; an earlier folder of that name is removed.

    ``kept``: files and folders in the earlier one that stay as and where they are.

    At every moment the one or the other is there, if the system can exchange two names at once. Else the earlier one
    is kept aside, and ``tidy`` puts it back.
    """
    ordinary(staging.folder)
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))
    for name in kept:
        _carry(target / name, staging.folder / name)
    if not target.exists() or not any(target.iterdir()):
        os.rename(staging.folder, target)
    elif not _exchanged(staging.folder, target):
        os.rename(target, staging.path / OLD)
        try:
            os.rename(staging.folder, target)
        except OSError:
            os.rename(staging.path / OLD, target)
            raise
    with contextlib.suppress(OSError):  # what is left of the earlier one is no reason to fail
        staging.renew()


def put_made(staging: Staging, target: Path, mode: int | None = None) -> None:
    """Move the one file or folder that was made in the staging folder to ``target``, which does not exist yet.

    ``mode``: its rights, if they are not the ordinary ones.
    """
    ordinary(staging.folder)
    if mode is not None:
        (staging.folder / target.name).chmod(mode)
    os.rename(staging.folder / target.name, target)


def fill_folder(folder: Path, source: Path) -> None:
    """Fill an empty folder with links to the files of another one, or with copies where there can be no links."""
    shutil.copytree(source, folder, symlinks=True, dirs_exist_ok=True, copy_function=_link)


def discard(folder: Path) -> None:
    """Remove a folder, from one moment to the next: no half of it stays under its name."""
    with staged(folder.parent) as staging:
        os.rename(folder, staging.folder / folder.name)


def ordinary(folder: Path) -> None:
    """Give everything in a folder the rights that the user's umask leaves, which are the folder's own.

    Libraries that write through temporary files make them private.
    """
    wanted = stat.S_IMODE(folder.stat().st_mode) & 0o777
    for at, folders, files in os.walk(folder):
        for names, mode in ((folders, wanted), (files, wanted & 0o666)):
            for name in names:
                path = os.path.join(at, name)
                state = os.lstat(path)
                linked = stat.S_ISREG(state.st_mode) and state.st_nlink > 1  # to what had its rights before
                if not linked and not stat.S_ISLNK(state.st_mode) and state.st_mode & 0o777 != mode:
                    os.chmod(path, mode)


def _carry(source: Path, place: Path) -> None:
    """Put a link to a file, or a folder of links, at a new path; copies if the file system has no links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(place):
        raise MptkError(f"{source} is not mptk's, and the new result has that name, too; move it, and run again")
    if source.is_symlink():
        place.symlink_to(source.readlink())
    elif source.is_dir():
        place.mkdir()
        fill_folder(place, source)
    else:
        _link(str(source), str(place))


def _exchanged(one: Path, two: Path) -> bool:
    """Exchange two names at once. False if the kernel or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if not call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(two))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def json_text(
    content: object,
    *,
    indent: int | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = True,
    separators: tuple[str, str] | None = None,
) -> str:
    """``content`` as JSON. NaN and infinity become null, since JSON has neither. Options as in ``json.dumps``."""
    return json.dumps(
        _finite(content),
        allow_nan=False,
        indent=indent,
        sort_keys=sort_keys,
        ensure_ascii=ensure_ascii,
        separators=separators,
    )


def write_json(path: Path | None, content: object) -> None:
    """Write a result as JSON; nothing if ``path`` is None."""
    if path is not None:
        write_text(path, json_text(content, indent=1) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a file in UTF-8. Otherwise as ``write_result``."""
    write_result(path, lambda file: file.write_text(content, encoding="utf-8"))


def write_result(path: Path, write: Callable[[Path], object]) -> None:
    """As ``write_file``, for a path that a user named. Its folder is made if missing; a device is written as it is.

    Raises:
        MptkError: it cannot be written, or is a symbolic link.
    """
    try:
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            write(path)
        else:
            write_file(path, write)
    except OSError as error:
        raise cannot_write(path, error) from error


def _finite(content: object) -> object:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content
