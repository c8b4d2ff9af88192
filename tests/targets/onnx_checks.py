"""ONNX graphs of tiny decoders against torch: logits of a row alone and in a padded batch, the cache's inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mptk.ort.decoder import OrtDecoder

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


def assert_padded_rows_decode_as_alone(model: PreTrainedModel, file: Path) -> None:
    """A row of 8 tokens and one of 5, padded on the left: prompt and one step."""
    torch.manual_seed(1)
    prompts = [torch.randint(3, 97, (length,)) for length in (8, 5)]
    ids, mask = padded([prompt[:-1] for prompt in prompts], "left")
    decoder = OrtDecoder(file, threads=1)
    logits, cache = decoder.prefill(ids, mask)
    last, _ = decoder.decode(np.stack([prompt[-1:].numpy() for prompt in prompts]), cache)
    for row, prompt in enumerate(prompts):
        expected = alone(model, prompt)
        found = torch.from_numpy(np.concatenate([logits[row][mask[row] == 1], last[row]]))
        torch.testing.assert_close(found, expected, atol=TOLERANCE * float(expected.abs().max()), rtol=0)
