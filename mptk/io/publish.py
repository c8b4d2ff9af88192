"""publish: write a folder atomically. It is written beside its place, listed, and then put there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mptk.errors import MptkError
from mptk.files import claimed, fill_folder, path_of, put_folder, writing
from mptk.io.manifest import is_ours, write_manifest


@contextlib.contextmanager
def publish(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``, which replaces ``folder`` if no exception is raised.

    The finished folder holds ``mptk.json`` with the SHA-256 of each file. ``verify`` checks these, and a later run
    replaces only folders that have this file.

    Raises:
        MptkError: as ``check_replaceable`` and ``claimed``; or the folder cannot be written.
    """
    folder = Path(folder)
    check_replaceable(folder)
    with claimed(folder) as staging, writing(folder, staging.path):
        yield staging.renew()
        write_manifest(staging.folder)
        put_folder(staging, folder)


@contextlib.contextmanager
def amend(folder: Path) -> Iterator[Path]:
    """A published folder to write further files in, which replaces ``folder`` if no exception is raised.

    It starts with links to the files that are there, so replace files in it and do not write into them. Update its
    manifest last.

    Raises:
        MptkError: as ``claimed``; or the folder cannot be written.
    """
    with claimed(folder) as staging, writing(folder, staging.path):
        fill_folder(staging.renew(), folder)
        yield staging.folder
        put_folder(staging, folder)


def check_replaceable(folder: Path) -> None:
    """Raise MptkError if ``folder`` is a link, or exists, is not empty and is no output of mptk."""
    if folder.name in ("", ".."):
        raise MptkError(f"{folder} is no name of a folder to write; give one, such as runs/small")
    if folder.is_symlink():
        raise MptkError(f"{folder} is a symbolic link; give the folder that it leads to, {folder.readlink()}, as --out")
    if folder.exists() and not _replaceable(folder):
        raise MptkError(f"{folder} exists and was not made by mptk; give another --out, or remove it yourself")


def check_apart(folder: Path, *sources: str | Path) -> None:
    """Raise MptkError if writing ``folder`` would replace a file or folder that is read."""
    place = folder.resolve()
    for source in sources:
        path = path_of(source)
        if path.exists() and (path.resolve() == place or place in path.resolve().parents):
            raise MptkError(f"{source} is what is read, and {folder} would replace it; give another --out")


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or bool(is_ours(folder))
