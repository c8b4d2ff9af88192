"""places: folders that are held open, so that what is done in them is done in them, whatever stands under their path.

Whoever may write into a folder can rename what is in it, and plant a link under the old name. mptk therefore

- opens a folder that it empties, fills or renames once, and then names only what is in it (``dir_fd``);
- makes folders that only their owner can enter, so that nobody can exchange what is within;
- refuses to work where another user could exchange the folder itself (``check_way``). That is why libraries, which
  take paths, may be given paths within such a folder: no other user can lead them elsewhere. mptk still compares
  before it puts a result in its place, and before it removes anything (``OpenFolder.leads_here``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mptk.errors import MptkError

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
PLAIN_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""For a file in such a folder: no link is followed, and a pipe does not let the process wait."""
ROOT_GROUP = 0
"""Who is in this group is as good as root."""


@dataclass(frozen=True)
class OpenFolder:
    """A folder held open. ``at``, ``own``: descriptors of its parent and of itself."""

    path: Path
    at: int
    own: int

    def leads_here(self) -> bool:
        """Whether the folder still has its name."""
        try:
            return os.path.samestat(os.fstat(self.own), lstat_in(self.at, self.path.name))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        os.close(self.own)
        os.close(self.at)


@contextlib.contextmanager
def hold_open(path: str | Path, at: int | None = None) -> Iterator[int]:
    """The descriptor of a folder, within it. ``at``: of its parent, in which no link is followed."""
    descriptor = os.open(path, FOLDER) if at is None else os.open(path, FOLDER | os.O_NOFOLLOW, dir_fd=at)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lstat_in(at: int, name: str) -> os.stat_result:
    """The state of a name in a folder."""
    return os.stat(name, dir_fd=at, follow_symlinks=False)


def lies_in(at: int, name: str) -> bool:
    """Whether a folder has something of that name."""
    try:
        lstat_in(at, name)
    except FileNotFoundError:
        return False
    return True


def is_own(state: os.stat_result) -> bool:
    """Whether it is a folder of this user."""
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid()


def remove_tree(name: str, at: int) -> None:
    """Remove a file, a link or a folder from the folder ``at``. No link is followed."""
    if stat.S_ISDIR(lstat_in(at, name).st_mode):
        shutil.rmtree(name, dir_fd=at)
    else:
        os.unlink(name, dir_fd=at)


def check_way(folder: Path) -> None:
    """Raise MptkError if another user could put something else in the place of what is in ``folder``.

    That is a folder, or one of those above it, in which all users may rename, or a folder in which a group may that is
    neither root's nor this user's own. Owners of folders above and root can, and are trusted.
    """
    if (exposed := find_exposed(folder)) is not None:
        own = exposed.stat().st_uid == os.geteuid()
        remedy = f"take that right away (`chmod go-w {exposed}`)" if own else "give a place in a folder of your own"
        raise MptkError(
            f"{exposed} lets other users rename what is in it, so they could exchange files while they are written; "
            f"{remedy}"
        )


def find_exposed(folder: Path) -> Path | None:
    """The folder because of which ``check_way`` refuses one; None if it does not."""
    whole = folder.resolve()
    for each in (whole, *whole.parents):
        try:
            state = each.stat()
        except FileNotFoundError:  # it is made by this process
            continue
        group = state.st_mode & stat.S_IWGRP and state.st_gid not in (os.getegid(), ROOT_GROUP)
        # Only the folder itself must be closed to groups: projects of a group commonly lie in one that is open to it.
        writable = state.st_mode & stat.S_IWOTH or (each == whole and group)
        if writable and not state.st_mode & stat.S_ISVTX:
            return each
    return None
