"""ladder: models of several sizes in one run. Each is cut further from the next larger one and begins with its weights.

Each rung is a run of its own (``mptk/run/larger.py``), with a folder, a proof and a report. They share the dense
model, its analysis and a cached teacher. Steps and minutes are those of the whole ladder, in equal parts. Sizes that
share weights are one run (``shared.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise, takewhile
from pathlib import Path

from mptk.compat.accelerate import separate_state
from mptk.config import IN_MEMORY, MOST_SPARSITY, UNIFORM, Settings, to_json, with_keywords
from mptk.distributed.processes import is_leader, run_once
from mptk.errors import InputError, OutputError
from mptk.features.ladder import LadderSettings
from mptk.features.ladder.estimate import LadderEstimator
from mptk.features.ladder.shared import check_shared
from mptk.files.outputs import check_apart
from mptk.io import RANDOM_DATA
from mptk.io.text.sources import SELF
from mptk.ir import Log
from mptk.protocols import (
    Context,
    Report,
    check_run_folder,
    make_run_folder,
    name_run_folder,
    read_kept_settings,
    remove_run_folder,
)
from mptk.publish.folder import check_replaceable
from mptk.publish.manifest import MARKER, check_manifest, is_ours
from mptk.run.checks import check_settings
from mptk.run.inputs import Inputs
from mptk.run.minutes import complete_settings, fill_in
from mptk.run.prune import Result, run_prune
from mptk.run.run import (
    FOUND,
    Run,
    Start,
    announce_new_start,
    claim_outputs,
    enter_run_state,
    list_fixed_values,
    lock_outputs,
    make_run,
    read_estimator_of,
)

TEACHER = "teacher"
"""Name of the folder of a cached teacher, within the folder of the unfinished ladder."""


def check_ladder(sparsities: Sequence[float], settings: Settings) -> None:
    """Raise MptkError if the sparsities or the settings do not suit a ladder."""
    if len(sparsities) < 2:
        raise InputError(
            "a ladder has two sizes or more; give them as 0.2,0.3,0.5, or --sparsity for one", name="sparsities"
        )
    if not all(0 < s <= MOST_SPARSITY for s in sparsities):
        raise InputError(
            f"the sparsities of a ladder lie above 0 and are at most {MOST_SPARSITY}; give 0.2,0.3,0.5",
            name="sparsities",
        )
    if any(one >= other for one, other in pairwise(sparsities)):
        raise InputError(
            f"the sparsities of a ladder ascend, each once; give {','.join(map(name_size, sorted({*sparsities})))}",
            name="sparsities",
            nearest=sorted({*sparsities}),
        )
    # Each of these decides a size by itself, or lets layers differ.
    given = {
        "plan": settings.plan and "--plan",
        "search": settings.divider,
        "larger": settings.larger and "--larger",
        "max_ms": settings.max_ms is not None and "a latency",
        "layers": settings.layers != UNIFORM and f"--layers {settings.layers}",
    }
    for name, wrong in given.items():
        if wrong:
            raise InputError(f"a ladder says what each model loses, in all layers alike; leave out {wrong}", name=name)
    if should_share_weights(settings):
        check_shared(settings)
    if 0 < (steps := settings.steps) < len(sparsities):
        count = len(sparsities)
        raise InputError(
            f"--steps {steps} is less than one for each of {count} models; give {count} or more",
            name="steps",
            nearest=(count,),
        )


def should_share_weights(settings: Settings) -> bool:
    """Whether all sizes are one set of weights."""
    return LadderSettings.of(settings).shared


def name_size(sparsity: float) -> str:
    """The name of a rung's folder."""
    return f"{sparsity:g}"


