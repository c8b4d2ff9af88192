"""job: what a run starts from and what it ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mptk.config.settings import Settings
from mptk.cost.estimate import Estimate
from mptk.distributed.processes import once
from mptk.files import claimed
from mptk.io.cache import tidy_shared
from mptk.io.models import Loaded
from mptk.io.resident import Resident
from mptk.ir.plan import Plan
from mptk.ir.samples import Samples
from mptk.protocols.chain import Chosen, Compiled, Prepared
from mptk.protocols.report import Report
from mptk.protocols.task import Task
from mptk.publish.folder import check_apart, check_replaceable


@dataclass(frozen=True)
class Job:
    """What a run starts from and where it ends.

    ``load`` gives the dense model, whose weights are read when they are asked for. ``given`` gives the plan and the
    weights to start from (a recovery of the folder ``start``). If it is None, the method chooses them, or ``plan``
    gives the plan: what ``settings.plan`` names, which is read once, when the run starts. ``kept``: the share of the
    parameters that ``given`` keeps. ``needs`` says what the run will need, if that is known before the model is opened.
    ``samples``: those that the caller gives. ``vocabulary``: the texts that the caller gives, whose tokens stay.
    """

    source: str
    out: Path
    load: Callable[[Resident], tuple[Loaded, Task]]
    given: Callable[[Prepared], Chosen] | None = None
    kept: float = 1.0
    start: Path | None = None
    needs: Callable[[Settings], Estimate] | None = None
    samples: Callable[[Prepared], Given] | None = None
    vocabulary: Sequence[str] | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class Given:
    """Samples that the caller gives for training and calibration, and to measure on; None: as the settings say."""

    training: Samples | None = None
    evaluation: Samples | None = None


@contextmanager
def held(job: Job, overwrite: bool) -> Iterator[None]:
    """Within it the job's output, and the folder of its unfinished run, are this run's alone.

    ``overwrite``: as in ``Settings``.

    Raises:
        MptkError: it cannot be replaced, is read by the job, or is held by another process; in each of several
            processes, of which the first holds it.
    """
    check_replaceable(job.out, overwrite)
    check_apart(job.out, job.source, *([] if job.start is None else [job.start]))
    with ExitStack() as stack:

        def hold() -> None:
            tidy_shared()
            stack.enter_context(claimed(job.out))

        once(hold)
        yield


@dataclass(frozen=True)
class Finished:
    """The report of a proven folder, and what was compiled for it."""

    report: Report
    compiled: Compiled
