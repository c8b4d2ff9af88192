"""describe: the report of a proven folder, from the values that the run made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mptk.driver.claims import costs, widths
from mptk.io import data
from mptk.io.dense import absolute, fingerprint
from mptk.io.evaluation import LogitsFn
from mptk.io.manifest import listed, update_manifest, weights_digest
from mptk.progress import Count
from mptk.run.chain import Compiled, Proven
from mptk.run.report import FILE, Report
from mptk.run.settings import Settings
from mptk.run.values import Context, Text
from mptk.runtime.decoder import OrtDecoder
from mptk.targets.stock_config import config_changes
from mptk.version import __version__


def describe(
    compiled: Compiled, proven: Proven, text: Text, notes: list[str], folder: Path, context: Context
) -> Report:
    """Everything that is known of a proven folder but how good it is, which ``measured`` adds."""
    prepared, chosen = compiled.prepared, compiled.chosen
    figures = costs(prepared.cost, chosen.plan, prepared.loaded.dtype)
    return Report(
        mptk=__version__,
        model=absolute(prepared.source),
        model_sha256=fingerprint(prepared.source, local=True),
        settings=prepared.settings,
        families=widths(prepared.analysis, chosen.plan),
        sparsity=1 - figures["pruned"]["block"] / figures["dense"]["block"],
        cost=figures,
        splits=chosen.losses,
        trained=chosen.trained,
        weights_sha256=weights_digest(folder),
        perplexity={},
        quantized=_sizes(folder, prepared.settings.quantize),
        proof=[d.as_dict() for d in proven.differences],
        proof_tokens=text.proof.tolist(),
        proof_length=proven.length,
        config_changes={} if compiled.written is None else config_changes(compiled.written),
        plan_sha256=chosen.plan.digest,
        notes=[note for note in notes if note],
        stages=context.log.as_list(),
        files=sorted([*listed(folder), FILE]),
        task=prepared.task.name,
        text=used_text(text, prepared.settings),
    )


def used_text(text: Text, settings: Settings) -> dict[str, Any]:
    """What was trained, calibrated and measured on: source and hash of each set of windows, and of the files."""
    sources = {"training": settings.data, "calibration": settings.data, "evaluation": text.source}
    windows = {"training": text.training, "calibration": text.calibration, "evaluation": text.evaluation}
    if not settings.steps:
        del windows["training"]
    used: dict[str, Any] = {
        name: {"source": sources[name], "windows": len(ids), "length": ids.shape[1], "sha256": data.digest(ids)}
        for name, ids in windows.items()
    }
    for name in used.keys() - {"evaluation"}:
        used[name]["seed"] = settings.seed
    return {**used, "files": data.file_digests(settings.data, settings.eval_data)}


def measured(report: Report, compiled: Compiled, text: Text, folder: Path, context: Context) -> Report:
    """The report with the quality of the dense, the pruned and each quantised graph of the published ``folder``."""
    prepared = compiled.prepared
    rounded: dict[str, LogitsFn] = {}
    if prepared.settings.logits == "all":
        rounded = {scheme: OrtDecoder(folder / row["file"]).torch_logits for scheme, row in report.quantized.items()}

    def runs(batches: Sequence[Tensor], progress: Count) -> Iterator[tuple[str, int, Tensor]]:
        programs = {"dense": prepared.analysis.program, "pruned": compiled.program}
        results = prepared.executor.outputs(list(programs.values()), [(ids,) for ids in batches], progress)
        for i, ids in enumerate(batches):
            for name in programs:
                yield name, i, next(results)
            for name, run in rounded.items():
                yield name, i, run(ids)

    with context.stage("perplexity"):
        quality = prepared.task.quality(runs, text, context.progress)
    quantized = {
        scheme: {**row, "perplexity": quality.pop(scheme)} if scheme in quality else row
        for scheme, row in report.quantized.items()
    }
    report = replace(report, perplexity=quality, quantized=quantized, stages=context.log.as_list())
    report.write(folder)
    update_manifest(folder, FILE)
    return report


def _sizes(folder: Path, schemes: Sequence[str]) -> dict[str, dict[str, str | int]]:
    """Scheme → the quantised graph's file and the bytes of all its files."""
    files = {scheme: folder / "onnx" / f"model_{scheme}.onnx" for scheme in schemes}
    return {
        scheme: {
            "file": str(file.relative_to(folder)),
            "bytes": sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")),
        }
        for scheme, file in files.items()
        if file.is_file()
    }
