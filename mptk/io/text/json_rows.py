"""json_rows: the rows of a JSON file: an object a line, or a list of objects. Also compressed.

The readers of pyarrow, which ``datasets`` calls, crash the process on a line that is a number.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import importlib.util
import lzma
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from mptk.errors import MptkError
from mptk.reading import Damaged, json_of

LONGEST = 1 << 28
"""Bytes of the longest line, and of the largest list of objects."""


def json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, one at a time if each has a line. Raises MptkError, with the line, where it is none."""
    number = 0

    def damaged(why: str) -> MptkError:
        return MptkError(f'{path}, line {number}: {why}; write an object a line, as {{"text": "…"}}')

    with _opened(path) as file:
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise damaged(f"it has more than {LONGEST >> 20} MB")
            if number == 1 and line.lstrip()[:1] == b"[":
                yield from _listed(line, file.read, damaged)
                return
            if line.strip():
                yield _object(_decoded(line, damaged), damaged)


def _opened(path: Path) -> BinaryIO:
    """The file, unpacked as it is read."""
    suffix = path.suffix.lower()
    if suffix == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise MptkError(f"zstandard is not installed, and it unpacks {path}; run: pip install zstandard")
    openers: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opener = importlib.import_module("zstandard").open if suffix == ".zst" else openers.get(suffix, open)
    return cast("BinaryIO", opener(path, "rb"))


def _listed(start: bytes, read: Callable[[int], bytes], damaged: Damaged) -> Iterator[Mapping[str, Any]]:
    """The rows of a file that is a list."""
    content = start + read(LONGEST + 1 - len(start))
    if len(content) > LONGEST:
        raise damaged(f"the list has more than {LONGEST >> 20} MB")
    rows = _decoded(content, damaged)
    for row in rows if isinstance(rows, list) else [rows]:
        yield _object(row, damaged)


def _decoded(content: bytes, damaged: Damaged) -> Any:
    try:
        return json_of(content.decode("utf-8"), damaged)
    except UnicodeDecodeError as error:
        raise damaged("it is not UTF-8") from error


def _object(row: object, damaged: Damaged) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise damaged(f"it holds {type(row).__name__}, and no object with columns")
    return row
