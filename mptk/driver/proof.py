"""proof: what a pruned folder must be, stage by stage, and the tokens on which its logits are compared.

The stages are in the order in which a user of the folder would meet a fault: its config, its weights, and then the
logits of the rewritten graph, the reloaded checkpoint and ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mptk.driver.configs import check_code, check_config
from mptk.driver.stock import Written
from mptk.errors import MptkError, ProofError
from mptk.io import models
from mptk.ir.families import Analysis
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from mptk.ir.resolved_plan import resolve_plan
from mptk.runtime.decoder import OrtDecoder
from passes.analysis.borders import Reach, reach
from passes.targets.onnx.check_quantized import DIVERGENCES, check_quantized, divergence
from passes.transforms.masked_reference import mask
from passes.verify import RUNTIME_TOLERANCE, TOLERANCE, Difference, StageLogits, difference, prove

SHAPE = (2, 48)
"""Sequences and tokens of the short batch."""
DECODED = 4
"""Decoding steps at the end of a sequence, and across each border."""
EXACT = 1e-6
"""Largest difference of a stored weight, relative to the largest of its tensor."""


@dataclass(frozen=True)
class Claim:
    """What a folder is said to hold: an analysed dense model (with changed weights, if some are), cut to a plan.

    ``written``: the dense model and the config that the plan asks for; None for the graph target. ``trust``: whether
    the caller trusts the model's own code.
    """

    analysis: Analysis
    plan: Plan
    pruned: Program
    written: Written | None
    trust: bool = False

    def masked(self) -> Program:
        """The reference: the dense model with the removed channels masked."""
        return mask(self.analysis, resolve_plan(self.analysis, self.plan))


def prove_folder(
    claim: Claim, folder: Path, batches: Sequence[Tensor], crossed: Sequence[int] = ()
) -> list[Difference]:
    """Every stage's difference. ``batches``: token ids [batch, sequence]; ``crossed``: borders that decoding crosses.

    Raises:
        MptkError: the config is not what it must be; or the folder cannot be loaded.
    """
    stages: dict[str, tuple[StageLogits, float]] = {"rewritten graph": (claim.pruned, TOLERANCE)}
    exact: list[Difference] = []
    if claim.written is not None:
        check_code(claim.written.loaded.path, folder)
        exact.append(check_config(claim.written, folder, claim.trust))
        reloaded = models.load(str(folder), trust_remote_code=claim.trust).model
        stored = reloaded.state_dict()
        stages["reloaded checkpoint"] = (lambda ids: reloaded(ids, use_cache=False).logits, TOLERANCE)
        expected = claim.pruned.state_dict()
    else:
        stored, expected = load_file(folder / "model.safetensors"), dict(claim.pruned.state)
    exact.append(weights_stage(stored, expected))
    if (folder / "onnx").is_dir():
        stages |= onnx_stages(folder / "onnx", crossed)
    found = [*exact, *prove(claim.masked(), stages, *batches)]
    return [*found, *quantized_stages(folder / "onnx", batches)] if all(d.ok for d in found) else found


def onnx_stages(folder: Path, crossed: Sequence[int]) -> dict[str, tuple[StageLogits, float]]:
    """The float graph's stages."""
    decoder = OrtDecoder(folder)
    return {
        "ONNX Runtime prefill": (lambda ids: torch.from_numpy(decoder.prefill(ids.numpy())[0]), RUNTIME_TOLERANCE),
        "ONNX Runtime decode": (lambda ids: decoded(decoder, ids, crossed), RUNTIME_TOLERANCE),
    }


