"""masked_lm: models that predict masked tokens from the tokens on both sides.

Loss and pseudo-perplexity count masked tokens only. Every ``STRIDE``-th token of a window is replaced by the mask
token, at the same positions for each model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from mptk.errors import MptkError
from mptk.io import data
from mptk.io.evaluation import Runs
from mptk.io.models import Loaded
from mptk.ir.passes import Log
from mptk.ir.plan import Plan
from mptk.ir.weights import Weights
from mptk.progress import Count, Progress
from mptk.run.chain import Prepared, Task
from mptk.run.settings import Settings
from mptk.run.values import Text
from mptk.tasks.windows import calibration_windows, evaluation_windows

STRIDE = 7
"""One token in ``STRIDE`` is masked: 14 %, close to BERT's 15 %."""
FIRST = 3
IGNORED = -100


@dataclass(frozen=True)
class MaskedLM(Task):
    """A masked language model: BERT, RoBERTa, ModernBERT. ``mask``: its mask token."""

    mask: int | None = None
    name = "masked-lm"
    summary = "masked language model"

    def refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        known = {
            c
            for found in MODEL_FOR_MASKED_LM_MAPPING.values()
            for c in (found if isinstance(found, tuple) else (found,))
        }
        if classes and classes <= known:
            return None
        return f"{min((c.__name__ for c in classes), default=type(config).__name__)} does not predict masked tokens"

    def bind(self, loaded: Loaded) -> Task:
        mask = getattr(loaded.tokenizer, "mask_token_id", None)
        if mask is None:
            raise MptkError(f"{loaded.source} has no tokenizer with a mask token, which its loss needs; add its files")
        return MaskedLM(mask)

    def windows(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Tensor:
        if settings.data == data.SELF:
            raise MptkError(f"{loaded.source} cannot write text to calibrate on; give some with --data")
        return calibration_windows(loaded, settings, count, progress)

    def evaluation(self, loaded: Loaded, settings: Settings) -> Tensor:
        config = loaded.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", settings.eval_length)
        return evaluation_windows(loaded, settings, min(settings.eval_length, limit))

    def inputs(self, ids: Tensor) -> Tensor:
        assert self.mask is not None
        return ids.masked_fill(_masked(ids), self.mask)

    def loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        targets = ids.masked_fill(~_masked(ids), IGNORED)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def predicted(self, ids: Tensor) -> int:
        return int(_masked(ids).sum())

    def logits(self, module: PreTrainedModel, ids: Tensor) -> Tensor:
        logits: Tensor = module(input_ids=ids).logits
        return logits

    @torch.no_grad()
    def quality(self, runs: Runs, text: Text, progress: Progress) -> dict[str, float | str]:
        windows = text.evaluation
        tokens = self.predicted(windows)
        rows = windows.split(1)
        totals: dict[str, float] = {}
        say = partial(progress, "pseudo-perplexity")
        for name, i, logits in runs([self.inputs(row) for row in rows], say):
            totals[name] = totals.get(name, 0.0) + float(self.loss(logits, rows[i].to(logits.device)))
        result: dict[str, float | str] = {n: round(math.exp(total / tokens), 4) for n, total in totals.items()}
        result["protocol"] = (
            f"{text.source}: pseudo-perplexity, {len(windows)} windows of {windows.shape[1]} tokens, one token in "
            f"{STRIDE} masked, {tokens:,} predicted"
        )
        return result

    def export(self, prepared: Prepared, plan: Plan, state: Weights, text: Tensor, folder: Path, log: Log) -> None:
        raise MptkError("only decoders are written as ONNX; export the folder with torch.onnx or optimum")


def _masked(ids: Tensor) -> Tensor:
    """Which tokens are masked, boolean in the shape of ``ids`` [windows, length]."""
    return (torch.arange(ids.shape[1], device=ids.device) % STRIDE == FIRST).expand(ids.shape)
