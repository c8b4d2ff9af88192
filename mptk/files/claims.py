"""claims: a path that is to be written belongs to one process at a time."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mptk.errors import MptkError
from mptk.files.staging import Staging, held_by, take, tidy
from mptk.files.trouble import cannot_write

PAUSE = 0.05
"""Seconds between two looks at a lock."""

_held: dict[Path, tuple[Staging, int, int]] = {}
"""Path → its staging folder, and the process and thread that have it."""


@contextlib.contextmanager
def claimed(target: Path, *, wait: bool = False, remedy: str | None = None) -> Iterator[Staging]:
    """Within it ``target`` is this thread's to write, in the staging folder beside it. Its folder is made if missing.

    What killed processes left beside it is removed first. A thread may claim again what it has.

    Args:
        wait: until whoever has it is done.
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
    """Remove those of ``folders``, from the innermost on, in which nothing was put."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
