"""Broken emissions: published folders and files, each changed in one way, which verify must refuse.

A file of this package has ``ROWS`` and ``publish``. ``python -m tests.broken`` runs every row of every file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mptk.errors import MptkError
from mptk.files import write_json
from mptk.publish.manifest import MARKER, hash_file, hash_weight_files, list_files, write_manifest

REPORT = "report.json"


@dataclass(frozen=True)
class Broken:
    """One change. ``kind``: of what is published; ``name``: what is wrong, in words; ``damage``: changes it in place."""

    kind: str
    name: str
    damage: Callable[[Path], None]


@dataclass(frozen=True)
class Published:
    """A published folder or file, written once for all rows of a kind, and how it is proven again.

    ``verify`` takes a copy of ``place`` and raises MptkError, or any other error, unless it is whole.
    """

    place: Path
    verify: Callable[[Path], object]


Publish = Callable[[str, Path], Published]
"""A file's ``publish``: a kind of its rows, and an empty folder to write in."""


def named(rows: list[Broken], kind: str) -> dict[str, Broken]:
    """Name → row, of those of a kind."""
    return {row.name: row for row in rows if row.kind == kind}


def check(row: Broken, published: Published) -> str:
    """What refused a damaged copy, in one line; "" if it passed in silence.

    Manifest and report are forged to fit, as somebody who means harm would, unless the row changes them itself.
    """
    with tempfile.TemporaryDirectory(prefix="broken-") as temporary:
        copy = Path(temporary) / published.place.name
        (shutil.copytree if published.place.is_dir() else shutil.copyfile)(published.place, copy)
        row.damage(copy)
        if _digests(copy) == _digests(published.place):
            raise ValueError(f"{row.kind}, {row.name}: the damage changes nothing")
        if copy.is_dir():
            _forge(copy, published.place)
        try:
            published.verify(copy)
        except MptkError as error:
            return str(error).replace(str(copy.parent) + "/", "")
        except Exception as error:  # a loader's own: it does not pass, but no user reads it with profit
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _digests(place: Path) -> dict[str, str]:
    names = [*list_files(place), MARKER] if place.is_dir() else [""]
    return {name: hash_file(place / name) if (place / name).is_file() else "" for name in names}


def _forge(copy: Path, original: Path) -> None:
    """Let the report's list of files and digest of weights, and the manifest, fit the copy."""
    report = copy / REPORT
    if report.is_file() and report.read_bytes() == (original / REPORT).read_bytes():
        content = json.loads(report.read_text())
        content |= {"files": list_files(copy), "weights_sha256": hash_weight_files(copy)}
        write_json(report, content)
    if (copy / MARKER).is_file() and (copy / MARKER).read_bytes() == (original / MARKER).read_bytes():
        write_manifest(copy)
