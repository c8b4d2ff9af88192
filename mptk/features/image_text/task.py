"""image_text: models that write text after images and text: LLaVA, Qwen2-VL, SmolVLM, Gemma 3.

Vision tower, projector and language model are one program, so units of all are scored by the loss of the text. The
class may compute parts of a tower that it then leaves unused (LLaVA takes the features of the last layer but one). The
program keeps them, since the checkpoint holds their weights, and these get the widths of the other layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mptk.config import IN_MEMORY
from mptk.features.image_text.form import IMAGE_TEXT_FORM
from mptk.features.image_text.image_forms import (
    KNOWN_SIZES,
    arrange_inputs,
    find_trace_constants,
    hold_constants,
    make_other_size,
)
from mptk.features.image_text.inputs import FILLED, ImagesWithText, find_image_token, shift_tokens, with_images
from mptk.io import Loaded, Runs
from mptk.ir import IGNORED, Samples, make_token_samples
from mptk.progress import Progress
from mptk.protocols import SampleSets
from mptk.reading import Json
from mptk.tasks.base import TokenTask, explain_unlisted
from mptk.tasks.causal_lm import make_kind_error
from mptk.tasks.inputs import Inputs
from mptk.tasks.inputs.base import EXAMPLES, PIXELS, POSITIONS, Named
from mptk.tasks.inputs.text import TEXT_LENGTH, make_example_ids
from mptk.tasks.padding import IDS, TYPES
from passes.frontend.trace import Flat, find_cache_switch, unwrap_module


def make_call_inputs(model: Any, inputs: Mapping[str, Tensor]) -> Named:
    """``arguments``, and which tokens are text (1) if the class lets all tokens see later ones unless it is told."""
    found, text = arrange_inputs(inputs), model.config.get_text_config()
    told = TYPES in inspect.signature(model.forward).parameters
    if told and getattr(text, "use_bidirectional_attention", False) is True:
        found[TYPES] = (inputs[IDS] != find_image_token(model)).long()
    return found


class Pictured(Flat):
    """A model called with images in samples, whose logits depend, times zero, on features that the class leaves unused.

    ``numbers``: what a trace holds as numbers: how many patches there are depends on the images' sizes. ``marks``: the
    tokens that stand for images, in all samples.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], numbers: Mapping[str, Tensor | int], marks: int
    ) -> None:
        super().__init__(module, names)
        self.numbers, self.marks = dict(numbers), marks

    def forward(self, *inputs: Tensor) -> Tensor:
        named = make_call_inputs(self.module, dict(zip(self.names, inputs, strict=True)))
        with hold_constants(named.get(PIXELS), self.numbers, self.marks) as held:
            output = self.module(**named | held, **self.keywords, return_dict=True)
        features = getattr(getattr(output, "image_outputs", None), "last_hidden_state", None)
        logits: Tensor = output.logits
        # Without this the trace would drop the tower's unused parts, whose weights the checkpoint holds.
        return logits if features is None else logits + 0.0 * features.sum()


