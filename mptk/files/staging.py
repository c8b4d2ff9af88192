"""staging: hidden folders in which files are made before they get their names, each owned by a living process.

``.NAME.mptk`` stands beside what will be ``NAME``; ``.mptk-TOKEN`` holds anything else. Each has::

    mptk.lock   locked (flock) by its owner for as long as it lives; says who that is, and is the folder's mark
    new/        what is being made
    old/        what a replacement took away, where the system cannot exchange two folders

A lock that is free belongs to nobody: the process was killed. ``tidy`` removes such folders, if they have mptk's mark.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shlex
import socket
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from mptk.errors import NO_MORE_FILES, STAGED, MachineError, MptkError, OutputError, make_removed_error
from mptk.files.outputs import make_write_error
from mptk.files.places import (
    PLAIN_FILE,
    OpenFolder,
    check_way,
    hold_open,
    is_in,
    is_of,
    is_own,
    read_mark,
    read_state_in,
    remove_tree,
    write_mark,
)

LOCK = "mptk.lock"
NEW, OLD = "new", "old"
# What flock answers on a file system without locks.
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
# What opening a lock answers if there is none, or a folder, a link or a socket in its place.
_NO_LOCK_FILE = {errno.ENOENT, errno.EISDIR, errno.ELOOP, errno.ENXIO}
# What a rename answers if another file, or a folder that is not empty, has the name.
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
# Characters of a command in the line that names a lock's holder: the line stays readable, and the mark small.
COMMAND = 120
# Files that a process must still be able to open: removing a folder takes one for each level.
SPARE = 16
# How often a new folder may be removed before it has its lock, by another process that tidies in that moment.
TRIES = 100
# Seconds between two looks at a lock that another process has.
PAUSE = 0.05
_TOKEN = re.compile(r"\.mptk-[0-9a-f]{12}")


class Staging:
    """A staging folder that this process owns until ``close``, or until the object or the process ends.

    Make files in ``folder``, which has the rights of an ordinary folder. Only the owner can enter ``path``, around it.
    """

    def __init__(self, place: OpenFolder, lock: int) -> None:
        self.place, self.path, self.folder = place, place.path, place.path / NEW
        # A finalizer runs also if the object is forgotten, and when the interpreter ends.
        self._end = weakref.finalize(self, _close, place, lock, os.getpid())
        STAGED.add(str(self.path))
        self.renew()

    def renew(self) -> Path:
        """Empty the folder, and give it back. Raises MptkError as ``check``."""
        self.check()
        _clear_folder(self.place)
        os.mkdir(NEW, dir_fd=self.place.own)
        return self.folder

    def put(self, name: str, new_name: str | None = None) -> None:
        """Move ``name`` out of ``folder``, to its place beside the staging folder. Raises MptkError as ``check``."""
        self.check()
        os.replace(f"{NEW}/{name}", new_name or name, src_dir_fd=self.place.own, dst_dir_fd=self.place.at)

    def check(self) -> None:
        """Raise MptkError if the path no longer leads to the folder: what was written there went elsewhere."""
        if self.place.leads_here() and self._is_at_path():
            return
        # Without links it was removed, by a cleaner of temporary files. A library may have made its path again.
        if not os.fstat(self.place.own).st_nlink:
            raise make_removed_error(str(self.path))
        raise OutputError(
            f"{self.path} is no longer the folder that this process made: somebody put another in its place, which "
            "is left as it is; run again in a folder in which only you can write",
            name=self.path,
        )

    def _is_at_path(self) -> bool:
        """Whether the path, which libraries were given, leads here."""
        # The name in the parent is not enough: a folder above may have been exchanged, too.
        try:
            return os.path.samestat(os.fstat(self.place.own), self.path.lstat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def close(self) -> None:
        self._end()

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            # If the folder was exchanged or removed, an error in the block only follows from that, so say that instead.
            # A signal (not an Exception) goes through.
            if error is None or isinstance(error, Exception):
                self.check()
        finally:
            self.close()


def make_staging(parent: Path) -> Staging:
    """A new staging folder in ``parent``, which must be there. Raises MptkError as ``check_way``."""
    check_way(parent)
    return stage_openly(parent)


def stage_openly(parent: Path) -> Staging:
    """As ``make_staging``, also if others can rename what is in ``parent``. Then use only descriptors, no paths."""
    check_open_files()
    with hold_open(parent) as at:
        return Staging(*_make_hidden(at, parent))


def make_scratch() -> Staging:
    """A staging folder among the system's temporary files.

    Raises:
        MptkError: as ``check_scratch``; or the folder of these files was removed.
    """
    check_scratch()
    try:
        return stage_openly(Path(tempfile.gettempdir()))
    except FileNotFoundError as error:
        raise make_removed_error(tempfile.gettempdir()) from error


def check_scratch() -> None:
    """Raise MptkError if other users could exchange this user's temporary files."""
    try:
        check_way(Path(tempfile.gettempdir()))
    except MptkError as error:
        raise error.reword(f"{error.cause}; set TMPDIR to a folder of your own") from error


