"""ladder: models of several sizes in one run. Each is cut further from the next larger one and begins with its weights.

Each rung is a run of its own (``mptk/chain/larger.py``), with a folder, a proof and a report. They share the dense
model, its analysis and a cached teacher. Steps and minutes are those of the whole ladder, in equal parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path

from mptk.chain.amounts import in_time, resumed, settled
from mptk.chain.job import Finished, Job
from mptk.chain.prune import FOUND, described, run, started
from mptk.chain.shared import check_shared, together
from mptk.config.choices import IN_MEMORY, MOST_SPARSITY, UNIFORM
from mptk.config.setting import to_json, with_keywords
from mptk.config.settings import Settings
from mptk.cost.estimate import Estimate, total
from mptk.distributed.processes import leads, once
from mptk.errors import MptkError
from mptk.files import claimed
from mptk.io.text.sources import RANDOM_DATA, SELF
from mptk.protocols.report import Report
from mptk.protocols.run_folder import (
    GIVEN,
    beside,
    check_run_folder,
    check_unfinished,
    kept_settings,
    make_run_folder,
    remove_run_folder,
)
from mptk.protocols.values import Context
from mptk.publish.folder import check_replaceable
from mptk.publish.manifest import MARKER, check_manifest, is_ours
from mptk.reading import Made

Needs = Callable[[Settings], Estimate]
TEACHER = "teacher"
"""Name of the folder of a cached teacher, within the folder of the unfinished ladder."""


@dataclass(frozen=True)
class LadderRun:
    """The run that makes one rung: its folder and its settings."""

    out: Path
    settings: Settings

    def finished(self, source: str) -> bool:
        """Whether an earlier run of the ladder finished it.

        Raises:
            MptkError: its folder was changed, or made from another model or with other settings.
        """
        if not self.settings.resume or kept_settings(self.out) or not (self.out / MARKER).is_file():
            return False
        report = Report.read(self.out)
        check_manifest(self.out)
        before, now = described(source, report.settings), described(source, self.settings)
        may_differ = {*FOUND} - {"sparsity"}
        if changed := sorted(name for name in now.keys() - may_differ if before[name] != now[name]):
            raise MptkError(
                f"{self.out} was made with other settings ({', '.join(changed)}); give the same, or remove it"
            )
        return True


def check_ladder(sparsities: Sequence[float], settings: Settings) -> None:
    """Raise MptkError if the sparsities or the settings do not suit a ladder."""
    if len(sparsities) < 2:
        raise MptkError("a ladder has two sizes or more; give them as 0.2,0.3,0.5, or --sparsity for one")
    if not all(0 < s <= MOST_SPARSITY for s in sparsities):
        raise MptkError(f"the sparsities of a ladder lie above 0 and are at most {MOST_SPARSITY}; give 0.2,0.3,0.5")
    if any(one >= other for one, other in pairwise(sparsities)):
        raise MptkError(
            f"the sparsities of a ladder ascend, each once; give {','.join(map(name_of, sorted({*sparsities})))}"
        )
    given = {
        "--plan": settings.plan is not None,
        "--search": settings.search,
        "--larger": settings.larger is not None,
        "a latency": settings.max_ms is not None,
        f"--layers {settings.layers}": settings.layers != UNIFORM,
    }
    if wrong := next((name for name, is_given in given.items() if is_given), None):
        raise MptkError(f"a ladder says what each model loses, in all layers alike; leave out {wrong}")
    if settings.shared:
        check_shared(settings)
    if 0 < (steps := settings.steps) < len(sparsities):
        count = len(sparsities)
        raise MptkError(f"--steps {steps} is less than one for each of {count} models; give {count} or more")


def name_of(sparsity: float) -> str:
    """The name of a rung's folder."""
    return f"{sparsity:g}"


def needs_of(needs: Needs, sparsities: Sequence[float]) -> Needs:
    """Estimates a ladder from the settings that its rungs share."""
    return lambda settings: total([needs(replace(settings, sparsity=sparsity)) for sparsity in sparsities])


