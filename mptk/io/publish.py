"""publish: write a folder atomically. It is written beside its place and then renamed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mptk.errors import MptkError
from mptk.io.manifest import is_ours, write_manifest


@contextlib.contextmanager
def publish(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``, which replaces ``folder`` if no exception is raised.

    The finished folder holds ``mptk.json`` with the SHA-256 of each file. ``verify`` checks these, and a later run
    replaces only folders that have this file.

    Raises:
        MptkError: as ``check_replaceable``; or the folder cannot be written.
    """
    folder = Path(folder)
    check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            new, old = Path(beside) / "new", Path(beside) / "old"
            new.mkdir()
            yield new
            write_manifest(new)
            _swap(folder, new, old)
    except OSError as error:
        raise MptkError(
            f"cannot write {folder}: {error.strerror or error}; check the disk's space and rights"
        ) from error


def check_replaceable(folder: Path) -> None:
    """Raise MptkError if ``folder`` exists, is not empty and is no output of mptk."""
    if folder.exists() and not _replaceable(folder):
        raise MptkError(f"{folder} exists and was not made by mptk; give another --out, or remove it yourself")


def _swap(folder: Path, new: Path, old: Path) -> None:
    """Move ``folder`` to ``old`` and ``new`` to ``folder``. If the second move fails, undo the first."""
    replaced = folder.exists()
    if replaced:
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if replaced:
            old.rename(folder)
        raise


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or bool(is_ours(folder))
