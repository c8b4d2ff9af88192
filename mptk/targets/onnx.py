"""onnx: the ``onnx`` folder of a checkpoint: a float graph with a KV cache, and quantised graphs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mptk.errors import MptkError, ProofError
from mptk.ir.passes import Log
from mptk.run.chain import Compiled, Target
from mptk.run.settings import Settings
from mptk.run.values import Checks, Text
from mptk.runtime.decoder import OrtDecoder
from passes.targets.onnx.check_quantized import DIVERGENCES, check_quantized, divergence
from passes.verify import RUNTIME_TOLERANCE, Difference, StageLogits

FOLDER = "onnx"
HALF_TOLERANCE = 0.05
"""As ``RUNTIME_TOLERANCE``, for a float16 graph: rounded activations move SmolLM2-135M's logits by 0.009 of the
largest. The weights and the divergence of the logits are checked, too."""
DECODED = 4
"""Number of decoding steps at the end of a sequence, and at each border."""


class OnnxTarget(Target):
    """The task's own graph (for a decoder, one decoding step) with the dense weights, cut to the same plan."""

    name = "onnx"
    summary = "ONNX with a KV cache, beside another target"

    def emit(self, compiled: Compiled, text: Text, folder: Path, log: Log) -> list[str]:
        out = folder / FOLDER
        out.mkdir()
        try:
            _export(compiled, compiled.prepared.settings, text.calibration, out, log)
        except MptkError as error:
            out.rmdir()
            return [f"no ONNX: {error}"]
        return []

    def wrote(self, folder: Path) -> bool:
        return (folder / FOLDER / "model.onnx").is_file()

    def checks(self, compiled: Compiled, folder: Path, crossed: Sequence[int]) -> Checks:
        if not (folder / FOLDER).is_dir():
            return Checks()
        decoder = OrtDecoder(folder / FOLDER, device=compiled.prepared.executor.device)
        tolerance = HALF_TOLERANCE if decoder.half else RUNTIME_TOLERANCE
        stages: dict[str, tuple[StageLogits, float]] = {
            "ONNX Runtime prefill": (lambda ids: torch.from_numpy(decoder.prefill(ids.numpy())[0]), tolerance),
            "ONNX Runtime decode": (lambda ids: decoded(decoder, ids, crossed), tolerance),
        }
        return Checks(stages=stages, ran=dict.fromkeys(stages, decoder.providers[0]))

    def rounded(self, compiled: Compiled, folder: Path, batches: Sequence[Tensor]) -> list[Difference]:
        """For each quantised graph: the weights' error over the rounding limit, and the logits' error in nats a token.

        So has a main graph in float16. Its float32 graph is written to a temporary folder.

        Raises:
            ProofError: a graph cannot be read or run, or a weight differs by more than rounding allows.
        """
        main = folder / FOLDER / "model.onnx"
        files = sorted((folder / FOLDER).glob("model_*.onnx"))
        device = compiled.prepared.executor.device
        found = [d for file in files for d in _quantized(file, main, file.stem.removeprefix("model_"), batches, device)]
        if main.is_file() and OrtDecoder(main).half:
            with tempfile.TemporaryDirectory() as temporary:
                settings = replace(compiled.prepared.settings, onnx_dtype="float32")
                _export(compiled, settings, batches[0], Path(temporary), Log())
                found += _quantized(main, Path(temporary) / main.name, "fp16", batches, device)
        return found


def _export(compiled: Compiled, settings: Settings, text: Tensor, folder: Path, log: Log) -> None:
    prepared = replace(compiled.prepared, settings=settings)
    program = compiled.analysis.program
    state = program.state_dict().updated(program.state)  # tied weights by all their names
    prepared.task.export(prepared, compiled.chosen.plan, state, text, folder, log)


def _quantized(
    file: Path, whole: Path, scheme: str, batches: Sequence[Tensor], device: torch.device
) -> list[Difference]:
    """The differences of ``file`` from its float32 graph ``whole``."""
    try:
        share = check_quantized(whole, file, scheme)
        small, full = OrtDecoder(file, device=device), OrtDecoder(whole, device=device)
        pairs = [[torch.from_numpy(g.logits(ids.numpy())) for g in (small, full)] for ids in batches]
    except MptkError:
        raise
    except Exception as error:  # ONNX and ONNX Runtime share no error class
        reason = str(error).strip().partition("\n")[0]
        raise ProofError(f"the proof fails at '{scheme} weights': {file.name} does not run ({reason})") from error
    apart = max(divergence(*pair) for pair in pairs)
    return [
        Difference(f"{scheme} weights", share, share, 1.0),
        Difference(f"{scheme} logits", apart, apart, DIVERGENCES[scheme], ran=small.providers[0]),
    ]


def decoded(decoder: OrtDecoder, ids: Tensor, crossed: Sequence[int] = ()) -> tuple[Tensor, list[int]]:
    """Logits of decoding steps with a KV cache, [batch, steps, vocab], and their positions.

    Steps cross each border within the sequence, and its end. The tokens between are run in one call with the cache.
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
