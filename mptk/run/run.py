"""run: what a run is asked for, where its result goes, and what it may use. Every stage gets it as its context.

``open_run`` locks the output, completes the settings and checks them, before anything else. ``prune``, ``recover``,
``ladder``, ``advise`` and ``shapes`` then work in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from mptk.compat.accelerate import separate_state
from mptk.compat.torch import forget_sources
from mptk.config import Settings, to_json, with_keywords
from mptk.distributed.processes import is_leader, run_once
from mptk.errors import explain_errors
from mptk.files import check_scratch, claim_place
from mptk.files.outputs import check_apart
from mptk.io import Resident, tidy_shared
from mptk.ir import Plan
from mptk.progress import Progress, show_nothing
from mptk.protocols import (
    GIVEN,
    Context,
    DenseModel,
    Opened,
    Origin,
    Rows,
    RunFolder,
    Stage,
    build_executor,
    check_unfinished_run,
    find_device,
    read_kept_settings,
)
from mptk.publish.folder import check_replaceable
from mptk.run.checks import check_settings, read_plan
from mptk.run.estimate import Estimator, check_room_for, read_estimator
from mptk.run.inputs import Inputs
from mptk.run.minutes import TimedRun, complete_settings, fill_in, time_run
from mptk.run.pruned_folder import PrunedFolder
from mptk.staged.staged import EXECUTOR, Executor
from mptk.trust import Trust

Start = str | Opened | PrunedFolder
"""What a run starts from: a model's name, a model in memory, or a pruned folder, whose plan and weights it trains."""

FOUND = ("sparsity", "length", "eval_length", "families", "keep")
"""Settings that ``prepare`` fills in: from a latency, a trace of one length, or the families in a part. Until then they
may differ from an unfinished run's, which has them filled in."""


@dataclass(frozen=True, kw_only=True)
class Run(Context):
    """One run. Its log, progress, folder and accelerator are those of its ``Context``.

    ``source``: the model as the user named it. ``start``: the pruned folder that it trains. ``settings``: complete.
    ``plan``: what the settings' file of a plan says, read once, so that later changes of the file have no effect.
    ``estimator``: estimates it; None if that is not possible. ``timed``: its minutes, if they choose any of its numbers
    and these can be planned again while it runs. ``reads_data``: whether it reads data. ``further``:
    sparsities to which its result is cut further.

    Found by its stages: ``dense``: the analysed dense model, which further runs on it share. ``origin``: digests of the
    inputs. ``rows``: what stages of features found, as rows of the report.
    """

    source: str
    out: Path
    settings: Settings
    inputs: Inputs = field(default_factory=Inputs)
    start: Path | None = None
    plan: Plan | None = None
    estimator: Estimator | None = None
    timed: TimedRun | None = None
    reads_data: bool = True
    further: Sequence[float] = ()
    resident: Resident = field(default_factory=lambda: Resident(0))
    executor: Executor = EXECUTOR
    dense: DenseModel | None = None
    origin: Origin = field(default_factory=Origin)
    rows: Rows = field(default_factory=dict)

    @property
    def keeps_stages(self) -> bool:
        """Whether it chooses or trains something that the folder of an unfinished run should hold."""
        return not self.settings.fixed or self.settings.steps > 0

    @property
    def described(self) -> dict[str, object]:
        """What an unfinished run holds of it, and must be equal to continue it."""
        return list_fixed_values(self.source, self.settings)

    def check_unfinished_run(self) -> None:
        """Raise MptkError if the unfinished run beside the output is another one, or is not to be resumed."""
        # Only milliseconds mean a sparsity that nobody knows yet.
        found = FOUND if self.settings.max_ms is not None else [name for name in FOUND if name != "sparsity"]
        if self.keeps_stages:
            check_unfinished_run(self.out, self.described, self.settings.resume, but=(*found, GIVEN))

    def open_folder(self) -> Self:
        """The run with its folder, if it keeps stages. Its settings and its origin are known by now."""
        if not self.keeps_stages:
            return self
        described = {**self.described, GIVEN: dict(self.origin.parts)}
        return replace(self, folder=RunFolder(self.out, described, self.settings.resume))

    def remove_folder(self) -> None:
        """Remove the folder of the unfinished run, if there is one."""
        if self.folder is not None:
            self.folder.remove()

    def announce(self) -> None:
        """Say what the run needs. Raises MptkError if the machine has less."""
        if self.estimator is not None:
            needed = self.estimator.estimate(self.settings)
            self.progress(str(needed), 0, 0)
            check_room_for(needed, self.out)


def list_fixed_values(source: str, settings: Settings) -> dict[str, object]:
    """The values of a run that must be equal to continue it."""
    may_differ = {each.path for each in Settings.declared if each.setting.resumable}
    return {"model": source, **{k: v for k, v in to_json(settings).items() if k not in may_differ}}


