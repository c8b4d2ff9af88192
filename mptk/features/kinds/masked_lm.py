"""masked_lm: models that predict masked tokens from the tokens on both sides.

Loss and pseudo-perplexity count masked tokens only. Every ``STRIDE``-th token of a window is replaced by the mask
token, at the same positions for each model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from mptk.config import IN_MEMORY
from mptk.errors import FileError
from mptk.io import RANDOM_DATA, Loaded, Runs
from mptk.ir import IGNORED, Samples
from mptk.progress import Progress
from mptk.protocols import SampleSets
from mptk.reading import Json
from mptk.tasks.base import TokenTask, explain_unlisted
from mptk.tasks.inputs import Inputs
from mptk.tasks.inputs.text import TextWindows
from mptk.tasks.model_form import LOGITS_FORM

STRIDE = 7
"""One token in ``STRIDE`` is masked: 14 %, close to BERT's 15 %."""
FIRST = 3
"""The first masked position."""


class MaskedLM(TokenTask):
    """A masked language model: BERT, RoBERTa, ModernBERT."""

    name = "masked-lm"
    summary = "masked language model"
    priority = 60
    onnx = LOGITS_FORM

    def explain_refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        return explain_unlisted((MODEL_FOR_MASKED_LM_MAPPING_NAMES,), config, classes, "predict masked tokens")

    def find_inputs(self, model: nn.Module) -> Inputs:
        return TextWindows()

    def make_samples(
        self, loaded: Loaded, inputs: Mapping[str, Tensor], data: str = IN_MEMORY, seed: int = 0
    ) -> Samples:
        """Windows with some tokens masked. Random inputs and token ids in memory do without a mask token."""
        mask = getattr(loaded.tokenizer, "mask_token_id", None)
        if mask is None and data not in (RANDOM_DATA, IN_MEMORY):
            raise FileError(
                f"{loaded.source} has no tokenizer with a mask token, which its loss needs; add its files",
                name=loaded.source,
            )
        return mask_tokens(inputs["input_ids"], mask or 0)

    def compute_loss(self, output: Tensor, samples: Samples) -> Tensor:
        """The loss of ``TokenTask``. Perceiver gives logits of all its positions: those after the window go."""
        assert samples.targets is not None
        if isinstance(output, Tensor):
            output = output[:, : samples.targets.shape[1]]
        return super().compute_loss(output, samples)

    def measure_quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> Json:
        samples = sets.evaluation
        protocol = (
            f"{sets.source}: pseudo-perplexity, {len(samples)} windows of {samples.positions} tokens, one token in "
            f"{STRIDE} masked, {self.count_predictions(samples):,} predicted"
        )
        return self.compute_perplexities(runs, samples, progress, "pseudo-perplexity", protocol)


def mask_tokens(ids: Tensor, mask: int) -> Samples:
    """Windows of token ids, int64 [n, length], with some replaced by ``mask``; these are the targets."""
    hidden = (torch.arange(ids.shape[1], device=ids.device) % STRIDE == FIRST).expand(ids.shape)
    return Samples({"input_ids": ids.masked_fill(hidden, mask)}, ids.masked_fill(~hidden, IGNORED))


MASKED_LM = MaskedLM()
