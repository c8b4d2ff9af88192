"""recovery: ``mptk.recover``: train a pruned folder against its dense model, by ``prune`` from its plan and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from torch import nn

from mptk.api.pruned import Pruned, Shown, finished
from mptk.api.samples import Data, given, names_of
from mptk.api.sources import Model
from mptk.api.words import public
from mptk.chain.amounts import in_time
from mptk.chain.estimate import estimated_for
from mptk.chain.job import Given, Job
from mptk.compile.changes import changes_of
from mptk.config.setting import values, with_keywords
from mptk.config.settings import Settings
from mptk.cost.estimate import Estimate
from mptk.distributed.processes import holds
from mptk.errors import MptkError
from mptk.io.dense import open_dense
from mptk.io.models import Loaded
from mptk.io.resident import Resident
from mptk.ir.passes import PassRecord
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
    folder, trust = Path(folder), settings.trust_remote_code
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


@public
def recover(
    pruned: Pruned | str | Path,
    out: str | Path | None = None,
    settings: Settings | None = None,
    *,
    model: Model | None = None,
    progress: Shown = "auto",
    on_stage: Callable[[PassRecord], None] | None = None,
    data: Data | None = None,
    eval_data: Data | None = None,
    **keywords: object,
) -> Pruned | None:
    """Train a pruned model against its dense model and prove the result.

    Args:
        pruned: a ``Pruned``, or an ``--out`` folder of ``prune``.
        out, progress, on_stage, data, eval_data: as in ``prune``.
        settings: only fields that do not decide what is cut count: ``learning``, ``length``, ``device``, …
        model: the dense model, if it has moved since the report was written. A ``Pruned`` from ``prune`` knows it.
        keywords: as in ``prune``.

    Raises:
        MptkError: as ``prune``; the folder was changed; or the dense model is missing or was changed.
    """
    settled = {each.path for each in Settings.declared if "recover" not in each.setting.on}
    if refused := sorted(settled & keywords.keys()):
        raise MptkError(
            f"recover cannot change {refused[0]}, which was decided when the model was pruned; prune again to change it"
        )
    base = settings or Settings(onnx=out is not None)
    chosen = with_keywords(base, {**names_of(data=data, eval_data=eval_data), **keywords})
    start = pruned.place if isinstance(pruned, Pruned) else pruned
    dense = None
    if isinstance(pruned, Pruned) and pruned.compiled is not None and model is None:
        prepared = pruned.compiled.prepared
        dense = prepared.given, prepared.task
    there, samples = str(model) if isinstance(model, Path) else model, given(data, eval_data)
    return finished(lambda place: recovery(start, place, chosen, there, dense, samples), out, progress, on_stage)
