"""recovery: training a pruned folder against its dense model: ``prune`` again, from that folder's plan and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mptk.chain.estimate import estimated_for
from mptk.chain.job import Given, Job
from mptk.chain.prepare import settled
from mptk.chain.prune import run
from mptk.compat.torch import sources_forgotten
from mptk.compile.changes import changes_of
from mptk.config.settings import Learning, Settings
from mptk.cost.estimate import Estimate
from mptk.distributed.processes import holds
from mptk.io.dense import open_dense
from mptk.io.models import Loaded
from mptk.io.resident import Resident
from mptk.ir.passes import Log, Record
from mptk.progress import Progress, silent
from mptk.protocols.chain import Chosen, Prepared
from mptk.protocols.report import Report
from mptk.protocols.task import Task
from mptk.protocols.values import Context
from mptk.publish.manifest import check_manifest
from mptk.targets.stock_config import check_code
from mptk.tasks.of_folder import task_of_folder


@sources_forgotten()
def recover(
    folder: str | Path,
    out: str | Path,
    learning: Learning,
    progress: Progress | None = None,
    *,
    model: str | None = None,
    on_stage: Callable[[Record], None] | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> Report | None:
    """Train a pruned folder against its dense model and write the result to ``out``; returns its report.

    Args:
        folder: an ``--out`` folder of ``prune``; its plan and its weights are where training starts.
        model: the dense model, if it is no longer where the folder's report says.
        trust_remote_code: whether the model's own Python code may run; the folder's report has no say in it.
        on_stage: as in ``prune``.
        changes: fields of ``Settings`` that differ from those of the folder. ``data`` and ``eval_data``, which may
            name something to download, are never taken from it.

    Raises:
        MptkError: as ``prune``; the folder holds no pruned model, or is not as it was published; or the dense model is
            not there, or not the one that was pruned.
    """
    job, settings = recovery(folder, out, learning, model, trust_remote_code, changes)
    finished = run(job, settings, Context(Log(on_record=on_stage), progress or silent))
    return None if finished is None else finished.report


def needed(
    folder: str | Path,
    learning: Learning,
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> Estimate:
    """What ``recover`` will need with these arguments. No model is run. Errors are those of ``recover``."""
    job, settings = recovery(folder, "", learning, model, trust_remote_code, changes)
    loaded, _ = job.load(Resident(0))
    return estimated_for(loaded.model, loaded.dtype, settled(settings), job.kept)


def recovery(
    folder: str | Path,
    out: str | Path,
    learning: Learning,
    model: str | nn.Module | None,
    trust_remote_code: bool,
    changes: Mapping[str, Any],
    dense: tuple[Loaded, Task] | None = None,
    samples: Callable[[Prepared], Given] | None = None,
) -> tuple[Job, Settings]:
    """The recovery of ``folder`` as a job, and its settings. ``dense``: the dense model, if it is opened already."""
    folder = Path(folder)
    report = Report.read(folder)
    check_manifest(folder)
    changes = {"data": Settings.data, "eval_data": Settings.eval_data, "overwrite": False, **changes}
    changes |= {"reconstruct": False}
    changes |= {"distil_epochs": 0, "search": False, "vocabulary": None, "kv_heads": None}
    changes |= {"plan": str(folder / "plan.json"), "learning": learning, "trust_remote_code": trust_remote_code}
    settings = replace(report.settings, **changes)

    def given(prepared: Prepared) -> Chosen:
        check_code(prepared.loaded.path, folder)
        assert prepared.plan is not None
        assert prepared.cut is not None
        found = changes_of(prepared.analysis, prepared.cut, folder, report, trust_remote_code) if holds() else {}
        return Chosen(prepared.plan, prepared.cut, found)

    def load(resident: Resident) -> tuple[Loaded, Task]:
        if dense is not None:
            return dense
        loaded = open_dense(report.model, report.model_sha256, model, trust_remote_code, resident, live=report.live)
        return loaded, task_of_folder(folder, report, loaded)

    kept = report.cost["pruned"]["parameters"] / report.cost["dense"]["parameters"]
    source = model if isinstance(model, str) else report.model
    return Job(source, Path(out), load, given, kept, folder, samples=samples), settings