def divided(asked: Settings, sparsities: Sequence[float]) -> Settings:
    """The settings of a rung, with its part of the ladder's steps.

    Raises:
        MptkError: the sparsities or the settings do not suit a ladder.
    """
    check_ladder(sparsities, asked)
    steps = asked.learning.steps
    return asked if steps is None else with_keywords(asked, {"steps": steps // len(sparsities)})


def rungs(out: Path, asked: Settings, sparsities: Sequence[float], needs: Needs | None) -> list[LadderRun]:
    """The rungs, the largest model first, with complete settings: those of an unfinished ladder if it is resumed.

    Raises:
        MptkError: as ``complete``.
    """
    places = [out / name_of(sparsity) for sparsity in sparsities]
    each = complete(places, asked, sparsities, needs)
    if (learning := each.learning).teacher == "cached" and learning.teacher_cache is None:
        each = with_keywords(each, {"teacher_cache": str(beside(out) / TEACHER)})
    found, larger = list[LadderRun](), None
    for i, (place, sparsity) in enumerate(zip(places, sparsities, strict=True)):
        seed = each.seed + i if selects(each) else each.seed
        found.append(LadderRun(place, replace(each, sparsity=sparsity, larger=larger, minutes=None, seed=seed)))
        larger = str(place.resolve())
    return found


def complete(places: Sequence[Path], asked: Settings, sparsities: Sequence[float], needs: Needs | None) -> Settings:
    """The settings that all rungs have: those of an unfinished ladder in ``places`` if it is resumed.

    Raises:
        MptkError: as ``divided``; or minutes were given, and the ladder takes longer.
    """
    each = divided(asked, sparsities)
    if asked.resume:
        each = resumed(each, next(filter(None, map(_earlier, places)), {}))
    return settled(each) if needs is None else in_time(each, needs_of(needs, sparsities))


def share(job: Job, asked: Settings, sparsities: Sequence[float], context: Context) -> Finished:
    """Make one folder of all sizes, which share their weights (``chain/shared.py``). Raises the errors of ``climb``."""
    each = complete([job.out], asked, sparsities, job.needs)
    job = replace(job, further=sparsities[1:], ladder=sparsities)
    return started(together, job, replace(each, sparsity=sparsities[0], minutes=None), context)


def selects(settings: Settings) -> bool:
    """Whether the seed selects windows of a text: those of the next rung are others, so that the ladder reads more."""
    return settings.data not in (SELF, RANDOM_DATA, IN_MEMORY)


def _earlier(place: Path) -> Mapping[str, object]:
    """The settings of a rung that was begun or finished; empty if there is none."""
    kept = kept_settings(place)
    return kept if kept or not (place / MARKER).is_file() else to_json(Report.read(place).settings)


def climb(
    job: Job, out: Path, steps: Sequence[LadderRun], context: Callable[[LadderRun], Context]
) -> Iterator[tuple[LadderRun, Finished | None]]:
    """Run the rungs in order, and yield each with its result; None if an earlier run finished it.

    ``job``: of the ladder. ``context``: makes the context of a rung's run.
    """
    if is_ours(out):
        raise MptkError(f"{out} is itself a result of mptk, and a ladder needs a folder of its own; give another --out")
    with lock_ladder(out, steps):
        done = once(lambda: finished(job, steps))
        yield from ((rung, None) for rung in steps[:done])
        left = steps[done:]
        given = None if job.samples is None else first_only(job.samples)
        job = replace(job, load=first_only(job.load), dense=first_only(lambda make: make()), samples=given)
        with keep_teacher(out, left):
            for i, rung in enumerate(left, 1):
                further = [each.settings.sparsity for each in left[i:]]
                yield rung, run(replace(job, out=rung.out, further=further), rung.settings, context(rung))


@contextmanager
def lock_ladder(out: Path, steps: Sequence[LadderRun]) -> Iterator[None]:
    """Lock the folder of a ladder and all of its rungs, since each will be replaced, however late.

    Raises:
        MptkError: as ``claimed``, for the first of them. If several processes run, the first locks.
    """
    with ExitStack() as stack:

        def lock() -> None:
            for place in (out, *(rung.out for rung in steps)):
                stack.enter_context(claimed(place))

        once(lock)
        yield


@contextmanager
def keep_teacher(out: Path, left: Sequence[LadderRun]) -> Iterator[None]:
    """The folder of a teacher that these rungs share, which stays if they are not finished.

    Raises:
        MptkError: something that is not mptk's has its name.
    """
    place = beside(out)
    shares = bool(left) and left[0].settings.learning.teacher_cache == str(place / TEACHER) and leads()
    if shares:
        check_run_folder(place, left[0].settings.resume)
        make_run_folder(place)
    try:
        yield
    finally:
        if shares and (not (place / TEACHER).exists() or all((rung.out / MARKER).is_file() for rung in left)):
            remove_run_folder(place)


def finished(job: Job, steps: Sequence[LadderRun]) -> int:
    """The number of rungs that are finished. Raises MptkError if one of the others may not be written."""
    done = len(list(takewhile(lambda rung: rung.finished(job.source), steps)))
    for rung in steps[done:]:
        check_replaceable(rung.out, rung.settings.overwrite)
        check_unfinished(rung.out, described(job.source, rung.settings), rung.settings.resume, but=(*FOUND, GIVEN))
    return done


def first_only(make: Callable[..., Made]) -> Callable[..., Made]:
    """A function that makes a value at its first call, and gives the same at the next ones."""
    made = list[Made]()

    def ask(*arguments: object) -> Made:
        if not made:
            made.append(make(*arguments))
        return made[0]

    return ask