# ---- the staging folder of an output, which is also its lock ----

# Path → its staging folder, and the process and thread that have it. A fork inherits the table but owns nothing in it.
_held: dict[Path, tuple[Staging, int, int]] = {}


@contextlib.contextmanager
def claim_place(target: Path, *, wait: bool = False, remedy: str | None = None) -> Iterator[Staging]:
    """Let only this thread write ``target``, and give the staging folder beside it. Its folder is made if missing.

    What killed processes left beside it is removed first. A thread may claim again what it has.

    Args:
        wait: until its owner is done; if False, refuse.
        remedy: what to do if its folder cannot be written.

    Raises:
        MptkError: another process or thread, which is named, has it; or its folder cannot be written.
    """
    # All spellings of a path are one lock, so links in it are followed, but not its last part: that is refused if it is
    # a link.
    whole = Path(os.path.abspath(target))
    place = whole.parent.resolve() / whole.name
    own = _held.get(place)
    if own is not None and own[1:] == (os.getpid(), threading.get_ident()):
        yield own[0]
        return
    # Folders that are made for a run that fails are removed again; what holds something by then stays.
    missing = [folder for folder in place.parents if not folder.exists()]
    try:
        _make_folders(missing)
        tidy(place.parent)
        staging = _take_place(place, target, wait)
    except OSError as error:
        _remove_empty(missing)
        raise make_write_error(target, error, remedy) from error
    except MptkError:
        _remove_empty(missing)
        raise
    _held[place] = staging, os.getpid(), threading.get_ident()
    try:
        with staging:
            yield staging
    finally:
        del _held[place]
        _remove_empty(missing)


def _take_place(place: Path, said: Path, wait: bool) -> Staging:
    path = place.with_name(f".{place.name}.mptk")
    while (staging := take(path)) is None:
        owner = read_owner(path)
        # Without an owner somebody is tidying, which ends soon.
        if owner and not wait:
            raise OutputError(
                f"{said} is in use by process {owner['pid']} on {owner['host']} ({owner['command']}); "
                "wait until it is done, or give another place",
                name=said,
            )
        time.sleep(PAUSE)
    return staging


def _make_folders(missing: list[Path]) -> None:
    """Make folders, given from the innermost on. Only their owner can rename what will be in them."""
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError), hold_open(folder.parent) as at:
            os.mkdir(folder.name, 0o755, dir_fd=at)


def _remove_empty(folders: list[Path]) -> None:
    """Remove ``folders`` that are empty, from the innermost on."""
    with contextlib.suppress(OSError):
        for folder in folders:
            with hold_open(folder.parent) as at:
                os.rmdir(folder.name, dir_fd=at)


# ---- make, find and tidy staging folders ----


