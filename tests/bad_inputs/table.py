"""What a row of the table is, the folders that rows start from, and how a row is run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from mptk.cli import console
from mptk.cli.console import VOICE
from mptk.cli.main import main

PATIENCE = int(os.environ.get("PATIENCE", 60))
"""Seconds after which a row is said to hang."""
PROGRESS = re.compile(r" *\d+ s  ")


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
LESS_DEEP = '{"a":' * 900 + "1" + "}" * 900
BODIES = {
    "empty": "",
    "a list": "[]",
    "null": "null",
    "a number": "7",
    "no JSON": "{",
    "not UTF-8": b'{"format": "\xff"}',
    "deep": DEEP,
    "deep and short": LESS_DEEP,
    "of 5000 digits": '{"format": ' + "9" * 5000 + "}",
    "of NaN": '{"format": NaN}',
    "of 80 MB": lambda path: b" " * (80 << 20),
}
"""What a JSON file may hold in place of an object that can be read."""


@dataclass(frozen=True)
class Place:
    """Where a row works. ``model``, ``pruned``, …: copies of the shared folders, made when they are asked for."""

    root: Path
    shared: Mapping[str, Path]

    def __getitem__(self, name: str) -> Path:
        """A shared file or folder, copied by hard links into this place."""
        there = self.root / name
        if name in self.shared and not there.exists():
            linked(self.shared[name], there)
        return there


def linked(source: Path, target: Path) -> None:
    if source.is_file():
        os.link(source, target)
    else:
        shutil.copytree(source, target, copy_function=os.link)


Prepare = Callable[[Place], object]


@dataclass(frozen=True)
class Row:
    """``line``: words of the command line; {NAME} is a path of the place. ``prepare``: what it does to the place first.

    ``says``: words of the one line on stderr, beside a remedy. ``code``: the exit code. ``done``: it is no error at all.
    """

    name: str
    line: str
    says: tuple[str, ...]
    prepare: tuple[Prepare, ...] = ()
    code: int = 1
    done: bool = False
    words: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, place: Place) -> list[str]:
        def path(found: re.Match[str]) -> str:
            return self.words.get(found[1]) or str(at(place, found[1]))

        return [re.sub(r"\{(\w[\w./-]*)\}", path, word) for word in self.line.split(" ")]


def rows(
    line: str, ends: Mapping[str, tuple[str, ...]], *prepare: Prepare, code: int = 1, done: bool = False
) -> list[Row]:
    """A row for ``line`` with each of ``ends``: end → the words that the error has. The command and the end name the row."""
    named = {f"{line.split(' ')[0]} {end[:200]}".strip(): end for end in ends}
    return [Row(name, f"{line} {end}".strip(), ends[end], prepare, code, done) for name, end in named.items()]


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr that are no progress."""
        return [line for line in self.stderr.splitlines() if not PROGRESS.match(line)]


def run(arguments: list[str], width: int = console.WIDE_COLUMNS) -> Outcome:
    """A command line in this process, as the console script runs it. ``width``: columns of what it prints."""
    out, err = io.StringIO(), io.StringIO()
    console.out.width = console.err.width = width
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(PATIENCE)
    with (
        mock.patch.object(sys, "argv", ["mptk", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            signal.alarm(0)
    VOICE.quiet = VOICE.verbose = False
    return Outcome(code, out.getvalue(), err.getvalue())


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no answer after {PATIENCE} s")


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a folder → kind, size and time of its last change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_mode, state.st_size, state.st_mtime_ns)
    return found


# ---- what rows do to their place ----


def write(name: str, content: str | bytes | Callable[[Path], str | bytes]) -> Prepare:
    """Another content of a file; that of a link is not touched. Its folder is copied first, if it is a shared one."""

    def prepare(place: Place) -> None:
        path = at(place, name)
        made = content(path) if callable(content) else content
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.encode("utf-8", "surrogateescape") if isinstance(made, str) else made)

    return prepare


def changed(name: str, edit: Callable[[dict], object]) -> Prepare:
    """A JSON file whose content ``edit`` changes."""

    def made(path: Path) -> str:
        content = json.loads(path.read_text())
        edit(content)
        return json.dumps(content)

    return write(name, made)


def at(place: Place, name: str) -> Path:
    first, _, rest = name.partition("/")
    return place[first] / rest if rest else place[first]


def remove(name: str) -> Prepare:
    return lambda place: at(place, name).unlink()


def link(name: str, target: str) -> Prepare:
    """A symbolic link. ``target``: a path of the place, or an absolute one."""

    def prepare(place: Place) -> None:
        path = at(place, name)
        path.unlink(missing_ok=True)
        path.symlink_to(target if target.startswith("/") else at(place, target))

    return prepare


def fifo(name: str) -> Prepare:
    return lambda place: os.mkfifo(at(place, name))


def folder(name: str) -> Prepare:
    return lambda place: at(place, name).mkdir(parents=True, exist_ok=True)
