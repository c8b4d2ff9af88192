"""decoders: whether a model is one that predicts the next token, which pruning, evaluation, export and bench need.

Decided by what the model is: the class that its config stands for, before weights are read, and then by what it
computes: a decoder's logits at a position do not depend on later tokens.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.errors import MptkError


def check_class(model: str, classes: set[type[PreTrainedModel]], config: PreTrainedConfig) -> None:
    """Raise MptkError if none of the classes that ``config`` stands for generates text by itself.

    ``classes`` is empty for a model with code of its own, which is judged when it is loaded.
    """
    name = min((c.__name__ for c in classes), default=type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        _refuse(model, f"{name} has an encoder and a decoder")
    if classes and not any(c.can_generate() for c in classes):
        _refuse(model, f"{name} does not predict the next token")


@torch.no_grad()
def check_causal(model: str, module: PreTrainedModel) -> None:
    """Raise MptkError if a loaded model gives no logits, or logits that depend on later tokens. Two tokens are run."""
    ids = torch.tensor([[1, 2], [1, 3]], device=module.device)
    logits: Tensor | None = getattr(module(input_ids=ids), "logits", None)
    name = type(module).__name__
    if logits is None or logits.ndim != 3 or logits.shape[1] != 2:
        _refuse(model, f"{name} gives no logits for every token")
    first = logits[:, 0].float()
    if (first[0] - first[1]).abs().max() > 1e-3 * first.abs().max():
        _refuse(model, f"{name} looks at later tokens")


def _refuse(model: str, why: str) -> NoReturn:
    raise MptkError(
        f"{model} is no decoder: {why}; `mptk analyze` shows what can be cut in it, and mptk.rewrite cuts it in Python"
    )
