"""perplexity: a decoder's perplexity, in torch or ONNX Runtime, and its results in lm-eval tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mptk.config.settings import Settings
from mptk.io import data as text
from mptk.io import evaluation
from mptk.io.evaluation import LogitsFn, Perplexity
from mptk.ort.generation import TextGenerator
from mptk.progress import Progress
from mptk.protocols.execution import find_device, session_device
from mptk.tasks import load_decoder


def of_model(
    model: str,
    data: str | None,
    settings: Settings,
    progress: Progress,
    length: int,
    windows: int | None,
    tasks: Sequence[str],
    include_path: Path | None,
    limit: int | None,
) -> tuple[Perplexity | None, dict[str, Any] | None]:
    """The perplexity of a decoder in torch on ``data``, and its results in ``tasks``; None if not asked for."""
    trust, measured, scores = settings.trust_remote_code, None, None
    evaluation.check_trusted(include_path, trust)
    progress("load", 0, 0)
    there = find_device(settings.device)
    loaded = load_decoder(model, trust_remote_code=trust)
    module: Any = loaded.model.to(there)  # type: ignore[arg-type]
    if data is not None:
        text.check_length(loaded.model, length)
        held_out = text.evaluation_windows(loaded.tokenizer, data, length, windows)
        text.check_ids(loaded.model, held_out)
        measured = _measured(lambda ids: module(ids.to(there), use_cache=False).logits, held_out, data, progress)
    if tasks:
        progress("lm-eval", 0, 0)
        scores = evaluation.zero_shot(loaded, tasks, include_path=include_path, limit=limit, trust_remote_code=trust)
    return measured, scores


def of_graph(
    model: str, data: str, settings: Settings, progress: Progress, length: int, windows: int | None
) -> Perplexity:
    """The perplexity of an exported graph, plain or quantised, in ONNX Runtime."""
    progress("load", 0, 0)
    runner = TextGenerator(model, threads=settings.threads, device=session_device(settings.device))
    text.check_positions(runner.positions, length, f"windows of {length} tokens")
    held_out = text.evaluation_windows(runner.tokenizer, data, length, windows)
    runner.check_ids(held_out.flatten().tolist())
    return _measured(runner.decoder.torch_logits, held_out, data, progress)


def _measured(logits: LogitsFn, windows: Tensor, data: str, progress: Progress) -> Perplexity:
    return evaluation.perplexity(
        logits,
        windows,
        data=text.protocol_name(data),
        progress=lambda done, total: progress("perplexity", done, total),
    )
