"""causal_lm: models that predict the next token from the tokens before it.

A model is recognised before weights are read, by classes that generate text. ``check`` then finds out whether its
logits depend on later tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.config import IN_MEMORY
from mptk.errors import ModelError, MptkError
from mptk.io import Loaded, Runs, measure_perplexities
from mptk.ir import Samples, make_token_samples
from mptk.progress import Progress
from mptk.protocols import SampleSets
from mptk.tasks.base import TokenTask
from mptk.tasks.decoder_form import DECODER_FORM
from mptk.tasks.inputs import Inputs
from mptk.tasks.inputs.text import TEXT_LENGTH, TextWindows, make_example_ids


class CausalLM(TokenTask):
    """A causal language model, with a KV cache or a state."""

    name = "causal-lm"
    summary = "decoder"
    priority = 80
    caches = True
    onnx = DECODER_FORM

    def explain_refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        name = min((c.__name__ for c in classes), default=type(config).__name__)
        if getattr(config, "is_encoder_decoder", False):
            return f"{name} has an encoder and a decoder"
        if classes and not any(c.can_generate() for c in classes):
            return f"{name} does not predict the next token"
        if not getattr(config, "causal", True):  # XLM and Flaubert generate by masked tokens at the end
            return f"{name} looks at later tokens"
        return None

    def check(self, loaded: Loaded, run: Callable[[Samples], Any], example: Samples) -> None:
        # Two texts with the same first token: its logits differ only if the model looks at later ones. They are longer
        # than the example, since a trace may not hold for fewer tokens than it was made with.
        ids = make_example_ids(1, TEXT_LENGTH + 1).repeat(2, 1)
        ids[1, 1:] += 1
        found = run(make_token_samples(ids))
        name = type(loaded.model).__name__
        # The config of a class with code of its own may have no ``vocab_size``.
        vocabulary = getattr(loaded.model.config.get_text_config(), "vocab_size", 0)
        if not isinstance(found, Tensor) or found.shape[:-1] != ids.shape or found.shape[2] < vocabulary:
            raise make_kind_error(loaded.source, f"no {self.summary}: {name} gives no logits for every token")
        first = found[:, 0].float()
        if (first[0] - first[1]).abs().max() > 1e-4 * first.abs().max():  # more than rounding
            raise make_kind_error(loaded.source, f"no {self.summary}: {name} looks at later tokens")

    def find_inputs(self, model: nn.Module) -> Inputs:
        return TextWindows()

    def make_example(self, model: nn.Module) -> Samples:
        return make_token_samples(make_example_ids())

    def make_samples(
        self, loaded: Loaded, inputs: Mapping[str, Tensor], data: str = IN_MEMORY, seed: int = 0
    ) -> Samples:
        return make_token_samples(inputs["input_ids"])

    def measure_quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> dict[str, float | str]:
        ids = sets.evaluation.inputs["input_ids"]
        return measure_perplexities(runs, ids, data=sets.source, progress=partial(progress, "perplexity"))


def make_kind_error(model: str, what: str) -> MptkError:
    """The error for a model that no task takes. ``what``: what it is not, and why."""
    return ModelError(
        f"{model} is {what}; `mptk prune` takes it with examples of what it reads, --inputs FILE (docs/kinds.md)",
        name=model,
    )