def take(path: Path) -> Staging | None:
    """The staging folder ``path``, made if missing; None if another process owns it or just removed it.

    Raises:
        PermissionError: it belongs to another user, or is not a folder.
        MptkError: mptk did not make it.
    """
    check_open_files()
    check_way(path.parent)
    with hold_open(path.parent) as at:
        # Nothing there: make a hidden folder and rename it, so that the name never stands without a lock and a mark.
        if not is_in(at, path.name):
            (place, held), named = _make_hidden(at, path.parent), False
            try:
                named = _rename_new(place, path.name)
            finally:
                if not named:
                    _close(place, held, os.getpid())
            return Staging(replace(place, path=path), held) if named else None
        # Something is there: it is ours to use only if this user made it, mptk marked it, and nobody holds its lock.
        if not is_own(read_state_in(at, path.name)):
            raise PermissionError(errno.EPERM, f"{path} is not your folder; remove it")
        with contextlib.suppress(FileNotFoundError), hold_open(path.name, at) as own:
            # The mark is read before the lock is taken. In the other order, an owner that removes the folder, its lock
            # last, would make it look like a folder of the user.
            marked = is_of(read_mark(own, LOCK), own)
            lock = _open_lock(own)
            if marked and lock is not None:
                os.fchmod(own, 0o700)  # as it was made: only its owner can enter
                write_mark(lock, own, "", describe_process())
                return Staging(OpenFolder(path, os.dup(at), os.dup(own)), lock)
            if lock is not None:
                os.close(lock)
            if not os.listdir(own):
                os.rmdir(path.name, dir_fd=at)  # nobody's, or its owner is about to do the same
            elif not marked and OpenFolder(path, at, own).leads_here():
                raise OutputError(
                    f"{path} has no mark that mptk made it, and files would be made there; rename or remove it, or "
                    "give another place",
                    name=path,
                )
    return None


def check_open_files() -> None:
    """Raise MachineError if this process cannot open ``SPARE`` more files.

    It could write a folder, but not remove it.
    """
    descriptors = list[int]()
    try:
        for _ in range(SPARE):
            descriptors.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        raise MachineError(NO_MORE_FILES) from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def tidy(parent: Path) -> None:
    """Remove what killed processes left in a folder, and put back an output that one of them was about to replace."""
    # Nobody asked for this, so it never fails: what cannot be read or removed stays.
    with contextlib.suppress(OSError, ValueError), hold_open(parent) as at:
        for name in os.listdir(at):
            if name.startswith(".mptk-") or (name[0] == "." and name.endswith(".mptk")):
                with contextlib.suppress(OSError):
                    if is_own(read_state_in(at, name)):
                        _remove_if_free(at, parent / name)


def tidy_scratch() -> None:
    """``tidy`` for the system's temporary files."""
    with contextlib.suppress(OSError):  # there is no such folder
        tidy(Path(tempfile.gettempdir()))


def describe_process() -> dict[str, object]:
    """Who this process is, for other processes that meet its lock."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": command[:COMMAND]}


def read_owner(path: Path) -> dict[str, object]:
    """The owner that a staging folder's lock names; empty if nobody has it, or a process that tidies."""
    with contextlib.suppress(OSError), hold_open(path.parent) as at, hold_open(path.name, at) as own:
        return _read_owner_mark(own)
    return {}


# ---- whose a folder is ----


def _make_hidden(at: int, parent: Path) -> tuple[OpenFolder, int]:
    """Make a hidden folder with a mark in the folder ``at``. Returns it and its lock, which this process holds."""
    for _ in range(TRIES):
        token = f".mptk-{secrets.token_hex(6)}"
        try:
            os.mkdir(token, 0o700, dir_fd=at)
        except FileExistsError:
            continue
        try:
            # FileNotFoundError: another process tidied the folder away, as it had no lock yet. Try again.
            with contextlib.suppress(FileNotFoundError), hold_open(token, at) as own:
                if not is_own(os.fstat(own)) or os.listdir(own):  # somebody put another in its place
                    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(parent))
                if (lock := _open_lock(own, create=True)) is not None:
                    write_mark(lock, own, "", describe_process())
                    return OpenFolder(parent / token, os.dup(at), os.dup(own)), lock
        except OSError:
            # Without a mark no later ``tidy`` would dare to remove it.
            with contextlib.suppress(OSError):
                _discard_new(token, at)
            raise
    raise FileNotFoundError(errno.ENOENT, "somebody removes each folder that is made there", str(parent))


def _discard_new(token: str, at: int) -> None:
    """Remove a new hidden folder that could not get its lock and its mark."""
    with hold_open(token, at) as own, contextlib.suppress(FileNotFoundError):
        if os.listdir(own) == [LOCK] and not read_mark(own, LOCK):
            os.unlink(LOCK, dir_fd=own)
    os.rmdir(token, dir_fd=at)


def _rename_new(place: OpenFolder, name: str) -> bool:
    """Give a hidden folder a name, unless a file or a folder with something in it has that; returns whether it did."""
    try:
        os.rename(place.path.name, name, src_dir_fd=place.at, dst_dir_fd=place.at)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        return False
    return True


