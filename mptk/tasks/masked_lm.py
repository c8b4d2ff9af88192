"""masked_lm: models that predict masked tokens from the tokens on both sides.

Loss and pseudo-perplexity count masked tokens only. Every ``STRIDE``-th token of a window is replaced by the mask
token, at the same positions for each model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from mptk.config.settings import Settings
from mptk.errors import MptkError
from mptk.io.evaluation import Runs
from mptk.io.models import Loaded
from mptk.io.text.sources import RANDOM
from mptk.ir.samples import IGNORED, Samples
from mptk.progress import Count, Progress
from mptk.protocols.values import SampleSets
from mptk.tasks.base import TokenTask, known_to
from mptk.tasks.inputs.text import TextWindows, example_ids
from mptk.tasks.model_form import LOGITS, ModelForm

STRIDE = 7
"""One token in ``STRIDE`` is masked: 14 %, close to BERT's 15 %."""
FIRST = 3


@dataclass(frozen=True)
class MaskedLM(TokenTask):
    """A masked language model: BERT, RoBERTa, ModernBERT. ``mask``: its mask token."""

    mask: int = 0
    name = "masked-lm"
    summary = "masked language model"
    onnx = ModelForm(LOGITS)

    def refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        return known_to((MODEL_FOR_MASKED_LM_MAPPING_NAMES,), config, classes, "predict masked tokens")

    def with_mask(self, loaded: Loaded, data: str) -> MaskedLM:
        """The task with the model's mask token, which random inputs do without."""
        mask = getattr(loaded.tokenizer, "mask_token_id", None)
        if mask is None and data != RANDOM:
            raise MptkError(f"{loaded.source} has no tokenizer with a mask token, which its loss needs; add its files")
        return MaskedLM(mask or 0)

    def example(self, model: nn.Module) -> Samples:
        return Samples({"input_ids": example_ids()})

    def samples(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Samples:
        task = self.with_mask(loaded, settings.data)
        return task.masked(TextWindows().calibration(loaded, settings, count, progress)["input_ids"])

    def evaluation(self, loaded: Loaded, settings: Settings) -> Samples:
        task = self.with_mask(loaded, settings.eval_data or settings.data)
        return task.masked(TextWindows().evaluation(loaded, settings)["input_ids"])

    def made(self, loaded: Loaded, inputs: Mapping[str, Tensor]) -> Samples:
        return self.masked(inputs["input_ids"])

    def loss(self, output: Tensor, samples: Samples) -> Tensor:
        """As of other models of tokens. Perceiver gives logits of all its positions: those after the window go."""
        assert samples.targets is not None
        if isinstance(output, Tensor):
            output = output[:, : samples.targets.shape[1]]
        return super().loss(output, samples)

    def masked(self, ids: Tensor) -> Samples:
        """Windows of token ids, int64 [n, length], with some masked; these are the targets."""
        hidden = _masked(ids)
        return Samples({"input_ids": ids.masked_fill(hidden, self.mask)}, ids.masked_fill(~hidden, IGNORED))

    def quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> dict[str, Any]:
        samples = sets.evaluation
        protocol = (
            f"{sets.source}: pseudo-perplexity, {len(samples)} windows of {samples.positions} tokens, one token in "
            f"{STRIDE} masked, {self.predicted(samples):,} predicted"
        )
        return self.perplexities(runs, samples, progress, "pseudo-perplexity", protocol)


def _masked(ids: Tensor) -> Tensor:
    """Which tokens are masked, boolean in the shape of ``ids`` [windows, length]."""
    return (torch.arange(ids.shape[1], device=ids.device) % STRIDE == FIRST).expand(ids.shape)
