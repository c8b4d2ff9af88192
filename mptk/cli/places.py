"""places: options that name a file or a folder to write. They refuse a path that cannot be written, before any work."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import typer


def file_to_write(*suffixes: str, dash: bool = False) -> Callable[[Path | None], Path | None]:
    """The callback of an option for a file. ``suffixes``: allowed ones. ``dash``: - is the standard output."""

    def check(path: Path | None) -> Path | None:
        if path is None or (dash and path == Path("-")):
            return path
        if suffixes and path.suffix.lower() not in suffixes:
            raise typer.BadParameter(f"{path} ends in none of {', '.join(suffixes)}. Give another name.")
        mode = _mode(path)
        if mode is not None and stat.S_ISDIR(mode):
            raise typer.BadParameter(f"{path} is a folder. Give the name of a file.")
        if mode is not None and not stat.S_ISREG(mode):
            raise typer.BadParameter(f"{path} is not an ordinary file. Give the name of a file.")
        _check_above(path)
        return path

    return check


def folder_to_write(path: Path | None) -> Path | None:
    """The callback of an option for a folder."""
    if path is not None:
        _mode(path)
        _check_above(path)
    return path


def _mode(path: Path) -> int | None:
    """The kind of file at ``path``; None if there is none."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be used: {error.strerror}. Give another name.") from error
    except ValueError as error:  # a null character
        raise typer.BadParameter(f"{path} cannot be used: {error}. Give another name.") from error


def _check_above(path: Path) -> None:
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise typer.BadParameter(f"{above} is not a folder, so nothing can be in it. Give another name.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"you may not write to {above}. Give a folder that you may write to.")
