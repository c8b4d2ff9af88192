"""folder: write a folder atomically. It is written beside its place, listed, and then put there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mptk.errors import OutputError
from mptk.files import check_text, claim_place, fill_folder, name_write_errors, put_folder, tidy
from mptk.publish.manifest import is_ours, list_edited, list_foreign, write_manifest

# Names of files in a message; the rest are counted.
NAMES_SHOWN = 5


@contextlib.contextmanager
def publish(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside ``folder``, which replaces ``folder`` if no exception is raised.

    The finished folder holds ``mptk.json`` with the SHA-256 of each file. ``verify`` checks these, and a later run
    replaces only folders that have this file. What else lies in ``folder`` by then stays there, not listed.

    Raises:
        MptkError: as ``check_replaceable`` and ``claim_place``; or the folder cannot be written.
    """
    folder = Path(folder)
    check_replaceable(folder, overwrite)
    with claim_place(folder) as staging, name_write_errors(folder, staging.path):
        yield staging.renew()
        staging.check()
        # Last, so that a folder with a manifest is complete. A user may have put files into the old folder meanwhile:
        # they are looked for at the last moment.
        write_manifest(staging.folder)
        put_folder(staging, folder, list_foreign(folder) if _is_output(folder) else ())


@contextlib.contextmanager
def amend(folder: Path) -> Iterator[Path]:
    """Give a copy of a published folder to write further files in, which replaces ``folder`` if no exception is raised.

    Its files are links to the files of ``folder``: replace them, and do not write into them. Update its manifest last.

    Raises:
        MptkError: as ``claim_place``; or the folder cannot be written.
    """
    with claim_place(folder) as staging, name_write_errors(folder, staging.path):
        fill_folder(staging.renew(), folder)
        yield staging.folder
        put_folder(staging, folder)


def check_replaceable(folder: Path, overwrite: bool = False) -> None:
    """Raise MptkError if a user's own files would go with ``folder``.

    1. It is a link.
    2. It is not empty, and not an output of mptk.
    3. It is an output in which files were added or changed. With ``overwrite`` this is allowed: added files stay, and
       changed ones are replaced.
    """
    check_text(folder)
    # ``Path("..").name`` is "..", ``Path("/").name`` is empty: neither can be renamed.
    if folder.name in ("", ".."):
        raise OutputError(f"{folder} is not a name of a folder to write; give one, such as runs/small", name=folder)
    if folder.is_symlink():
        raise OutputError(
            f"{folder} is a symbolic link; give the folder that it leads to, {folder.readlink()}, as --out", name=folder
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not _is_output(folder):
        raise OutputError(
            f"{folder} exists and was not made by mptk; give another --out, or remove it yourself", name=folder
        )
    if overwrite:
        return
    tidy(folder)  # what killed processes left in it is not the user's
    for names, which, then in (
        (list_foreign(folder), "which mptk did not write", "keeps them and replaces the rest"),
        (list_edited(folder), "changed since mptk wrote it", "replaces it"),
    ):
        if names:
            some = ", ".join(names[:NAMES_SHOWN])
            some += f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            raise OutputError(
                f"{folder} holds {some}, {which}; give another --out, or add --overwrite, which {then}", name=folder
            )


def _is_output(folder: Path) -> bool:
    """Whether a folder has a manifest that lists its files."""
    return folder.is_dir() and isinstance(is_ours(folder).get("files"), dict)