class ImageText(TokenTask):
    """A causal language model that reads images; the loss is of the text."""

    name = "image-text-to-text"
    summary = "vision-language model"
    priority = 90  # before the decoder, which also takes one
    sequences = False
    onnx = IMAGE_TEXT_FORM

    def explain_refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        if getattr(config, "is_encoder_decoder", False):
            return f"{type(config).__name__} has an encoder and a decoder"
        if getattr(config, "vision_config", config) is None:  # as of Gemma 4 for text only
            return f"{type(config).__name__} has no vision encoder"
        if not all(hasattr(c, "get_image_features") for c in classes):
            return f"{min(c.__name__ for c in classes)} has no get_image_features"
        return explain_unlisted((MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,), config, classes, "read images with text")

    def choose_wrapper(self, model: nn.Module, example: Samples) -> Callable[[nn.Module, Sequence[str]], Flat]:
        marks = int((example.inputs[IDS] == find_image_token(model)).sum())
        return partial(Pictured, numbers=find_trace_constants(model, example.inputs), marks=marks)

    def open_sizes(self, example: Samples) -> Mapping[str, tuple[int, ...]]:
        """Text length and, if the trace holds no images' sizes, batch. Images have one size, for which tokens stand."""
        # A trace that holds the sizes of images holds their number, too.
        batch = () if example.inputs.keys() & KNOWN_SIZES else (0,)
        length = {IDS: (1,), POSITIONS: (2,)}
        return {name: (*batch, *length.get(name, ())) for name in example.inputs}

    def call(self, module: nn.Module, samples: Samples, **more: Any) -> Any:
        return module(**make_call_inputs(unwrap_module(module), samples.inputs), **find_cache_switch(module), **more)

    def choose_example(self, example: Samples, samples: Samples) -> Samples:
        """Images of the size of the data's: the trace holds it. Text without images if the data has none."""
        few = Samples(samples.inputs)
        return few[:EXAMPLES] if len(few) >= EXAMPLES else few.repeat(EXAMPLES)

    def make_further(self, model: Any, samples: Samples) -> Mapping[str, Samples]:
        """The text without images, or with images of noise if it has none; and with images of another size if the
        class takes several."""
        ids = samples.inputs[IDS]
        text = torch.where(ids == find_image_token(model), shift_tokens(model, ids), ids)
        cases = {"without images": Samples({IDS: text})}
        if PIXELS not in samples.inputs:
            found = with_images(model, text[:EXAMPLES, -TEXT_LENGTH:], torch.Generator().manual_seed(1))
            cases = {"with images": Samples(found)}
        if (resized := make_other_size(model)) is not None:
            found = with_images(model, text[:EXAMPLES, -TEXT_LENGTH:], torch.Generator().manual_seed(1), resized)
            cases["with images of another size"] = Samples(found)
        return cases

    def name_parts(self, model: Any) -> Mapping[str, Sequence[str]]:
        """Vision tower and language model as transformers finds them; what else has parameters is the projector."""
        names = {module: name for name, module in model.named_modules()}
        tower, decoder = names[model.get_encoder(modality="image")], names[model.get_decoder()]
        base = names[model.base_model]
        children = (
            f"{base}.{name}"
            for name, child in model.base_model.named_children()
            if any(True for _ in child.parameters())
        )
        between = [name for name in children if not any(f"{part}.".startswith(f"{name}.") for part in (tower, decoder))]
        return {"vision_tower": [tower], "projector": between, "language_model": [decoder]}

    def check(self, loaded: Loaded, run: Callable[[Samples], Any], example: Samples) -> None:
        ids = example.inputs[IDS]
        changed = ids.clone()
        # Only the last token differs, so no other token's logits may.
        changed[:, -1] = shift_tokens(loaded.model, ids[:, -1])
        found, other = (run(Samples({**example.inputs, IDS: each})) for each in (ids, changed))
        name = type(loaded.model).__name__
        if not isinstance(found, Tensor) or found.shape[:-1] != ids.shape:
            raise make_kind_error(loaded.source, f"no {self.summary}: {name} gives no logits for every token")
        if (found - other)[:, :-1].abs().max() > 1e-4 * found.abs().max():  # more than rounding
            raise make_kind_error(loaded.source, f"no {self.summary}: {name} looks at later tokens")

    def find_inputs(self, model: nn.Module) -> Inputs:
        return ImagesWithText()

    def make_example(self, model: nn.Module) -> Samples:
        return Samples(self.find_inputs(model).make_example(model))

    def make_examples(self, model: nn.Module) -> Sequence[Samples]:
        """With images, and without."""
        return self.make_example(model), Samples({IDS: make_example_ids()})

    def make_samples(
        self, loaded: Loaded, inputs: Mapping[str, Tensor], data: str = IN_MEMORY, seed: int = 0
    ) -> Samples:
        """Each text token is to be predicted, except the ones that fill up a short text."""
        given = {name: tensor for name, tensor in inputs.items() if name != FILLED}
        targets = make_token_samples(given[IDS]).targets
        assert targets is not None
        targets = targets.masked_fill(targets == find_image_token(loaded.model), IGNORED)
        if FILLED in inputs:
            ends = inputs[FILLED][:, None] - 1
            targets = targets.masked_fill(torch.arange(targets.shape[1]) >= ends, IGNORED)
        return Samples(given, targets)

    def measure_quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> Json:
        samples, shown = sets.evaluation, "without images"
        if (pixels := samples.inputs.get(PIXELS)) is not None:
            shown = f"each with an image ({' x '.join(map(str, pixels.shape[1:]))})"
        protocol = (
            f"{sets.source}: perplexity of the text of {len(samples)} samples, {shown}, "
            f"{self.count_predictions(samples):,} tokens predicted"
        )
        return self.compute_perplexities(runs, samples, progress, "perplexity", protocol)


IMAGE_TEXT = ImageText()