def divide_steps(asked: Settings, sparsities: Sequence[float]) -> Settings:
    """The settings of a rung, with its part of the ladder's steps. Checks both arguments (``check_ladder``)."""
    check_ladder(sparsities, asked)
    steps = asked.learning.steps
    return asked if steps is None else with_keywords(asked, {"steps": steps // len(sparsities)})


@contextmanager
def open_ladder(
    model: Start,
    source: str,
    out: Path,
    asked: Settings,
    sparsities: Sequence[float],
    inputs: Inputs,
    context: Context,
) -> Iterator[list[Run]]:
    """The runs of a ladder, the largest model first, whose outputs are locked; of sizes that share weights, one run.

    Their settings are complete: those of the unfinished ladder if it is resumed. ``sparsities``: of the sizes.

    Raises:
        MptkError: as ``open_run``; the sparsities or the settings do not suit a ladder; or ``out`` is a result itself.
    """
    asked = divide_steps(asked, sparsities)
    shared = should_share_weights(asked)
    places = [out] if shared else [out / name_size(sparsity) for sparsity in sparsities]
    if not shared and is_ours(out):
        raise OutputError(
            f"{out} is itself a result of mptk, and a ladder needs a folder of its own; give another --out", name=out
        )
    with enter_run_state(asked.device), lock_ladder(out, places, asked, source):
        check_settings(fill_in(asked), None, inputs.texts)
        # One process completes them for all: the others' own estimates could give other numbers.
        if asked.resume and is_leader() and not any(map(read_earlier, places)):
            announce_new_start(out, context.progress)
        settings = run_once(lambda: complete_ladder(model, asked, sparsities, places))
        each = make_run(source, out, settings, inputs, read_estimator_of(model, asked.trust), context)
        # The minutes are the whole ladder's: in the report of one size they would read as its own.
        if shared:
            settings = replace(settings, sparsity=sparsities[0], minutes=None)
            yield [replace(each, settings=settings, further=sparsities[1:])]
        else:
            yield list_rungs(each, sparsities, places)


@contextmanager
def lock_ladder(out: Path, places: Sequence[Path], settings: Settings, source: str) -> Iterator[None]:
    """Lock the folder of a ladder and all of its rungs, since each will be replaced, however late.

    Whether a rung may be replaced is checked later (``count_finished``): a finished one stays.
    """
    if should_share_weights(settings):
        with lock_outputs([out], settings, [source]):
            yield
        return
    with claim_outputs([out, *places]):
        yield


def complete_ladder(model: Start, asked: Settings, sparsities: Sequence[float], places: Sequence[Path]) -> Settings:
    """The complete settings that all rungs have: those of an unfinished ladder in ``places`` if it is resumed."""
    estimator = read_estimator_of(model, asked.trust)
    whole = None if estimator is None else LadderEstimator(**vars(estimator), sparsities=sparsities)
    unfinished = next(filter(None, map(read_earlier, places)), {}) if asked.resume else {}
    return complete_settings(asked, whole, unfinished=unfinished)[0]


def list_rungs(each: Run, sparsities: Sequence[float], places: Sequence[Path]) -> list[Run]:
    """The runs of the rungs. ``each``: what they have in common; its output is the ladder's."""
    settings = each.settings
    if settings.learning.teacher == "cached" and settings.learning.teacher_cache is None:
        # In the ladder's folder: in its own run's folder, each rung would run the same teacher again.
        settings = with_keywords(settings, {"teacher_cache": str(name_run_folder(each.out) / TEACHER)})
    own = list_settings(settings, sparsities, places)
    return [replace(each, out=places[i], settings=one, further=sparsities[i + 1 :]) for i, one in enumerate(own)]


def list_settings(settings: Settings, sparsities: Sequence[float], places: Sequence[Path]) -> list[Settings]:
    """The settings of the rungs. ``settings``: what they have in common."""
    found, larger = list[Settings](), None
    for i, (place, sparsity) in enumerate(zip(places, sparsities, strict=True)):
        # Each rung names the one before as its larger folder. `minutes` is None as in `open_ladder`.
        seed = settings.seed + i if should_draw_windows(settings) else settings.seed
        found.append(replace(settings, sparsity=sparsity, larger=larger, minutes=None, seed=seed))
        larger = str(place.resolve())
    return found


def should_draw_windows(settings: Settings) -> bool:
    """Whether the seed selects windows of a text. Each rung then gets its own seed, so that the ladder reads more."""
    return settings.data not in (SELF, RANDOM_DATA, IN_MEMORY)


def read_earlier(place: Path) -> Mapping[str, object]:
    """The settings of a rung that was begun or finished; empty if there is none."""
    kept = read_kept_settings(place)
    return kept if kept or not (place / MARKER).is_file() else to_json(Report.read(place).settings)


def climb(model: Start, out: Path, rungs: Sequence[Run]) -> Iterator[tuple[Run, Result | None]]:
    """Run the rungs in order, and yield each with its result; None if an earlier run finished it."""
    # All rungs are checked before the first one runs, which may take hours.
    done = run_once(lambda: count_finished(rungs))
    for rung in rungs[:done]:
        yield rung, None
    left, dense = rungs[done:], None
    with keep_teacher(out, left):
        for rung in left:
            rung.progress(f"sparsity {rung.out.name}", 0, 0)
            log = Log(on_record=rung.log.on_record)  # its own: a report has the stages of its rung only
            with separate_state(rung.settings.device):  # accelerate refuses a second Accelerator of another kind
                result = run_prune(model, replace(rung, log=log, dense=dense))
            dense = result.run.dense
            yield rung, result


@contextmanager
def keep_teacher(out: Path, left: Sequence[Run]) -> Iterator[None]:
    """Make the folder of a teacher that these rungs share. It stays if they are not finished."""
    place = name_run_folder(out)
    shares = bool(left) and left[0].settings.learning.teacher_cache == str(place / TEACHER) and is_leader()
    if shares:
        check_run_folder(place, left[0].settings.resume)
        make_run_folder(place)
    try:
        yield
    finally:
        if shares and (not (place / TEACHER).exists() or all((rung.out / MARKER).is_file() for rung in left)):
            remove_run_folder(place)


def count_finished(rungs: Sequence[Run]) -> int:
    """The number of rungs that are finished. Raises MptkError if one of the others may not be written."""
    # Only those before the first unfinished one: a later one was cut from what will be replaced.
    done = len(list(takewhile(is_finished, rungs)))
    for rung in rungs[done:]:
        settings = rung.settings
        check_replaceable(rung.out, settings.overwrite)
        check_apart(rung.out, *filter(None, (rung.source, settings.larger, settings.inputs)))
        rung.check_unfinished_run()
    return done


def is_finished(rung: Run) -> bool:
    """Whether an earlier run of the ladder finished a rung. Raises MptkError if its folder is another run's."""
    # A folder of an unfinished run beside it: the rung is being made again.
    if not rung.settings.resume or read_kept_settings(rung.out) or not (rung.out / MARKER).is_file():
        return False
    report = Report.read(rung.out)
    check_manifest(rung.out)
    before, now = list_fixed_values(rung.source, report.settings), rung.described
    may_differ = {*FOUND} - {"sparsity"}  # a ladder has no latency, so its sparsities are what was asked for
    if changed := sorted(name for name in now.keys() - may_differ if before[name] != now[name]):
        raise OutputError(
            f"{rung.out} was made with other settings ({', '.join(changed)}); give the same, or remove it",
            name=rung.out,
        )
    return True
