"""staging: hidden folders in which files are made before they get their names, each owned by a living process.

``.NAME.mptk`` stands beside what will be ``NAME``; ``.mptk-TOKEN`` holds anything else. Each has::

    mptk.lock   locked (flock) by its owner for as long as it lives; says who that is
    new/        what is being made
    old/        what a replacement took away, where the system cannot exchange two folders

A lock that is free belongs to nobody: the process was killed. ``tidy`` removes such folders.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shlex
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from mptk.errors import NO_MORE_FILES, Exhausted, MptkError
from mptk.files.writing import cannot_write

LOCK = "mptk.lock"
NEW, OLD = "new", "old"
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
COMMAND = 120
"""Most characters of a command that the line on a holder shows."""
SPARE = 16
"""Files that a process must still be able to open: removing a folder takes one for each level."""


class Staging:
    """A staging folder that this process owns until ``close``, or until the object or the process ends.

    ``folder`` is for what is made, and has the rights of an ordinary folder. ``path`` is only for its owner.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.folder = path, path / NEW
        self._end = weakref.finalize(self, _close, path, descriptor, os.getpid())
        _write(descriptor, holder())
        self.renew()

    def renew(self) -> Path:
        """Empty the folder, and give it back."""
        _empty(self.path)
        self.folder.mkdir()
        return self.folder

    def close(self) -> None:
        """Remove it."""
        self._end()

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def staged(parent: Path) -> Staging:
    """A new staging folder in ``parent``, which must be there."""
    while True:
        path = parent / f".mptk-{secrets.token_hex(6)}"
        if (staging := take(path)) is not None:
            return staging


def scratch() -> Staging:
    """A staging folder among the system's temporary files."""
    return staged(Path(tempfile.gettempdir()))


def take(path: Path) -> Staging | None:
    """The staging folder ``path``, made if missing; None if another process owns it or just removed it.

    Raises:
        PermissionError: it belongs to another user, or is not a folder.
        Exhausted: see ``check_open_files``.
    """
    check_open_files()
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        try:
            mine = _own(path)
        except FileNotFoundError:
            return None
        if not mine:
            raise PermissionError(errno.EPERM, f"{path} is not your folder; remove it") from None
    try:
        descriptor = _locked(path, create=True)
    except OSError:
        with contextlib.suppress(OSError):
            path.rmdir()  # it has no lock yet, so nobody would know whose it is
        raise
    return None if descriptor is None else Staging(path, descriptor)


def check_open_files() -> None:
    """Raise Exhausted if this process cannot open ``SPARE`` more files: it could write a folder, but not remove it."""
    opened = list[int]()
    try:
        for _ in range(SPARE):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        raise Exhausted(NO_MORE_FILES) from error
    finally:
        for descriptor in opened:
            os.close(descriptor)


def tidy(parent: Path) -> None:
    """Remove what killed processes left in a folder, and put back an output that one of them was about to replace."""
    with contextlib.suppress(OSError, ValueError):
        for path in _stagings(parent):
            with contextlib.suppress(OSError):
                if _own(path):
                    _remove_if_free(path)


def tidy_scratch() -> None:
    """``tidy`` for the system's temporary files."""
    with contextlib.suppress(OSError):  # there is no such folder
        tidy(Path(tempfile.gettempdir()))


def holder() -> str:
    """Who this process is, for other processes that meet its lock."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "command": command[:COMMAND]})


def held_by(path: Path) -> dict[str, object]:
    """What the lock of a staging folder says of its owner; empty while nobody, or somebody who tidies, has it."""
    try:
        with open(path / LOCK, encoding="utf-8") as file:
            found = json.loads(file.read(4096))
        return {"pid": int(found["pid"]), "host": str(found["host"]), "command": str(found["command"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a folder. No link is followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- whose a folder is ----


def _stagings(parent: Path) -> Iterator[Path]:
    with os.scandir(parent) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return (parent / name for name in names if name.startswith(".mptk-") or (name[0] == "." and name.endswith(".mptk")))


def _own(path: Path) -> bool:
    state = path.lstat()
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid()


def _locked(path: Path, *, create: bool) -> int | None:
    """The descriptor of the folder's lock, if this process gets it and the folder was not removed meanwhile."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(path / LOCK, flags, 0o600)
    except FileNotFoundError:
        return None
    with contextlib.suppress(FileNotFoundError):
        if _gets(descriptor, path) and os.path.samestat(os.fstat(descriptor), (path / LOCK).lstat()):
            return descriptor
    os.close(descriptor)
    return None


