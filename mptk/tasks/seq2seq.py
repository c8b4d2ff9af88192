"""seq2seq: models with an encoder and a decoder that predict a text from another text or from sound: T5, BART, Whisper.

The decoder is given the true text (teacher forcing). That text is what the dense model writes itself, greedily, so no
second column of data is needed and the targets are of the model's own kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from mptk.config import IN_MEMORY
from mptk.io import RANDOM_DATA, Loaded, Runs
from mptk.ir import IGNORED, Samples
from mptk.ort.decoder import DECODER_IDS
from mptk.progress import Progress
from mptk.protocols import SampleSets
from mptk.reading import Json
from mptk.tasks.base import TokenTask, explain_unlisted
from mptk.tasks.encoder_decoder_form import ENCODER_DECODER_FORM
from mptk.tasks.inputs import choose_inputs
from mptk.tasks.inputs.base import Named
from mptk.tasks.inputs.text import count_vocabulary, make_example_ids

ENCODER_DECODERS = (
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)
WRITTEN = 48
"""Tokens that the dense model writes for a sample, at most."""
BATCH_SAMPLES = 8
"""Samples for which it writes at once."""


class Seq2Seq(TokenTask):
    """An encoder and a decoder; families of both are cut together."""

    name = "seq2seq"
    summary = "encoder-decoder"
    onnx = ENCODER_DECODER_FORM

    def explain_refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        return explain_unlisted(ENCODER_DECODERS, config, classes, "predict a text from another input")

    def make_example(self, model: nn.Module) -> Samples:
        return Samples({**choose_inputs(model).make_example(model), DECODER_IDS: make_example_ids(length=5)})

    def make_samples(
        self, loaded: Loaded, inputs: Mapping[str, Tensor], data: str = IN_MEMORY, seed: int = 0
    ) -> Samples:
        """The inputs with what the dense model writes for them; random ones with random tokens."""
        inputs = {name: tensor for name, tensor in inputs.items() if name != DECODER_IDS}
        if data == RANDOM_DATA:
            generator = torch.Generator().manual_seed(seed)
            # Random inputs need no text that means something, so the model does not write one.
            shape = (len(next(iter(inputs.values()))), 12)
            ids = torch.randint(count_vocabulary(loaded.model), shape, generator=generator)
        else:
            ids = generate_answers(loaded.load_all(), inputs)
        # Teacher forcing: the decoder reads all tokens but the last, and each one's target is the next.
        end = loaded.model.generation_config.eos_token_id if loaded.model.generation_config is not None else None
        return Samples({**inputs, DECODER_IDS: ids[:, :-1]}, mask_after_end(ids, end))

    def measure_quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> Json:
        samples = sets.evaluation
        protocol = (
            f"{sets.source}: teacher-forced perplexity of what the dense model writes for {len(samples)} samples, "
            f"{self.count_predictions(samples):,} tokens predicted"
        )
        return self.compute_perplexities(runs, samples, progress, "perplexity", protocol)


def generate_answers(model: Any, inputs: Named) -> Tensor:
    """What the model writes for each sample, greedily, after a start token: int64 [samples, tokens], padded."""
    parts: list[Tensor] = []
    count = len(next(iter(inputs.values())))
    pad = model.generation_config.pad_token_id
    for first in range(0, count, BATCH_SAMPLES):
        batch = {name: tensor[first : first + BATCH_SAMPLES] for name, tensor in inputs.items()}
        with torch.no_grad():
            parts.append(model.generate(**batch, max_new_tokens=WRITTEN, do_sample=False, num_beams=1))
    longest = max(part.shape[1] for part in parts)
    fill = 0 if pad is None else pad
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])


def mask_after_end(ids: Tensor, end: int | list[int] | None) -> Tensor:
    """The targets of ids [samples, tokens]: the next token of each but the last, up to the first end of a text."""
    targets = ids[:, 1:].clone()
    # The end itself is a target; what was written to fill the row after it is not.
    ends = torch.isin(targets, torch.tensor([] if end is None else end, dtype=targets.dtype))
    over = ends.cumsum(1) - ends.long() > 0
    return targets.masked_fill(over, IGNORED)
