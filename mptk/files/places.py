"""places: folders that are held open, so that mptk works in the folder that it opened, whatever its path names by now;
and the marks by which mptk knows a folder that it made.

Whoever may write into a folder can rename what is in it, and plant a link under the old name. mptk therefore

- opens a folder that it empties, fills or renames once, and then names only what is in it (``dir_fd``);
- makes folders that only their owner can enter, so that nobody can exchange what is within;
- refuses to work where another user could exchange the folder itself (``check_way``). That is why libraries, which
  take paths, may be given paths within such a folder: no other user can lead them elsewhere. mptk still compares
  before it puts a result in its place, and before it removes anything (``OpenFolder.leads_here``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mptk.errors import MachineError

# Flags of open(2). O_CLOEXEC: no program that mptk starts gets the descriptor.
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# For a file in such a folder. O_NOFOLLOW: a planted link is refused. O_NONBLOCK: a planted pipe lets nobody wait.
PLAIN_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
# Members of this group are trusted like root.
ROOT_GROUP = 0


@dataclass(frozen=True)
class OpenFolder:
    """A folder held open. ``at``, ``own``: descriptors of its parent and of itself."""

    path: Path
    at: int
    own: int

    def leads_here(self) -> bool:
        """Whether the folder still has its name."""
        # A name can be given to another folder; device and inode cannot.
        try:
            return os.path.samestat(os.fstat(self.own), read_state_in(self.at, self.path.name))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        os.close(self.own)
        os.close(self.at)


@contextlib.contextmanager
def hold_open(path: str | Path, at: int | None = None) -> Iterator[int]:
    """Open a folder and give its descriptor. ``at``: its parent's descriptor; then no link is followed."""
    descriptor = os.open(path, FOLDER) if at is None else os.open(path, FOLDER | os.O_NOFOLLOW, dir_fd=at)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_state_in(at: int, name: str) -> os.stat_result:
    """The state of a name in a folder."""
    return os.stat(name, dir_fd=at, follow_symlinks=False)


def is_in(at: int, name: str) -> bool:
    """Whether a folder has something of that name."""
    try:
        read_state_in(at, name)
    except FileNotFoundError:
        return False
    return True


def is_own(state: os.stat_result) -> bool:
    """Whether this is the state of a folder of this user."""
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid()


def remove_tree(name: str, at: int) -> None:
    """Remove a file, a link or a folder from the folder ``at``. No link is followed."""
    if stat.S_ISDIR(read_state_in(at, name).st_mode):
        shutil.rmtree(name, dir_fd=at)
    else:
        os.unlink(name, dir_fd=at)


def check_way(folder: Path) -> None:
    """Raise MptkError if another user could exchange what is in ``folder``.

    They could if all users may rename in the folder or in one above it, or if a group may rename in the folder itself
    that is neither root's nor this user's own. Root and the owners of folders above could, too, but are trusted.
    """
    if (exposed := find_exposed(folder)) is not None:
        own = exposed.stat().st_uid == os.geteuid()
        remedy = f"take that right away (`chmod go-w {exposed}`)" if own else "give a place in a folder of your own"
        raise MachineError(
            f"{exposed} lets other users rename what is in it, so they could exchange files while they are written; "
            f"{remedy}",
            name=exposed,
        )


def find_exposed(folder: Path) -> Path | None:
    """The folder for which ``check_way`` refuses ``folder``; None if it accepts it."""
    whole = folder.resolve()
    for each in (whole, *whole.parents):
        try:
            state = each.stat()
        except FileNotFoundError:  # mptk makes it itself, in the next folder above that is checked here
            continue
        group = state.st_mode & stat.S_IWGRP and state.st_gid not in (os.getegid(), ROOT_GROUP)
        # Only the folder itself must be closed to groups: projects of a group commonly lie in one that is open to it.
        writable = state.st_mode & stat.S_IWOTH or (each == whole and group)
        # With the sticky bit, as /tmp has it, only its owner may rename what is in the folder.
        if writable and not state.st_mode & stat.S_ISVTX:
            return each
    return None


# ---- marks: a folder without one is the user's, whatever its name and its files ----
#
# A mark is a small file with a random token, the name and the inode number of its folder, and the SHA-256 of these with
# a word that only mptk has. So no other program writes a mark by chance, and the mark in a copy of a folder names
# another inode.

MARK_WORD = "a folder that mptk made, 1: 6f0e4bb7d3a94e0c8e5b"
# Marks have one size and are overwritten in place by one write: a process that is killed leaves the old or the new one.
MARK_BYTES = 4096


def write_mark(descriptor: int, folder: int, name: str, more: Mapping[str, object] | None = None) -> None:
    """Write the mark of a folder into an open file. ``more``: further fields, which the digest does not cover."""
    made = {"token": secrets.token_hex(16), "name": name, "folder": os.fstat(folder).st_ino}
    text = json.dumps({**made, "mark": _hash_mark(made), **(more or {})})
    os.pwrite(descriptor, text.encode().ljust(MARK_BYTES), 0)


def make_mark(folder: int, file: str, name: str) -> None:
    """Write the mark of a folder into a new file of it."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN_FILE, 0o600, dir_fd=folder)
    try:
        write_mark(descriptor, folder, name)
    finally:
        os.close(descriptor)


def read_mark(folder: int, file: str) -> dict[str, object]:
    """The fields of a folder's mark; empty if it has none, or one that another user or program wrote."""
    try:
        descriptor = os.open(file, os.O_RDONLY | PLAIN_FILE, dir_fd=folder)
    except OSError:
        return {}
    try:
        state = os.fstat(descriptor)  # of what was opened: the name may be another file's by now
        if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid():
            return {}
        found = json.loads(os.pread(descriptor, 2 * MARK_BYTES, 0))
        return found if isinstance(found, dict) and found.get("mark") == _hash_mark(found) else {}
    except (OSError, ValueError):
        return {}
    finally:
        os.close(descriptor)


def is_of(mark: Mapping[str, object], folder: int, name: str | None = None) -> bool:
    """Whether a mark is the folder's own. ``name``: the name that the mark must have, if any."""
    return mark.get("folder") == os.fstat(folder).st_ino and name in (None, mark.get("name"))


def _hash_mark(made: Mapping[str, object]) -> str:
    said = [MARK_WORD, *(str(made.get(key)) for key in ("token", "name", "folder"))]
    # A file's name may hold bytes that are not UTF-8.
    return hashlib.sha256("\0".join(said).encode(errors="surrogatepass")).hexdigest()
