"""recovery: the job that begins with a pruned folder: its plan and its weights, and training that is not its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from torch import nn

from mptk.chain.amounts import in_time
from mptk.chain.estimate import estimated_for
from mptk.chain.job import Given, Job
from mptk.compile.changes import changes_of
from mptk.config.setting import values
from mptk.config.settings import Settings
from mptk.cost.estimate import Estimate
from mptk.distributed.processes import holds
from mptk.io.dense import open_dense
from mptk.io.models import Loaded
from mptk.io.resident import Resident
from mptk.protocols.chain import Chosen, Prepared
from mptk.protocols.report import Report
from mptk.protocols.task import Task
from mptk.publish.manifest import check_manifest
from mptk.targets.stock_config import check_code
from mptk.tasks.of_folder import task_of_folder


def needed(folder: str | Path, settings: Settings, model: str | None = None) -> Estimate:
    """What a recovery of ``folder`` needs. No model runs. Raises the errors of ``mptk.recover``."""
    job, settings = recovery(folder, "", settings, model)
    assert job.needs is not None
    return job.needs(in_time(settings, job.needs, recovers=True))


def recovery(
    folder: str | Path,
    out: str | Path,
    settings: Settings,
    model: str | nn.Module | None,
    dense: tuple[Loaded, Task] | None = None,
    samples: Callable[[Prepared], Given] | None = None,
) -> tuple[Job, Settings]:
    """The recovery of ``folder``, an ``--out`` folder of ``prune``, as a job, and its settings.

    What is cut comes from the folder's report, all else from ``settings``: the report decides neither ``data``, which
    may name something to download, nor whether the model's own Python code may run. ``model``: the dense model, if it
    has moved. ``dense``: the same model, if it is already open.

    Raises:
        MptkError: the folder holds no pruned model, or was changed.
    """
    folder, trust = Path(folder), settings.trust
    report = Report.read(folder)
    check_manifest(folder)
    changes = {**values(settings, "recover"), "learning": settings.learning}
    changes |= dict.fromkeys(("vocabulary", "kv_heads", "larger")) | {"reconstruct": False, "distil_epochs": 0}
    changes |= dict.fromkeys(("search", "shared"), False)
    settings = replace(report.settings, **changes, plan=str(folder / "plan.json"))

    def given(prepared: Prepared) -> Chosen:
        check_code(prepared.loaded.path, folder)
        assert prepared.plan is not None
        assert prepared.cut is not None
        found = changes_of(prepared.analysis, prepared.cut, folder, report, trust) if holds() else {}
        return Chosen(prepared.plan, prepared.cut, found)

    def load(resident: Resident) -> tuple[Loaded, Task]:
        if dense is not None:
            return dense
        loaded = open_dense(report.model, report.model_sha256, model, trust, resident, live=report.live)
        return loaded, task_of_folder(folder, report, loaded)

    @cache
    def sized() -> Loaded:
        return load(Resident(0))[0]

    def needs(settings: Settings) -> Estimate:
        kept = report.cost["pruned"]["parameters"] / report.cost["dense"]["parameters"]
        return estimated_for(sized().model, sized().dtype, settings, kept)

    source = model if isinstance(model, str) else report.model
    return Job(source, Path(out), load, given, folder, needs, samples), settings
