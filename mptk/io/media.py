"""media: the files of one kind in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mptk.errors import MptkError
from mptk.files import path_of


def media_files(data: str, what: str, suffixes: Sequence[str]) -> list[Path]:
    """All files in the folder ``data`` and below with one of ``suffixes``, in the order of their paths.

    ``what``: their name, for errors.

    Raises:
        MptkError: there is no such folder, or it has none.
    """
    folder = path_of(data)
    if not folder.is_dir():
        raise MptkError(f"this model reads {what}, and {data} is no folder of them; give one with --data, or random")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        raise MptkError(f"{data} holds no {what} ({', '.join(suffixes)}); give a folder with some, or convert them")
    return found