def quantized_stages(folder: Path, batches: Sequence[Tensor]) -> list[Difference]:
    """Of each quantised graph the weights, as a share of what rounding may do, and the logits, in nats a token.

    Raises:
        ProofError: a graph cannot be read or run, or a weight is further away than rounding brings it.
    """
    found = []
    for file in sorted(folder.glob("model_*.onnx")):
        scheme = file.stem.removeprefix("model_")
        try:
            share = check_quantized(folder / "model.onnx", file, scheme)
            small, full = OrtDecoder(file), OrtDecoder(folder)
            pairs = [[torch.from_numpy(g.logits(ids.numpy())) for g in (small, full)] for ids in batches]
        except MptkError:
            raise
        except Exception as error:  # ONNX and ONNX Runtime share no error class
            reason = str(error).strip().partition("\n")[0]
            raise ProofError(f"the proof fails at '{scheme} weights': {file.name} does not run ({reason})") from error
        apart = max(divergence(*pair) for pair in pairs)
        found.append(Difference(f"{scheme} weights", share, share, 1.0))
        found.append(Difference(f"{scheme} logits", apart, apart, DIVERGENCES[scheme]))
    return found


def decoded(decoder: OrtDecoder, ids: Tensor, crossed: Sequence[int] = ()) -> tuple[Tensor, list[int]]:
    """StageLogits of decoding steps with the cache of what came before, and the positions that they are of.

    Steps are taken across each border that lies within the sequence and at its end; what lies between is prefilled
    with the cache of what came before it.
    """
    length = ids.shape[1]
    starts = [max(1, border - DECODED // 2) for border in crossed if border + DECODED <= length]
    single = sorted({p for start in (*starts, length - DECODED) for p in range(start, start + DECODED)})
    steps, cache, done = [], decoder.empty(len(ids)), 0
    for position in single:
        if position > done:
            _, cache = decoder.decode(ids[:, done:position].numpy(), cache)
        logits, cache = decoder.decode(ids[:, position : position + 1].numpy(), cache)
        steps.append(torch.from_numpy(logits.copy()))
        done = position + 1
    return torch.cat(steps, 1), single


def weights_stage(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Difference:
    """Every stored weight against that of the rewritten graph.

    Raises:
        MptkError: one of them has a weight that the other has not, or of another shape.
    """
    worst = Difference("stored weights", 0.0, 0.0, EXACT)
    for name in sorted(stored.keys() | expected.keys()):
        if name not in stored or name not in expected or stored[name].shape != expected[name].shape:
            raise ProofError(f"the proof fails at 'stored weights': {name} is missing or of another shape; prune again")
        if not torch.equal(stored[name], expected[name]):
            one, other = (tensor.float().flatten()[None, None] for tensor in (stored[name], expected[name]))
            found = difference("stored weights", one, other, EXACT)
            worst = found if not found.relative <= worst.relative else worst
    return worst


def witness(stage: str, masked: Program, logits: Tensor, tokens: Tensor, tolerance: float) -> Difference:
    """The difference of a trained model, which gave ``logits`` on ``tokens`` before its weights were taken over."""
    return prove(masked, {stage: (lambda _: logits, tolerance)}, tokens)[0]


def proof_batches(windows: Tensor, length: int = 0) -> list[Tensor]:
    """The short batch of ``windows`` [n, tokens] and, if ``length`` is not 0, one sequence of so many tokens of it."""
    short = windows[: SHAPE[0], : SHAPE[1]]
    if not length:
        return [short]
    flat = windows.flatten()
    return [short, flat.repeat(-(-length // len(flat)))[None, :length]]


def find_reach(claim: Claim, config: Any, bound: int) -> Reach:
    """How far the proof must go: past the borders of the graph, of the dense config and of the one written."""
    written = [] if claim.written is None else [claim.written.stock.config]
    return reach(claim.analysis.program, config, *written, bound=bound)


def check_proof(proof: Sequence[Difference], remedy: str) -> None:
    """Raise ProofError for the first stage above its tolerance, with what to do about it."""
    for d in proof:
        if d.failure:
            raise ProofError(f"the proof fails at '{d.stage}': it does not run ({d.failure}); {remedy}")
        if not d.ok:
            what = "weights differ" if d.stage == "stored weights" else "logits differ"
            raise ProofError(
                f"the proof fails at '{d.stage}': {what} by {d.max_abs:.2g} ({d.relative:.1e} of the largest, "
                f"tolerance {d.tolerance:.0e}); {remedy}"
            )
