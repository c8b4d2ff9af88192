"""job: the inputs of a run, and its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mptk.config.settings import Settings
from mptk.cost.estimate import Estimate
from mptk.distributed.processes import once
from mptk.files import check_scratch, claimed
from mptk.files.outputs import check_apart
from mptk.io.cache import tidy_shared
from mptk.io.models import Loaded
from mptk.io.resident import Resident
from mptk.ir.plan import Plan
from mptk.ir.samples import Samples
from mptk.protocols.chain import Chosen, Compiled, Prepared
from mptk.protocols.conversion import Analysed, Conversion
from mptk.protocols.report import Report
from mptk.protocols.task import Task
from mptk.protocols.values import SampleSets
from mptk.publish.folder import check_replaceable

AnalysedDense = tuple[Analysed, tuple[Conversion, ...]]
"""The dense model after its conversions, and these."""


@dataclass(frozen=True)
class Job:
    """The inputs of a run and its output folder.

    ``load`` returns the dense model, whose weights are read on demand. ``given`` returns the plan and the weights that
    a recovery of the folder ``start`` begins with. If it is None, ``plan`` returns the plan of ``settings.plan``, which
    is read once at the start, or the method chooses.
    ``needs`` estimates the run with complete settings, if that is possible. ``samples``: the caller's samples.
    ``vocabulary``: the caller's texts, whose tokens stay. ``further``: sparsities to which its result is cut further.
    ``ladder``: the sparsities of all sizes, if they share weights.
    ``dense`` gives what the function makes: the analysed model, which the runs of a ladder share.
    """

    source: str
    out: Path
    load: Callable[[Resident], tuple[Loaded, Task]]
    given: Callable[[Prepared], Chosen] | None = None
    start: Path | None = None
    needs: Callable[..., Estimate] | None = None
    samples: Callable[[Prepared], Given] | None = None
    vocabulary: Sequence[str] | None = None
    plan: Plan | None = None
    further: Sequence[float] = ()
    ladder: Sequence[float] = ()
    dense: Callable[[Callable[[], AnalysedDense]], AnalysedDense] = lambda make: make()


@dataclass(frozen=True)
class Given:
    """The caller's samples for training and calibration, and to measure on; None: as the settings say."""

    training: Samples | None = None
    evaluation: Samples | None = None


@contextmanager
def held(job: Job, settings: Settings) -> Iterator[None]:
    """Lock the job's output and the folder of its unfinished run, so that only this run uses them.

    Raises:
        MptkError: the output cannot be replaced, is an input of the job, or is locked by another process. If several
            processes run, the first locks, and all of them raise.
    """
    check_replaceable(job.out, settings.overwrite)
    places = job.source, job.start, settings.plan, settings.larger, settings.inputs
    read = [place for place in places if place is not None]
    check_apart(job.out, *read)
    if (cache := settings.learning.teacher_cache) is not None:
        check_apart(cache, *read, option="--teacher-cache")
    with ExitStack() as stack:

        def hold() -> None:
            check_scratch()
            tidy_shared()
            stack.enter_context(claimed(job.out))

        once(hold)
        yield


@dataclass(frozen=True)
class Finished:
    """The report of a proven folder, the compiled model, and the samples of the run."""

    report: Report
    compiled: Compiled
    sets: SampleSets
