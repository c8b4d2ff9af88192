"""cache: the folder of what mptk fetched, converted, measured or exported, which all processes share."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import platformdirs

from mptk.errors import STAGED, MptkError
from mptk.files import claimed, discard, path_of, put_made, tidy, tidy_scratch, writing
from mptk.publish.manifest import check_manifest, write_manifest

CACHE_REMEDY = "set MPTK_CACHE to a folder with room for it"
PRIVATE = 0o700
"""Rights of a folder that only its owner can enter."""
CACHE_DEPTH = 2
"""Folders below the cache folder in which something is written."""


def cache_dir() -> Path:
    """The cache folder: ``MPTK_CACHE``, else the platform's user cache folder."""
    configured = os.environ.get("MPTK_CACHE")
    return path_of(configured) if configured else platformdirs.user_cache_path("mptk")


def build_once(target: Path, build: Callable[[Path], None], mode: int | None = None) -> Path:
    """Let ``build`` make the file or folder ``target`` in the cache, unless it exists; return ``target``.

    ``build`` writes to a temporary path, which is then renamed, so ``target`` is complete or absent. Other processes
    that want the same target wait. ``mode``: its rights, if they are not the ordinary ones.

    Raises:
        MptkError: the cache folder cannot be written.
    """
    if not target.exists():
        with claimed(target, wait=True, remedy=CACHE_REMEDY) as staging, writing(target, staging.path, CACHE_REMEDY):
            if not target.exists():
                build(staging.folder / target.name)
                put_made(staging, target, mode)
    STAGED.add(str(target))
    return target


def private_place(*names: str) -> Path:
    """Where a folder that nothing pins from outside lies in the cache. Users who share it have one each."""
    return cache_dir().joinpath(*names[:-1], f"{names[-1]}-{os.geteuid()}")


def build_private(folder: Path, build: Callable[[Path], None]) -> Path:
    """As ``build_once`` for a folder that nothing pins from outside: it is used only as this user made it.

    No other user can enter it. Its files are hashed before each use; what was damaged is made anew.

    Raises:
        MptkError: as ``build_once``; or another user has put something in its place.
    """

    def listed(partial: Path) -> None:
        build(partial)
        write_manifest(partial)

    if os.path.lexists(folder) and not _as_made(folder):
        if folder.lstat().st_uid != os.geteuid():
            raise MptkError(f"{folder} belongs to another user; remove it, or {CACHE_REMEDY}")
        with claimed(folder, wait=True, remedy=CACHE_REMEDY), writing(folder, folder, CACHE_REMEDY):
            if os.path.lexists(folder) and not _as_made(folder):
                discard(folder)
    return build_once(folder, listed, PRIVATE)


def _as_made(folder: Path) -> bool:
    """Whether this user made a folder, no other can change it, and its files are as they were."""
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o777 != PRIVATE:
        return False
    try:
        check_manifest(folder)
    except MptkError:
        return False
    return True


def tidy_shared() -> None:
    """Remove what killed processes left in the cache folder and among the system's temporary files."""
    tidy_scratch()
    folders = [cache_dir()]
    for _ in range(CACHE_DEPTH + 1):
        for folder in folders:
            tidy(folder)
        folders = [each for folder in folders for each in _folders(folder)]


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
