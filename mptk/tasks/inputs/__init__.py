"""inputs: what models read: token ids, images and videos; features bring others. transformers says what is read."""

from __future__ import annotations

from inspect import signature

from torch import nn

from mptk.errors import ModelError
from mptk.plugins import with_features
from mptk.tasks.inputs.base import Inputs
from mptk.tasks.inputs.images import Images, Videos, count_frames
from mptk.tasks.inputs.text import TextWindows

INPUT_KINDS: dict[str, Inputs] = {
    "input_ids": TextWindows(),
    "pixel_values": Images(),
}

VIDEOS = Videos()


def choose_inputs(model: nn.Module) -> Inputs:
    """What a transformers model reads. Raises MptkError for what neither a file here nor a feature makes."""
    kinds: dict[str, Inputs] = with_features(INPUT_KINDS, "inputs")
    main = getattr(model, "main_input_name", "input_ids")
    if main not in kinds:  # Perceiver's ``inputs`` has another name as well
        main = next((name for name in kinds if name in signature(model.forward).parameters), main)
    if main not in kinds:
        raise ModelError(
            f"{type(model).__name__} reads {main}, which mptk cannot make; give --inputs (docs/kinds.md)", name=main
        )
    return VIDEOS if main == "pixel_values" and count_frames(model) else kinds[main]


__all__ = ["INPUT_KINDS", "Inputs", "choose_inputs"]
