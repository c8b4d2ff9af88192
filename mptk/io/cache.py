"""cache: the folder of what mptk fetched, converted, measured or exported, which all processes share."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import platformdirs

from mptk.errors import STAGED, MachineError, MptkError
from mptk.files import (
    claim_place,
    discard,
    expand_path,
    format_json,
    make_write_error,
    name_write_errors,
    put_made,
    tidy,
    tidy_scratch,
    write_file,
)
from mptk.plain import hash_text
from mptk.publish.manifest import SETTLED, check_manifest, hash_file, identify_file, write_manifest
from mptk.reading import Json, make_damage_error, read_json_object

CACHE_REMEDY = "set MPTK_CACHE to a folder with room for it"
# Rights of a folder that only its owner can enter.
PRIVATE = 0o700
# Bytes of a file below which it is as quick to hash the file as to look its digest up.
HASHED_AT_ONCE = 1 << 20
# How deep below the cache folder something is written, and killed processes may have left something.
CACHE_DEPTH = 2


def cache_dir() -> Path:
    """The cache folder: ``MPTK_CACHE``, else the platform's user cache folder."""
    configured = os.environ.get("MPTK_CACHE")
    return expand_path(configured) if configured else platformdirs.user_cache_path("mptk")


def build_once(target: Path, build: Callable[[Path], None], mode: int | None = None) -> Path:
    """Let ``build`` make the file or folder ``target`` in the cache, unless it exists; return ``target``.

    ``build`` writes to a temporary path, which is then renamed, so ``target`` is complete or absent. Other processes
    that want the same target wait. ``mode``: its rights, if they are not the ordinary ones.

    Raises:
        MptkError: the cache folder cannot be written.
    """
    if not target.exists():
        with (
            claim_place(target, wait=True, remedy=CACHE_REMEDY) as staging,
            name_write_errors(target, staging.path, CACHE_REMEDY),
        ):
            # Another process may have made it while this one waited.
            if not target.exists():
                build(staging.folder / target.name)
                put_made(staging, target, mode)
    STAGED.add(str(target))  # if a cleaner removes it while it is in use, the error says so
    return target


def locate_private_folder(*names: str) -> Path:
    """Where a folder that no pinned hash protects lies in the cache. Users who share the cache have one each."""
    return cache_dir().joinpath(*names[:-1], f"{names[-1]}-{os.geteuid()}")


def build_private(folder: Path, build: Callable[[Path], None]) -> Path:
    """``build_once`` for a folder that no pinned hash protects: it is used only as this user made it.

    No other user can enter it. Its files are hashed before each use. A damaged folder is made anew.

    Raises:
        MptkError: as ``build_once``; or another user has put something in its place.
    """

    def build_listed(partial: Path) -> None:
        build(partial)
        write_manifest(partial)

    if os.path.lexists(folder) and not _is_as_made(folder):
        if folder.lstat().st_uid != os.geteuid():
            raise MachineError(f"{folder} belongs to another user; remove it, or {CACHE_REMEDY}", name=folder)
        # Checked again under the lock: another process may have made it anew meanwhile.
        with claim_place(folder, wait=True, remedy=CACHE_REMEDY), name_write_errors(folder, folder, CACHE_REMEDY):
            if os.path.lexists(folder) and not _is_as_made(folder):
                discard(folder)
    return build_once(folder, build_listed, PRIVATE)


def _is_as_made(folder: Path) -> bool:
    """Whether this user made a folder, no other can change it, and its files are as they were."""
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o777 != PRIVATE:
        return False
    try:
        check_manifest(folder)
    except MptkError:
        return False
    return True


def read_kept(file: Path) -> tuple[Json, str]:
    """The object in a JSON file of the cache that a run can do without, and what is wrong with the file.

    Both are empty if there is no file. The object is empty if nothing in it can be used.
    """
    if not os.path.lexists(file):
        return {}, ""
    try:
        return read_json_object(file, make_damage_error(file, "it is made again")), ""
    except MptkError as error:
        return {}, str(error)


def keep(file: Path, content: Json) -> str:
    """Write such a file. Returns why it cannot be written, or an empty text. A run goes on without it."""
    text = format_json(content, indent=1) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Not ``write_result``, which writes into a named pipe that somebody has put there. This replaces it.
        write_file(file, lambda new: new.write_text(text, encoding="utf-8"))
    except OSError as error:
        return str(make_write_error(file, error, CACHE_REMEDY))
    except MptkError as error:  # others can rename what is in the cache folder
        return str(error)
    return ""


def read_sha256(file: Path) -> str:
    """SHA-256 of a file. A large file is read once: its digest is kept in the cache, under the file's identity."""
    state = identify_file(file)
    if file.stat().st_size < HASHED_AT_ONCE:
        return hash_file(file)
    place = locate_private_folder("digests", hash_text(repr(state), 24))
    if _is_own(place) and (kept := read_kept(place)[0]).get("file") == list(state):
        return str(kept.get("sha256"))
    # Kept only if the file did not change while it was read, nor so shortly before that one more change could leave its
    # times as they are (``SETTLED``).
    now, found = time.time_ns(), hash_file(file)
    if identify_file(file) == state and now - max(state[-2:]) > SETTLED:
        keep(place, {"file": list(state), "sha256": found})
    return found


def _is_own(file: Path) -> bool:
    """Whether a file is there that only this user can have written."""
    try:
        state = file.lstat()
    except OSError:
        return False
    return stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid() and not state.st_mode & 0o022


def tidy_shared() -> None:
    """Remove what killed processes left in the cache folder and among the system's temporary files."""
    tidy_scratch()
    # Level by level: folders deeper than ``CACHE_DEPTH`` belong to whole entries, which may hold many files.
    folders = [cache_dir()]
    for _ in range(CACHE_DEPTH + 1):
        for folder in folders:
            tidy(folder)
        folders = [each for folder in folders for each in _list_folders(folder)]


def _list_folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
