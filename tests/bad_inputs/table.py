"""What a row of the table is, and what rows do to the files that they start from."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import typer

from mptk.cli import console
from mptk.cli.app import check_words
from mptk.cli.console import VOICE
from mptk.cli.main import main
from mptk.errors import FileError, InputError
from mptk.testing import copy_whole

PATIENCE = int(os.environ.get("PATIENCE", 60))
"""Seconds after which a row is said to hang."""
PROGRESS = re.compile(r" *\d+ s  |reading ")


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
        """A shared file or folder, copied into this place."""
        there = self.root / name
        if name in self.shared and not there.exists():
            copy_whole(self.shared[name], there)
        return there


Prepare = Callable[[Place], object]
USAGE: type[Exception] = typer.BadParameter.__mro__[1]
"""The error for words that are no options, which typer exports under no name."""


@dataclass(frozen=True)
class Read:
    """A reader, and the path in the place that it gets."""

    read: Callable[[Path], object]
    path: str


@dataclass(frozen=True)
class Row:
    """``does``: words of a command line, which its parser or its checks refuse; or a reader, which refuses a file.

    ``kind``, ``about``: the error's class and its ``name``; of a wrong option, its flag. In words and in ``about``,
    {NAME} is a path of the place. ``prepare``: what is done to the place first. ``words``: what else {NAME} is.
    """

    name: str
    does: str | Read
    kind: type[Exception] = InputError
    about: str = ""
    prepare: tuple[Prepare, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)

    def fill(self, text: str, place: Place) -> str:
        """``text`` with the paths that it names."""
        return re.sub(r"\{(\w[\w./-]*)\}", lambda name: self.words.get(name[1]) or str(at(place, name[1])), text)

    def make_call(self, place: Place) -> Callable[[], object]:
        """What must fail. The files that it reads are in the place when this returns."""
        if isinstance(self.does, str):
            return partial(check_words, [self.fill(word, place) for word in self.does.split(" ")])
        return partial(self.does.read, at(place, self.does.path))


def refuse(name: str, read: Read | str, about: str, *prepare: Prepare, kind: type[Exception] = FileError) -> Row:
    """A row for what a reader refuses, most often a file."""
    return Row(name, read, kind, about, prepare)


def check_lines(line: str, ends: Mapping[str, str], kind: type[Exception] = InputError) -> list[Row]:
    """A row for ``line`` with each of ``ends``: end → what the error is about. The command and the end name the row."""
    named = {f"{line.split(' ')[0]} {end[:200]}".strip(): end for end in ends}
    return [Row(name, f"{line} {end}".strip(), kind, ends[end]) for name, end in named.items()]


def find_subject(error: Exception) -> str:
    """The ``name`` of an error of mptk; of a wrong option, its flag."""
    option = getattr(error, "param", None)
    if option is not None:
        return str(option.opts[0])
    return str(getattr(error, "name", getattr(error, "option_name", "")))


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
    with (
        lose_patience(),
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
    VOICE.quiet = VOICE.verbose = False
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def lose_patience() -> Iterator[None]:
    """Raise TimeoutError in what takes longer than ``PATIENCE``."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)


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
