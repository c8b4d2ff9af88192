"""files: JSON that every reader accepts, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mptk.errors import MptkError


def json_text(content: Any, **options: Any) -> str:
    """``content`` as JSON. NaN and infinity, which JSON does not have, become null. ``options``: of ``json.dumps``."""
    return json.dumps(_finite(content), allow_nan=False, **options)


def write_json(path: Path | None, content: Any) -> None:
    """Write a result as JSON, if there is a path to write it to."""
    if path is not None:
        write_text(path, json_text(content, indent=1) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a file whole or not at all. Raises MptkError if it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise MptkError(f"cannot write {path}: {error.strerror or error}; give another name") from error


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content
