"""folder: write a folder atomically. It is written beside its place, listed, and then put there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mptk.errors import MptkError
from mptk.files import check_text, claim_place, fill_folder, put_folder, tidy, writing
from mptk.publish.manifest import edited, foreign, is_ours, write_manifest

NAMES_SHOWN = 5
"""Most names of files in a message."""


@contextlib.contextmanager
def publish(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder``, which replaces ``folder`` if no exception is raised.

    The finished folder holds ``mptk.json`` with the SHA-256 of each file. ``verify`` checks these, and a later run
    replaces only folders that have this file. What else lies in ``folder`` by then stays there, not listed.

    Raises:
        MptkError: as ``check_replaceable`` and ``claimed``; or the folder cannot be written.
    """
    folder = Path(folder)
    check_replaceable(folder, overwrite)
    with claim_place(folder) as staging, writing(folder, staging.path):
        yield staging.renew()
        staging.check()
        write_manifest(staging.folder)
        put_folder(staging, folder, foreign(folder) if _is_output(folder) else ())


@contextlib.contextmanager
def amend(folder: Path) -> Iterator[Path]:
    """A published folder to write further files in, which replaces ``folder`` if no exception is raised.

    It starts with links to the files that are there, so replace files in it and do not write into them. Update its
    manifest last.

    Raises:
        MptkError: as ``claimed``; or the folder cannot be written.
    """
    with claim_place(folder) as staging, writing(folder, staging.path):
        fill_folder(staging.renew(), folder)
        yield staging.folder
        put_folder(staging, folder)


def check_replaceable(folder: Path, overwrite: bool = False) -> None:
    """Raise MptkError if a user's own files would go with ``folder``.

    It is a link; or exists, is not empty and is not an output of mptk; or is one in which files were added or changed.
    ``overwrite``: then the added ones stay, and the changed ones are replaced.
    """
    check_text(folder)
    if folder.name in ("", ".."):
        raise MptkError(f"{folder} is not a name of a folder to write; give one, such as runs/small")
    if folder.is_symlink():
        raise MptkError(f"{folder} is a symbolic link; give the folder that it leads to, {folder.readlink()}, as --out")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not _is_output(folder):
        raise MptkError(f"{folder} exists and was not made by mptk; give another --out, or remove it yourself")
    if overwrite:
        return
    tidy(folder)
    for names, which, then in (
        (foreign(folder), "which mptk did not write", "keeps them and replaces the rest"),
        (edited(folder), "changed since mptk wrote it", "replaces it"),
    ):
        if names:
            raise MptkError(
                f"{folder} holds {_some(names)}, {which}; give another --out, or add --overwrite, which {then}"
            )


def _is_output(folder: Path) -> bool:
    """Whether a folder has a manifest that lists its files."""
    return folder.is_dir() and isinstance(is_ours(folder).get("files"), dict)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{', '.join(names[:NAMES_SHOWN])}{more}"