@contextmanager
def open_run(
    model: Start,
    source: str,
    out: Path,
    asked: Settings,
    inputs: Inputs,
    context: Context,
    *,
    instead: Stage | None = None,
    trains: bool = True,
) -> Iterator[Run]:
    """A run whose output is locked and whose settings are complete and checked, for one result or measurement.

    ``instead``: what it does if it makes no cut. ``trains``: whether the settings' steps are run.

    Raises:
        MptkError: there is no such device; the output cannot be replaced, is an input of the run, or is locked by
            another process; the settings suit no model; or minutes were given, and the run takes longer.
    """
    start = model.folder if isinstance(model, PrunedFolder) else None
    with enter_run_state(asked.device), lock_outputs([out], asked, [source, start]):
        if not trains:  # there is no time limit to choose these by, so they have the defaults of a long run
            asked = with_keywords(asked, {"samples": asked.windows, **asked.further_numbers})
        plan, recovers = read_plan(asked), start is not None
        # Settings are checked before the machine is measured, which takes seconds, and before a config is read.
        settings = fill_in(asked, recovers, plan)
        check_settings(settings, plan, inputs.texts)
        estimator = read_estimator_of(model, asked.trust)
        if estimator is not None:
            estimator = replace(estimator, instead=instead)
        unfinished = read_kept_settings(out) if asked.resume and is_leader() else {}
        if asked.resume and is_leader() and not unfinished:
            announce_new_start(out, context.progress)
        if trains:  # the first process decides: rates that others measure would give them other numbers
            settings = run_once(
                lambda: complete_settings(asked, estimator, recovers=recovers, plan=plan, unfinished=unfinished)[0]
            )
        else:  # the settings' steps are not run, so nothing may count them
            settings = replace(settings, minutes=None, learning=replace(settings.learning, steps=0))
        run = make_run(source, out, settings, inputs, estimator, context)
        reads_data = not isinstance(model, PrunedFolder) or model.reads_data
        timed = time_run(asked, settings, recovers) if trains and estimator is not None else None
        yield replace(run, start=start, plan=plan, timed=timed, reads_data=reads_data)


def announce_new_start(out: Path, progress: Progress) -> None:
    """Say that a run that was to be resumed starts anew."""
    progress(f"there is nothing to resume beside {out}, so the run starts anew", 0, 0)


def make_run(
    source: str, out: Path, settings: Settings, inputs: Inputs, estimator: Estimator | None, context: Context
) -> Run:
    """A run with what it may use. Of several processes only the first shows its progress."""
    resident, executor = build_executor(settings)
    return Run(
        log=context.log,
        progress=context.progress if is_leader() else show_nothing,
        source=source,
        out=out,
        settings=settings,
        inputs=inputs,
        estimator=estimator,
        resident=resident,
        executor=executor,
    )


@contextmanager
def enter_run_state(device: str) -> Iterator[None]:
    """Let stages work: torch's and accelerate's state is the run's own, and errors are one line."""
    find_device(device)  # it fails here: accelerate's message for a missing device is vague
    with forget_sources(), separate_state(device), explain_errors():
        yield


def read_estimator_of(model: Start, trust: Trust) -> Estimator | None:
    """Estimates runs on a model; None if that is not possible."""
    if isinstance(model, PrunedFolder):
        return model.read_estimator(trust)
    if isinstance(model, Opened):  # estimates count the blocks and heads that a config of transformers names
        return None if model.plain else Estimator(model.loaded.model, model.loaded.dtype)
    return read_estimator(model, trust)


@contextmanager
def lock_outputs(outs: Sequence[Path], settings: Settings, read: Sequence[str | Path | None]) -> Iterator[None]:
    """Check that outputs may be replaced and are not read by the run, and lock them.

    ``read``: what the run reads, beside the files of its settings.
    """
    places = [place for place in (*read, settings.plan, settings.larger, settings.inputs) if place is not None]
    for out in outs:
        check_replaceable(out, settings.overwrite)
        check_apart(out, *places)
    if (cache := settings.learning.teacher_cache) is not None:
        check_apart(cache, *places, option="--teacher-cache")
    with claim_outputs(outs):
        yield


@contextmanager
def claim_outputs(outs: Sequence[Path]) -> Iterator[None]:
    """Lock outputs and the folders of their unfinished runs, so that only this run uses them.

    If several processes run, the first locks, and all of them raise if it cannot.
    """
    with ExitStack() as stack:

        def lock() -> None:
            # What killed runs left in temporary folders goes first: this run may need the room.
            check_scratch()
            tidy_shared()
            for out in outs:
                stack.enter_context(claim_place(out))

        run_once(lock)
        yield
