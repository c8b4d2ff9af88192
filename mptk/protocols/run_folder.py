"""run_folder: the folder of an unfinished run. Files are written whole or not at all.

Each phase keeps its last two checkpoints and the best one. A folder is taken for an unfinished run only by mptk's mark,
whatever its name and its files (``mptk/files/places.py``).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from mptk.distributed.processes import connect_processes, is_leader
from mptk.files import (
    discard,
    format_json,
    hold_open,
    is_of,
    make_marked,
    make_write_error,
    read_mark,
    tidy,
    write_file,
    write_text,
)
from mptk.io import load_tensors, read_metadata, stream_tensors, write_weights
from mptk.ir import Weights
from mptk.protocols.unfinished import (
    RUN_MARK,
    SETTINGS,
    check_run_folder,
    check_unfinished_run,
    make_stage_error,
    name_run_folder,
)
from mptk.reading import Json, parse_json
from mptk.staged.spool import spool_weights

CHECKPOINTS_KEPT = 2
"""If the newest checkpoint is damaged, the message asks to remove it, and the run continues from the one before."""
METRICS = "metrics.jsonl"
FACTS = "facts"
TRACKER = "tracker"
"""Folder of a tracker that writes files."""


class Keepable(Protocol):
    """What a stage found, in the form in which a run keeps it: tensors, and facts, which JSON holds."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def facts(self) -> Mapping[str, object]: ...


@dataclass(frozen=True)
class Kept:
    """What a run kept."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, object] = field(default_factory=dict)


AnyKeepable = TypeVar("AnyKeepable", bound=Keepable)


class Keeper(Protocol):
    """``RunFolder.keep``, or the same of a run that keeps nothing."""

    def __call__(
        self, name: str, make: Callable[[], AnyKeepable], *, once: bool = False, bound: float = math.inf
    ) -> AnyKeepable | Kept: ...


def make_now(
    name: str, make: Callable[[], AnyKeepable], *, once: bool = False, bound: float = math.inf
) -> AnyKeepable | Kept:
    """What ``make`` gives, which nothing keeps. The arguments are those of ``RunFolder.keep``."""
    return make()


class RunFolder:
    """``NAME.run`` beside the output folder ``NAME``: settings, text, results of stages, checkpoints, metrics.

    It is removed at the end of the run. A run counts as unfinished once its text is stored. Without ``resume``, an
    unfinished run that trains nothing is replaced.

    Raises:
        MptkError: there is an unfinished run that trains, and ``resume`` is False; or it was started with other
            settings.
    """

    def __init__(self, out: Path, settings: Json, resume: bool) -> None:
        self.path = name_run_folder(out)
        self._described = format_json(settings, indent=1, sort_keys=True) + "\n"
        file, state = self.path / SETTINGS, connect_processes()
        # The first process decides and cleans up. The others then see the same files, and take the same turns.
        if state.is_main_process:
            unfinished = check_unfinished_run(out, settings, resume)
            tidy(self.path)
            if unfinished and not resume:
                self.remove()
            if not (unfinished and resume):  # settings without stages: an earlier run ended before it kept anything
                file.unlink(missing_ok=True)
        state.wait_for_everyone()
        # Listed once: what this run writes itself must not count as found, or processes would differ in what they do.
        self._found = frozenset(path.name for path in self.path.glob("*"))

    def make(self) -> Path:
        """Make the folder, with its mark, if it is not there; returns its path."""
        make_run_folder(self.path)
        return self.path

    def open_within(self, name: str) -> RunFolder:
        """The folder of a part of the run, in this one and of the same settings."""
        return self.open_part(name, json.loads(self._described))

    def open_part(self, name: str, settings: Json, *, resume: bool = True) -> RunFolder:
        """As ``open_within``, with settings of its own."""
        return RunFolder(self.make() / name, settings, resume)

    def keep(
        self, name: str, make: Callable[[], AnyKeepable], *, once: bool = False, bound: float = math.inf
    ) -> AnyKeepable | Kept:
        """What ``make`` gave before the run was resumed; else what it gives now, which the first process stores.

        This is how a run is resumed; only training has checkpoints, too, of its steps.

        Args:
            once: the first of several processes makes it, and the others read it. Else each makes its own.
            bound: bytes of the stored tensors that stay in memory; the others go to temporary files.
        """
        with connect_processes().main_process_first() if once else nullcontext():
            if self.keeps(name) or (once and self._file(name).exists()):
                return self._read_kept(name, bound)
            made = make()
            if is_leader():
                self.save(name, made.tensors, **({FACTS: format_json(made.facts)} if made.facts else {}))
            return made

    def keeps(self, name: str) -> bool:
        """Whether something was kept under ``name`` when the run was resumed; the same in all processes."""
        return self._file(name).name in self._found

    def save(self, name: str, tensors: Mapping[str, Tensor], **metadata: str) -> None:
        """Write ``NAME.safetensors``, whole or not at all. One tensor is in memory at a time."""
        # The settings are written with the first result: only then is there something to continue.
        if not (self.make() / SETTINGS).is_file():
            write_text(self.path / SETTINGS, self._described)
        write_file(self._file(name), lambda file: write_weights(file, Weights(tensors), metadata or None))
        if connect_processes().num_processes == 1:  # nobody else has to find the same
            self._found |= {f"{name}.safetensors"}

    def save_checkpoint(self, phase: str, step: int, tensors: Mapping[str, Tensor], best: int | None = None) -> None:
        """Store the state after ``step`` steps of a phase. Remove all others but the previous and the ``best`` one."""
        self.save(_name(phase, step), tensors)
        for old in self._list_checkpoints(phase)[:-CHECKPOINTS_KEPT]:
            if best is None or old.stem != _name(phase, best):
                old.unlink()

    def read_checkpoint(self, phase: str, step: int) -> dict[str, Tensor]:
        """The stored state after ``step`` steps of a phase. Raises MptkError if the file is damaged."""
        return _read_state(self._file(_name(phase, step)))

    def read_latest(self, phase: str) -> tuple[int, dict[str, Tensor]] | None:
        """The number of steps and the state of a phase's newest checkpoint, or None."""
        found = self._list_checkpoints(phase)
        if not found:
            return None
        return int(found[-1].stem.rpartition("-")[2]), _read_state(found[-1])

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Append a line to ``metrics.jsonl``."""
        with (self.make() / METRICS).open("a") as file:
            file.write(
                format_json({"phase": phase, "step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}}) + "\n"
            )

    def drop_metrics(self, phase: str, step: int) -> None:
        """Drop the metrics that a resumed run will write again: the metrics of ``phase`` after ``step``."""
        path = self.path / METRICS
        if path.is_file():
            rows = [line for line in path.read_text().splitlines() if _is_earlier(line, phase, step)]
            write_text(path, "".join(row + "\n" for row in rows))

    def finish(self, folder: Path) -> None:
        """Copy metrics and a tracker's files to ``folder``."""
        shutil.copy(self.path / METRICS, folder)
        if (self.path / TRACKER).is_dir():
            shutil.copytree(self.path / TRACKER, folder / TRACKER)

    def remove(self) -> None:
        """Remove the folder, if there is one."""
        remove_run_folder(self.path)

    def remove_unless(self, name: str) -> None:
        """Remove the folder if it stores nothing except what ``save`` wrote under that name."""
        kept = {path.name for pattern in ("*.safetensors", "*.json") for path in self.path.glob(pattern)}
        if not kept - {SETTINGS, f"{name}.safetensors"}:
            self.remove()

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _read_kept(self, name: str, bound: float) -> Kept:
        """What was kept under ``name``. It is copied, since the result of a run outlives the run's folder."""
        file = self._file(name)
        damaged = make_stage_error(file)
        facts = parse_json(read_metadata(file, damaged).get(FACTS, "{}"), damaged)
        return Kept(spool_weights(stream_tensors(file, damaged), bound), facts)

    def _list_checkpoints(self, phase: str) -> list[Path]:
        return sorted(p for p in self.path.glob(f"{phase}-*.safetensors") if re.fullmatch(rf"{phase}-\d+", p.stem))


