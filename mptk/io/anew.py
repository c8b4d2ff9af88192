"""anew: a transformers class made again from a config, without weights, as ``from_pretrained`` makes it."""

from __future__ import annotations

import copy

from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


def make_anew(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The class in evaluation mode: parameters on the meta device, buffers on the CPU, as the class computes them.

    Raises:
        Exception: whatever the class raises for this config.
    """
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = model_class(copy.deepcopy(config)).eval()
    model.tie_weights()
    return model