def _gets(descriptor: int, path: Path) -> bool:
    """Whether the lock is free, and then this process has it. Where the system has no locks, a dead owner's is free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _lives(held_by(path))
    return True


def _lives(owner: dict[str, Any]) -> bool:
    """Whether an owner may still be at work. One on another machine may."""
    if not owner or owner["host"] != socket.gethostname():
        return bool(owner)
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ---- the end of a folder ----


def _remove_if_free(path: Path) -> None:
    descriptor = _locked(path, create=False)
    if descriptor is None:
        path.rmdir()  # only one whose owner was killed before it had a lock is empty
    else:
        _write(descriptor, "")
        _close(path, descriptor, os.getpid())


def _close(path: Path, descriptor: int, owner: int) -> None:
    """Remove a folder of this process, and only then let a signal that came meanwhile stop it."""
    if os.getpid() != owner:  # a fork of it
        return
    try:
        _removed(path)
    except BaseException:
        _removed(path)
        raise
    finally:
        os.close(descriptor)


def _removed(path: Path) -> None:
    """Remove a folder. Its lock goes last, so that what is left is never taken for another's."""
    with contextlib.suppress(OSError):
        _empty(path)
        (path / LOCK).unlink(missing_ok=True)
        path.rmdir()


def _empty(path: Path) -> None:
    """Remove everything but the lock. What a replacement took away, and did not replace, goes back first."""
    if path.name.startswith(".mptk-"):
        target = None
    else:
        target = path.with_name(path.name.removeprefix(".").removesuffix(".mptk"))
    if target is not None and (path / OLD).exists() and not os.path.lexists(target):
        os.rename(path / OLD, target)
    for name in os.listdir(path):
        if name != LOCK:
            remove_tree(path / name)


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


PAUSE = 0.05
"""Seconds between two looks at a lock."""

_held: dict[Path, tuple[Staging, int, int]] = {}
"""Path → its staging folder, and the process and thread that have it."""


@contextlib.contextmanager
def claimed(target: Path, *, wait: bool = False, remedy: str | None = None) -> Iterator[Staging]:
    """Within it ``target`` is this thread's to write, in the staging folder beside it. Its folder is made if missing.

    What killed processes left beside it is removed first. A thread may claim again what it has.

    Args:
        wait: until its owner is done.
        remedy: for a folder that cannot be written.

    Raises:
        MptkError: another process or thread has it, which is named, and ``wait`` is False; or its folder cannot be
            written.
    """
    whole = Path(os.path.abspath(target))
    place = whole.parent.resolve() / whole.name
    own = _held.get(place)
    if own is not None and own[1:] == (os.getpid(), threading.get_ident()):
        yield own[0]
        return
    missing = [folder for folder in place.parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        tidy(place.parent)
        staging = _taken(place, target, wait)
    except OSError as error:
        _remove_empty(missing)
        raise cannot_write(target, error, remedy) from error
    _held[place] = staging, os.getpid(), threading.get_ident()
    try:
        yield staging
    finally:
        del _held[place]
        staging.close()
        _remove_empty(missing)


def _taken(place: Path, said: Path, wait: bool) -> Staging:
    """The staging folder of ``place``."""
    path = place.with_name(f".{place.name}.mptk")
    while (staging := take(path)) is None:
        owner = held_by(path)
        if owner and not wait:
            raise MptkError(
                f"{said} is in use by process {owner['pid']} on {owner['host']} ({owner['command']}); "
                "wait until it is done, or give another place"
            )
        time.sleep(PAUSE)
    return staging


def _remove_empty(folders: list[Path]) -> None:
    """Remove ``folders`` that are empty, from the innermost on."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