def _open_lock(folder: int, *, create: bool = False) -> int | None:
    """The descriptor of a folder's lock, if this process gets it and the folder was not removed meanwhile."""
    try:
        descriptor = os.open(LOCK, os.O_RDWR | PLAIN_FILE | (os.O_CREAT if create else 0), 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno in _NO_LOCK_FILE:
            return None
        raise
    with contextlib.suppress(FileNotFoundError):
        # Between opening and locking, the owner may have removed the file and another process made a new one. A lock on
        # the removed file would exclude nobody.
        if _try_lock(descriptor, folder) and os.path.samestat(os.fstat(descriptor), read_state_in(folder, LOCK)):
            return descriptor
    os.close(descriptor)
    return None


def _try_lock(descriptor: int, folder: int) -> bool:
    """Take the lock if it is free. On a file system without locks, it is free if its owner is dead."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _is_alive(_read_owner_mark(folder))
    return True


def _read_owner_mark(folder: int) -> dict[str, object]:
    """The owner that a folder's mark names; empty if it names none."""
    found = read_mark(folder, LOCK)
    try:
        return {"pid": int(str(found["pid"])), "host": str(found["host"]), "command": str(found["command"])}
    except (ValueError, KeyError):
        return {}


def _is_alive(owner: Mapping[str, object]) -> bool:
    """Whether an owner may still be at work."""
    if not owner or owner["host"] != socket.gethostname():
        return bool(owner)  # an owner on another machine cannot be asked, so it counts as alive
    try:
        os.kill(int(str(owner["pid"])), 0)  # signal 0 only asks whether there is such a process
    except ProcessLookupError:
        return False
    except PermissionError:  # there is, of another user
        return True
    return True


# ---- the end of a folder ----


def _remove_if_free(at: int, path: Path) -> None:
    with hold_open(path.name, at) as own:
        marked = is_of(read_mark(own, LOCK), own)  # before the lock: see ``take``
        if not is_in(own, LOCK):
            # Its owner was killed before it made the lock. If it holds anything, it is not mptk's, and rmdir fails.
            os.rmdir(path.name, dir_fd=at)
        elif (lock := _open_lock(own)) is not None:
            try:
                if marked:
                    # The mark no longer names an owner: whoever meets the lock now waits and does not give up.
                    write_mark(lock, own, "")
                    _remove(OpenFolder(path, at, own))
                elif _TOKEN.fullmatch(path.name) and not os.fstat(lock).st_size and os.listdir(own) == [LOCK]:
                    # Its owner was killed after it made the lock and before it wrote the mark.
                    os.unlink(LOCK, dir_fd=own)
                    os.rmdir(path.name, dir_fd=at)
            finally:
                os.close(lock)


def _close(place: OpenFolder, lock: int, owner: int) -> None:
    if os.getpid() != owner:  # a fork has a copy of the finalizer, and the folder is still in use
        return
    try:
        _remove(place)
    finally:
        STAGED.discard(str(place.path))
        os.close(lock)
        place.close()


def _remove(place: OpenFolder) -> None:
    """Remove a folder of this process. A signal that comes meanwhile stops the process only afterwards."""
    try:
        _remove_folder(place)
    except BaseException:  # the handler of a signal raised it; what it interrupted is done again
        _remove_folder(place)
        raise


def _remove_folder(place: OpenFolder) -> None:
    # The lock goes last: if the process is killed on the way, what is left still has the mark.
    with contextlib.suppress(OSError):
        _clear_folder(place)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(LOCK, dir_fd=place.own)
        if place.leads_here():
            os.rmdir(place.path.name, dir_fd=place.at)


def _clear_folder(place: OpenFolder) -> None:
    """Remove everything but the lock."""
    name = place.path.name
    # A process that was killed between the two renames of ``put_folder`` left the earlier output here: put it back.
    # Hidden folders with a token replace nothing.
    target = "" if name.startswith(".mptk-") else name.removeprefix(".").removesuffix(".mptk")
    if target and is_in(place.own, OLD) and not is_in(place.at, target):
        os.rename(OLD, target, src_dir_fd=place.own, dst_dir_fd=place.at)
    for each in os.listdir(place.own):
        if each != LOCK:
            remove_tree(each, place.own)
