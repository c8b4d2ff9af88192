"""describe: the report of a proven folder, from the values that the run made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mptk.driver.claims import costs, widths
from mptk.io.dense import absolute, fingerprint
from mptk.io.evaluation import LogitsFn
from mptk.io.manifest import listed, weights_digest
from mptk.run.chain import Compiled, Proven
from mptk.run.report import FILE, Report
from mptk.run.values import Context, Text
from mptk.runtime.decoder import OrtDecoder
from mptk.targets.stock_config import config_changes
from mptk.version import __version__


def describe(
    compiled: Compiled, proven: Proven, text: Text, notes: list[str], folder: Path, context: Context
) -> Report:
    """Measure how good the cut model is, and say all that is known of it."""
    prepared, chosen = compiled.prepared, compiled.chosen
    with context.stage("perplexity"):
        quality, quantized = measure(compiled, text, folder, context)
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
        perplexity=quality,
        quantized=quantized,
        proof=[d.as_dict() for d in proven.differences],
        proof_tokens=text.proof.tolist(),
        proof_length=proven.length,
        config_changes={} if compiled.written is None else config_changes(compiled.written),
        plan_sha256=chosen.plan.digest,
        notes=[note for note in notes if note],
        stages=context.log.as_list(),
        files=sorted([*listed(folder), FILE]),
        task=prepared.task.name,
    )


def measure(
    compiled: Compiled, text: Text, folder: Path, context: Context
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Quality of the dense and the pruned graph, and size and quality of each quantised ONNX graph."""
    prepared = compiled.prepared
    files = {scheme: folder / "onnx" / f"model_{scheme}.onnx" for scheme in prepared.settings.quantize}
    files = {scheme: file for scheme, file in files.items() if file.is_file()}
    runs: dict[str, LogitsFn] = {"dense": prepared.analysis.program, "pruned": compiled.program}
    if prepared.settings.logits == "all":
        runs |= {scheme: OrtDecoder(file).torch_logits for scheme, file in files.items()}
    quality = prepared.task.quality(runs, text, context.progress)
    quantized: dict[str, dict[str, Any]] = {}
    for scheme, file in files.items():
        size = sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))
        quantized[scheme] = {"file": str(file.relative_to(folder)), "bytes": size}
        if scheme in quality:
            quantized[scheme]["perplexity"] = quality.pop(scheme)
    return quality, quantized
