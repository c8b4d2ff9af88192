"""marks: by which mptk knows a folder that it made. What has none is the user's, whatever its name and its files.

A mark is a small file that holds a random token, the name and the number (inode) of the folder, and their SHA-256 with
a word that only mptk has: no other program writes one by chance. A copy of the folder has the mark of another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping

from mptk.files.places import PLAIN_FILE

MARK_WORD = "a folder that mptk made, 1: 6f0e4bb7d3a94e0c8e5b"
MARK_BYTES = 4096
"""Size of a mark. It is written again in place and at once, so that a killed process leaves the old or the new one."""


def write_mark(descriptor: int, folder: int, name: str, more: Mapping[str, object] | None = None) -> None:
    """Write the mark of a folder into an open file. ``more``: what else it says."""
    made = {"token": secrets.token_hex(16), "name": name, "folder": os.fstat(folder).st_ino}
    text = json.dumps({**made, "mark": _digest(made), **(more or {})})
    os.pwrite(descriptor, text.encode().ljust(MARK_BYTES), 0)


def make_mark(folder: int, file: str, name: str) -> None:
    """Write the mark of a folder into a new file of it."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN_FILE, 0o600, dir_fd=folder)
    try:
        write_mark(descriptor, folder, name)
    finally:
        os.close(descriptor)


def read_mark(folder: int, file: str) -> dict[str, object]:
    """What a folder's mark says; empty if it has none, or one that another user or program wrote."""
    try:
        descriptor = os.open(file, os.O_RDONLY | PLAIN_FILE, dir_fd=folder)
    except OSError:
        return {}
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid():
            return {}
        found = json.loads(os.pread(descriptor, 2 * MARK_BYTES, 0))
        return found if isinstance(found, dict) and found.get("mark") == _digest(found) else {}
    except (OSError, ValueError):
        return {}
    finally:
        os.close(descriptor)


def is_of(mark: Mapping[str, object], folder: int, name: str | None = None) -> bool:
    """Whether a mark is the folder's own. ``name``: the folder's, if it may have no other."""
    return mark.get("folder") == os.fstat(folder).st_ino and name in (None, mark.get("name"))


def _digest(made: Mapping[str, object]) -> str:
    said = [MARK_WORD, *(str(made.get(key)) for key in ("token", "name", "folder"))]
    return hashlib.sha256("\0".join(said).encode(errors="surrogatepass")).hexdigest()
