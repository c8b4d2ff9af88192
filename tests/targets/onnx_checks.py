"""ONNX graphs of tiny decoders against torch: logits of a row alone and in a padded batch, the cache's inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor
from transformers import PreTrainedModel

TOLERANCE = 1e-4
SIZES = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 6, "vocab_size": 97}


class Apply(torch.nn.Module):
    """A module that computes this."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@torch.no_grad()
def alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [sequence, vocab] of one sequence, without cache and padding."""
    return model(ids[None], use_cache=False).logits[0]


def padded(prompts: list[Tensor], side: str) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, prompts))
    ids, mask = np.full((len(prompts), width), 3), np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt.numpy(), 1
    return ids, mask


def cache_inputs(file: Path) -> list[list[str]]:
    """The cache inputs of each Attention operator."""
    nodes = [node for node in onnx.load(file, load_external_data=False).graph.node if node.op_type == "Attention"]
    return [list(node.input[4:6]) for node in nodes]
