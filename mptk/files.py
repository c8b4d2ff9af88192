"""files: JSON that all readers accept, and atomic writes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mptk.errors import MptkError


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
    """Write a file in UTF-8, atomically. Its folder is made if missing.

    Raises:
        MptkError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: file.write_text(content, encoding="utf-8"))
    except OSError as error:
        raise MptkError(
            f"cannot write {path}: {error.strerror or error}; check its folder's space and rights, or give another name"
        ) from error


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then rename the file to ``path``.

    If ``write`` fails, ``path`` stays as it was. Several processes may write the same path.

    Raises:
        OSError: the file cannot be renamed. Errors of ``write`` pass through.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_together(folder: Path, *names: str) -> Iterator[Path]:
    """A temporary folder for the files ``names``. If nothing fails, they move to ``folder`` in this order.

    Name a file last if it refers to the others. Other files in ``folder`` stay.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as temporary:
        yield Path(temporary)
        for name in names:
            (Path(temporary) / name).replace(folder / name)


def _finite(content: object) -> object:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content
