"""recovery: training a pruned folder against its dense model: ``prune`` again, from that folder's plan and weights."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from mptk.driver.prune import Run
from mptk.driver.settings import Settings
from mptk.driver.verification import read_report
from mptk.io.dense import load_dense
from mptk.io.manifest import check_manifest
from mptk.methods.maskprune.learner import Learning
from mptk.progress import Progress, silent


def recover(
    folder: str | Path,
    out: str | Path,
    learning: Learning,
    progress: Progress | None = None,
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Train a pruned folder against its dense model and write the result to ``out``; returns its report.

    Args:
        folder: an ``--out`` folder of ``prune``; its plan and its weights are where training starts.
        model: the dense model, if it is no longer where the folder's report says.
        trust_remote_code: whether the model's own Python code may run; the folder's report has no say in it.
        changes: fields of ``Settings`` that differ from those of the folder. ``data`` and ``eval_data``, which may
            name something to download, are never taken from it.

    Raises:
        MptkError: as ``prune``; the folder holds no pruned model, or is not as it was published; or the dense model is
            not there, or not the one that was pruned.
    """
    folder = Path(folder)
    report = read_report(folder)
    check_manifest(folder)
    known = {f.name for f in fields(Settings)} - {"learning", "data", "eval_data"}
    before = {k: v for k, v in report["settings"].items() if k in known}
    given = {"plan": str(folder / "plan.json"), "learning": learning, "trust_remote_code": trust_remote_code}
    settings = Settings(**{**before, **changes, **given, "reconstruct": False})
    run = Run(model or report["model"], Path(out), settings, progress or silent)
    run.base, run.dense = folder, lambda: load_dense(report, model, trust_remote_code)
    return run.run()
