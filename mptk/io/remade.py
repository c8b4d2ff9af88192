"""remade: a model with another config and other weights, as ``io/models.py`` opens a model of a folder."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace

from accelerate import init_empty_weights
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from mptk.errors import TargetError
from mptk.files import make_scratch
from mptk.io.checkpoint import copy_beside, save_tokenizer
from mptk.io.models import Loaded
from mptk.ir import Weights


def rebuild_model(
    loaded: Loaded,
    config: PreTrainedConfig,
    stored: PreTrainedConfig,
    weights: Weights,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    generation: GenerationConfig | None,
    what: str,
    remedy: str,
) -> Loaded:
    """The model of the same class with ``config``, ``weights``, tokenizer and generation config.

    Its folder is a temporary one. It holds what a run reads of a checkpoint beside the weights.

    Args:
        stored: ``config`` as its folder has it, with the type of the stored weights.
        what: what the model now has, for the error; ``remedy``: what to do if its class cannot have that.

    Raises:
        MptkError: the class has other weights with this config.
    """
    model = _build_model(loaded.model, config, weights, what, remedy)
    place = make_scratch()
    weakref.finalize(model, place.close)  # later stages read the folder as long as there is the model
    stored.save_pretrained(place.folder)
    copy_beside(loaded.path, place.folder)
    if generation is not None:
        model.generation_config = generation
        generation.save_pretrained(place.folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, place.folder)
    return replace(loaded, model=model, tokenizer=tokenizer, path=place.folder, weights=weights)


def _build_model(
    dense: PreTrainedModel, config: PreTrainedConfig, weights: Weights, what: str, remedy: str
) -> PreTrainedModel:
    """The class of ``dense`` from another config, with parameters on the meta device and the buffers of ``dense``."""
    name = type(dense).__name__
    try:
        model = make_anew(type(dense), config)
    except Exception as error:  # a model class may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise TargetError(f"{name} cannot have {what} ({reason}); {remedy}", name=name) from error
    # The class decides what weights it has with this config. They must be the ones that were made.
    there = {n: tuple(tensor.shape) for n, tensor in model.state_dict(keep_vars=True).items()}
    cut = {n: tuple(tensor.shape) for n, tensor in weights.likes.items()}
    if wrong := sorted(n for n in there.keys() | cut.keys() if there.get(n) != cut.get(n)):
        raise TargetError(
            f"{name} cannot have {what}: its {wrong[0]} would be {_describe_shape(there, wrong[0])}, and what is left "
            f"of it is {_describe_shape(cut, wrong[0])}; {remedy}",
            name=name,
        )
    # A buffer that the class computes may have been changed in the dense model, so its numbers come from there if its
    # shape is the same.
    before = dict(dense.named_buffers())
    for n, buffer in model.named_buffers():
        value = weights[n] if n in weights else before.get(n)
        if value is not None and value.shape == buffer.shape:
            buffer.copy_(value)
    return model


def _describe_shape(shapes: Mapping[str, Sequence[int]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"


def make_anew(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The class in evaluation mode: parameters on the meta device, buffers on the CPU, as the class computes them.

    It raises whatever the class raises for this config.
    """
    # No checkpoint has the buffers that a class computes, such as rotary frequencies, so they need numbers.
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = model_class(copy.deepcopy(config)).eval()
    model.tie_weights()
    return model
