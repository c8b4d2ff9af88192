"""Wrappers of tiny models: called with tensors by position, they return one tensor, of what the model is for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mptk.features.dual_encoder.task import EMBEDS, has_embeddings
from mptk.features.image_text.task import ImageText
from mptk.ir import Samples, join_outputs

PICTURED, PAIRED = "image-text-to-text", "zero-shot-image-classification"
FOUND: dict[str, list[tuple[str, ...]]] = {
    "object-detection": [("logits", "pred_boxes")],
    "universal-segmentation": [
        ("class_queries_logits", "masks_queries_logits"),
        ("logits", "pred_boxes", "pred_masks"),
    ],
}
"""Mapping → the outputs that say what objects there are and where, as classes name them."""


class Logits(nn.Module):
    """Calls `model` with positional tensors under the given argument names; returns its logits."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        accepted = inspect.signature(model.forward).parameters
        self.flags = {"use_cache": False} if "use_cache" in accepted else {}

    def forward(self, *tensors: Tensor) -> Tensor:
        """Tensors in the order of `names`; returns the first floating tensor of the output."""
        out = self.model(**dict(zip(self.names, tensors, strict=True)), **self.flags)
        values = out.values() if hasattr(out, "values") else out
        logits = getattr(out, "logits", None)
        if isinstance(logits, Tensor):
            return logits
        return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


class Joined(Logits):
    """Returns several outputs in one row: the embeddings of texts and images, or the classes and places of objects."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], outputs: Sequence[str]) -> None:
        super().__init__(model, names)
        self.outputs = outputs

    def forward(self, *tensors: Tensor) -> Tensor:
        """Tensors in the order of `names`."""
        out = self.model(**dict(zip(self.names, tensors, strict=True)))
        return join_outputs([out[name] for name in self.outputs])


class Called(nn.Module):
    """Calls a wrapper of mptk's own. It hides its config, by which a trace would know keywords to pass."""

    def __init__(self, wrapper: nn.Module) -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self, *tensors: Tensor) -> Tensor:
        """Tensors in the order of the wrapper's names."""
        out: Tensor = self.wrapper(*tensors)
        return out


def wrapper_of(mapping: str, model: nn.Module, inputs: Mapping[str, Tensor]) -> nn.Module:
    """The wrapper of a model of `mapping`; its tensors are in the order of `inputs`."""
    names = tuple(inputs)
    if mapping == PAIRED and has_embeddings(type(model)):
        return Joined(model, names, EMBEDS)
    if mapping in FOUND:
        with torch.no_grad():
            given = model(**inputs)
        return next(
            (Joined(model, names, each) for each in FOUND[mapping] if {*each} <= {*given}), Logits(model, names)
        )
    if mapping == PICTURED:
        return Called(ImageText().choose_wrapper(model, Samples(inputs))(model, names))
    return Logits(model, names)
