"""cache: the folder of what mptk fetched, converted, measured or exported, which all processes share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import platformdirs

from mptk.files import claimed, path_of, put_made, tidy, tidy_scratch, writing

REMEDY = "set MPTK_CACHE to a folder with room for it"
DEPTH = 2
"""Folders below the cache folder in which something is written."""


def cache_dir() -> Path:
    """The cache folder: ``MPTK_CACHE``, else the platform's user cache folder."""
    configured = os.environ.get("MPTK_CACHE")
    return path_of(configured) if configured else platformdirs.user_cache_path("mptk")


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Let ``build`` make the file or folder ``target`` in the cache, unless it exists; return ``target``.

    ``build`` writes to a temporary path, which is then renamed, so ``target`` is complete or absent. Other processes
    that want the same target wait.

    Raises:
        MptkError: the cache folder cannot be written.
    """
    if target.exists():
        return target
    with claimed(target, wait=True, remedy=REMEDY) as staging, writing(target, staging.path, REMEDY):
        if not target.exists():
            build(staging.folder / target.name)
            put_made(staging, target)
    return target


def tidy_shared() -> None:
    """Remove what killed processes left in the cache folder and among the system's temporary files."""
    tidy_scratch()
    folders = [cache_dir()]
    for _ in range(DEPTH + 1):
        for folder in folders:
            tidy(folder)
        folders = [each for folder in folders for each in _folders(folder)]


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