def read_kept_tensors(out: Path, name: str) -> dict[str, Tensor] | None:
    """What the unfinished run beside ``out`` kept under a name, or None. Raises MptkError if the file is damaged."""
    path = name_run_folder(out) / f"{name}.safetensors"
    return load_tensors(path, make_stage_error(path)) if os.path.lexists(path) else None


def make_run_folder(path: Path) -> None:
    """Make the folder of an unfinished run if it is not there.

    Raises:
        MptkError: something else is there, or it cannot be written.
    """
    check_run_folder(path, resume=False)
    if path.is_dir() and any(path.iterdir()):
        return
    try:
        make_marked(path, RUN_MARK)
    except OSError as error:
        check_run_folder(path, resume=False)  # another process of this run may have made it
        if not path.is_dir():
            raise make_write_error(path, error) from error


def remove_run_folder(path: Path) -> None:
    """Remove the folder of an unfinished run, if there is one: as a whole, since half of it could not be resumed."""
    if path.is_dir() and not path.is_symlink():
        with hold_open(path.parent) as at, hold_open(path.name, at) as own:
            made = is_of(read_mark(own, RUN_MARK), own, path.name)
        if made:
            discard(path, RUN_MARK)


def _name(phase: str, step: int) -> str:
    return f"{phase}-{step:08d}"


def _read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint. Raises MptkError if it is damaged; NaN would spoil all steps after it."""
    found = load_tensors(file, make_stage_error(file))
    if spoilt := next((n for n, t in found.items() if t.is_floating_point() and t.isnan().any()), None):
        raise make_stage_error(file)(f"{spoilt} is not a number")
    return found


def _is_earlier(line: str, phase: str, step: int) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # the run was stopped while it wrote
        return False
    known = isinstance(row, dict) and isinstance(row.get("step"), int)
    return known and bool(row.get("phase") != phase or row["step"] <= step)
