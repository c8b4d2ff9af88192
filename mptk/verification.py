"""verification: the stages of the proof, and ``verify``, which proves a pruned folder again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import passes.trace
from mptk import models, pipeline
from mptk.api import cut_program, plan_of
from mptk.cut import resolve_plan
from mptk.errors import MptkError
from mptk.families import Analysis
from mptk.plan import Plan
from mptk.program import Program
from mptk.runtime import OrtDecoder
from passes import group
from passes.mask import mask
from passes.verify import RUNTIME_TOLERANCE, TOLERANCE, Difference, Logits, prove

REPORT = "mptk-report/1"
DECODED = 4


def proof_stages(pruned: Program, folder: Path, checkpoint: bool) -> dict[str, tuple[Logits, float]]:
    """The stages that there are to prove: the rewritten graph, the reloaded checkpoint, ONNX prefill and decode."""
    stages: dict[str, tuple[Logits, float]] = {"rewritten graph": (pruned, TOLERANCE)}
    if checkpoint:
        reloaded = models.load(str(folder)).model
        stages["reloaded checkpoint"] = (lambda ids: reloaded(ids, use_cache=False).logits, TOLERANCE)
    if (folder / "onnx").is_dir():
        decoder = OrtDecoder(folder / "onnx")
        stages["ONNX Runtime prefill"] = (
            lambda ids: torch.from_numpy(decoder.prefill(ids.numpy())[0]),
            RUNTIME_TOLERANCE,
        )
        stages["ONNX Runtime decode"] = (lambda ids: decoded(decoder, ids), RUNTIME_TOLERANCE)
    return stages


def decoded(decoder: OrtDecoder, ids: Tensor) -> Tensor:
    """Logits of the last ``DECODED`` positions, each from a decoding step with the cache of those before."""
    _, cache = decoder.prefill(ids[:, :-DECODED].numpy())
    steps = []
    for position in range(ids.shape[1] - DECODED, ids.shape[1]):
        logits, cache = decoder.decode(ids[:, position : position + 1].numpy(), cache)
        steps.append(torch.from_numpy(logits.copy()))
    return torch.cat(steps, 1)


def require(proof: Sequence[Difference], remedy: str) -> None:
    """Raise MptkError for the first stage above its tolerance, with what to do about it."""
    for d in proof:
        if not d.ok:
            raise MptkError(
                f"the proof fails at '{d.stage}': logits differ by {d.max_abs:.2g} ({d.relative:.1e} of the largest, "
                f"tolerance {d.tolerance:.0e}); {remedy}"
            )


def verify(folder: str | Path, *, model: str | None = None) -> list[Difference]:
    """Prove a pruned folder again, from the dense model and ``plan.json``; returns each stage's difference.

    Args:
        folder: an ``--out`` folder of ``prune``.
        model: the dense model, where it is no longer where the report says.

    Raises:
        MptkError: the folder or the dense model is missing, or a stage is above its tolerance.
    """
    folder = Path(folder)
    plan = plan_of(folder)
    report = read_report(folder)
    loaded = models.load(model or report["model"], trust_remote_code=report["settings"]["trust_remote_code"])
    analysis = group.analyze(passes.trace.trace(loaded.model, dynamic=True))
    analysis = replace(analysis, program=analysis.program.with_state(changes_of(analysis, plan, folder, report)))
    pruned, _ = cut_program(analysis, plan, pipeline.Log())
    stages = proof_stages(pruned, folder, report["settings"]["target"] == "stock")
    tokens = torch.tensor(report["proof_tokens"])
    proof = prove(mask(analysis, resolve_plan(analysis, plan)), stages, tokens)
    require(proof, "do not use it, and prune the model again")
    return proof


def changes_of(analysis: Analysis, plan: Plan, folder: Path, report: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Weights in which the folder differs from a cut of the dense model: trained ones, or FLAP's biases."""
    if (folder / "compensation.safetensors").is_file():
        return load_file(folder / "compensation.safetensors")
    if not report["trained"]:
        return {}
    if weights_digest(folder) != report["weights_sha256"]:
        raise MptkError(f"the weights in {folder} are not those that were proven; do not use them, prune again")
    small = models.load(str(folder)).model.state_dict()
    return widened(analysis, plan, {name: small[name] for name in report["trained"]})


def widened(analysis: Analysis, plan: Plan, small: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense weights with a cut model's weights at the positions that stay."""
    cut, state = resolve_plan(analysis, plan), analysis.program.state
    return {name: cut.scatter(state[name], tensor, analysis.weights[name]) for name, tensor in small.items()}


def weights_digest(folder: Path) -> str:
    """SHA-256 of the folder's weight files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_report(folder: str | Path) -> dict[str, Any]:
    """``report.json`` of a pruned folder. Raises MptkError if there is none, or it is no report."""
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise MptkError(f"{folder} holds no report.json; give the --out folder of `mptk prune`")
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise MptkError(f"{path} is damaged ({error}); prune the model again") from error
    if report.get("format") != REPORT:
        raise MptkError(f"{path} is no {REPORT}; read it with the version of mptk that wrote it")
    return report
