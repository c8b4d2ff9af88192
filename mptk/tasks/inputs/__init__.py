"""inputs: what models read: token ids, images and videos, sound, series. transformers says which a class reads."""

from __future__ import annotations

from inspect import signature

from torch import nn

from mptk.errors import MptkError
from mptk.tasks.inputs.audio import Audio
from mptk.tasks.inputs.base import Inputs
from mptk.tasks.inputs.images import Images, Pictures, Videos, count_frames
from mptk.tasks.inputs.latents import Latents
from mptk.tasks.inputs.series import Series
from mptk.tasks.inputs.text import TextWindows

INPUT_KINDS: dict[str, Inputs] = {
    "input_ids": TextWindows(),
    "pixel_values": Images(),
    "input_features": Audio("input_features"),
    "input_values": Audio("input_values"),
    "past_values": Series(),
    "timestep": Latents(),
    "sample": Pictures(),
}

VIDEOS = Videos()


def choose_inputs(model: nn.Module) -> Inputs:
    """What a transformers model reads. Raises MptkError for what no file here makes."""
    main = getattr(model, "main_input_name", "input_ids")
    if main not in INPUT_KINDS:  # Perceiver's ``inputs`` has another name as well
        main = next((name for name in INPUT_KINDS if name in signature(model.forward).parameters), main)
    if main not in INPUT_KINDS:
        raise MptkError(f"{type(model).__name__} reads {main}, which mptk cannot make; give --inputs (docs/kinds.md)")
    return VIDEOS if main == "pixel_values" and count_frames(model) else INPUT_KINDS[main]


__all__ = ["INPUT_KINDS", "Inputs", "choose_inputs"]
