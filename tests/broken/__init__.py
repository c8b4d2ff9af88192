"""Broken emissions: published folders and files, each changed in one way, which verify must refuse.

A file of this package has ``ROWS`` and ``publish``. ``python -m tests.broken`` runs every row of every file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mptk import MptkError, Plan, Report, Settings
from mptk.files import write_json
from mptk.proof.verification import compile_folder, repeat_proof
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


def prove_by_one_trace(folder: Path) -> Published:
    """A pruned folder, whose dense model is traced once for all rows."""
    report, asked = Report.read(folder), Settings()
    compiled, _ = compile_folder(folder, report, Plan.load(folder / "plan.json"), None, asked)
    return Published(folder, lambda copy: repeat_proof(copy, None, asked, compiled.prepared.analysis))


@contextmanager
def make_broken(row: Broken, place: Path) -> Iterator[Path]:
    """A damaged copy of what was published at ``place``.

    Manifest and report are forged to fit, as somebody who means harm would, unless the row changes them itself.
    """
    with tempfile.TemporaryDirectory(prefix="broken-") as temporary:
        copy = Path(temporary) / place.name
        (shutil.copytree if place.is_dir() else shutil.copyfile)(place, copy)
        row.damage(copy)
        if _digests(copy) == _digests(place):
            raise ValueError(f"{row.kind}, {row.name}: the damage changes nothing")
        if copy.is_dir():
            _forge(copy, place)
        yield copy


def check(row: Broken, published: Published) -> str:
    """What refused a damaged copy, in one line; "" if it passed in silence."""
    with make_broken(row, published.place) as copy:
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
