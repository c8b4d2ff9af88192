"""unfinished: what stands in the folder of an unfinished run, as far as it is told without torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mptk.config import Settings, from_json
from mptk.errors import ChangedError, OutputError
from mptk.files import format_json, hold_open, is_of, is_own, make_mark, read_mark
from mptk.reading import Damaged, Json, make_damage_error, read_json_object

SETTINGS = "settings.json"
GIVEN = "given"
"""The digests of the run's inputs, in its settings (``mptk/protocols/origin.py``)."""
RUN_MARK = "mptk.mark"
"""The file of mptk's mark in the folder."""
MOST_NAMES = 8
"""Changed inputs that a message names. A changed folder of text may have hundreds of files."""


def name_run_folder(out: Path) -> Path:
    """The folder of an unfinished run with this output."""
    return out.with_name(out.name + ".run")


def make_stage_error(file: Path) -> Damaged:
    """The error for a file from which a run cannot continue.

    Of a checkpoint only the file has to go, as an older one may be beside it; otherwise the whole folder.
    """
    what = file if re.search(r"-\d{8}\.safetensors$", file.name) else file.parent
    return make_damage_error(file, f"remove {what}, and start again with --resume")


def check_unfinished_run(out: Path, settings: Json, resume: bool, but: Sequence[str] = ()) -> bool:
    """Whether an unfinished run is beside ``out``. ``but``: settings that may differ when it is resumed.

    Raises:
        MptkError: as ``RunFolder``; or its settings are damaged.
    """
    path = name_run_folder(out)
    file = path / SETTINGS
    # Stages that were kept make a run unfinished. Without them there is nothing to lose and nothing to continue.
    check_run_folder(path, resume)
    if not any(path.glob("*.safetensors")):
        return False
    before = read_json_object(file, make_stage_error(file)) if os.path.lexists(file) else None
    # Hours of training are not thrown away without a word. A run that trains nothing is repeated as fast.
    if not resume and (before is None or _has_training(before)):
        raise OutputError(f"{path} holds an unfinished run; add --resume to continue it, or remove it", name=path)
    if resume:
        # Its inputs and its settings must be the same, and the message names the ones that are not. The settings go
        # through JSON, so that a tuple equals the list that was read.
        before, given = before or {}, json.loads(format_json(settings))
        if GIVEN not in but and (others := name_differing(before.get(GIVEN) or {}, given.get(GIVEN) or {})):
            raise ChangedError(
                f"{others} changed since {path} was started, so the result would mix old and new; restore what it was "
                "started with, or remove it",
                name=others,
            )
        names = sorted({*before, *given}.difference(but))
        if changed := [name for name in names if before.get(name) != given.get(name)]:
            raise OutputError(
                f"{path} was started with other settings ({', '.join(changed)}); give the same, or remove it", name=path
            )
    return True


def read_kept_settings(out: Path) -> Json:
    """The settings of the unfinished run beside ``out``, which is resumed; empty if there is none.

    Raises:
        MptkError: they are damaged; or as ``check_run_folder``.
    """
    path, file = name_run_folder(out), name_run_folder(out) / SETTINGS
    check_run_folder(path, resume=True)
    return read_json_object(file, make_stage_error(file)) if any(path.glob("*.safetensors")) and file.is_file() else {}


def check_run_folder(path: Path, resume: bool) -> None:
    """Raise MptkError if something else than an unfinished run of mptk is at ``path``. An empty folder may be used.

    With ``resume`` a copy of an unfinished run is one, too: the user says so, and the copy gets a mark of its own.
    """
    if path.is_symlink():
        raise OutputError(f"{path} is a symbolic link, and the run keeps its stages there; remove the link", name=path)
    if not os.path.lexists(path):
        return
    # By descriptor, so that nobody can exchange the folder between a look and the next. A mark holds for one folder of
    # one owner: in a copy it is read, but is not of that folder.
    if path.is_dir():
        with hold_open(path.parent) as at, hold_open(path.name, at) as own:
            names, mark = os.listdir(own), read_mark(own, RUN_MARK)
            if not names or (is_own(os.fstat(own)) and is_of(mark, own, path.name)):
                return
            if mark and not resume:
                raise OutputError(
                    f"{path} is a copy of an unfinished run; add --resume to continue it, or rename or remove it",
                    name=path,
                )
            if mark and is_own(os.fstat(own)):
                os.unlink(RUN_MARK, dir_fd=own)
                make_mark(own, RUN_MARK, path.name)
                return
    raise OutputError(
        f"{path} is not an unfinished run of this version of mptk, and this run would keep its stages there; give "
        "another --out, or rename or remove it",
        name=path,
    )


def _has_training(settings: Json) -> bool:
    """Whether the settings of an unfinished run ask for training or for trials, which take long; yes if in doubt."""
    try:
        known = from_json(Settings, settings, "settings")
    except ValueError:
        return True
    return known.learning.steps != 0 or known.divider != ""


def name_differing(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """The names whose values differ, joined by commas, of many the first; empty if all are equal."""
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    more = [f"{len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
    return ", ".join([*names[:MOST_NAMES], *more])
