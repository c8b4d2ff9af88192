"""text: JSON that all readers accept, and text files, written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from mptk.files.replace import write_file
from mptk.files.trouble import cannot_write


def json_text(
    content: object,
    *,
    indent: int | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = True,
    separators: tuple[str, str] | None = None,
) -> str:
    """``content`` as JSON. NaN and infinity become null, since JSON has neither. Options as in ``json.dumps``."""
    return json.dumps(
        _finite(content),
        allow_nan=False,
        indent=indent,
        sort_keys=sort_keys,
        ensure_ascii=ensure_ascii,
        separators=separators,
    )


def write_json(path: Path | None, content: object) -> None:
    """Write a result as JSON; nothing if ``path`` is None."""
    if path is not None:
        write_text(path, json_text(content, indent=1) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a file in UTF-8. Otherwise as ``write_result``."""
    write_result(path, lambda file: file.write_text(content, encoding="utf-8"))


def write_result(path: Path, write: Callable[[Path], object]) -> None:
    """As ``write_file``, for a path that a user named. Its folder is made if missing; a device is written as it is.

    Raises:
        MptkError: it cannot be written, or is a symbolic link.
    """
    try:
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            write(path)
        else:
            write_file(path, write)
    except OSError as error:
        raise cannot_write(path, error) from error


def _finite(content: object) -> object:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content
