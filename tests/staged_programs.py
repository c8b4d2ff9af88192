"""Tiny programs of several kinds, traced once in a process, and executors that divide them into stages."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from mptk import testing, trace
from mptk.ir import Program
from mptk.staged.staged import Executor

SMALL = Executor(stage=12_000)
"""Stages of less than a layer."""
FILES = Executor(stage=12_000, borders=0, smallest_file=0)
"""The same, with all that crosses a border in files, where it may lie at another address."""


class Net(nn.Module):
    """Convolutions over channels of sizes that all differ, with a norm of its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 20, 3, padding=1), nn.GroupNorm(4, 20), nn.ReLU(), nn.Conv2d(20, 28, 3), nn.ReLU()
        )
        self.head = nn.Linear(28, 11)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(x).mean((2, 3)))
        return found


def decoder(name: str) -> tuple[Program, list[tuple[Tensor, ...]]]:
    batches = [(testing.draw_tokens(2, 7),), (testing.draw_tokens(1, 9),), (testing.draw_tokens(3, 5),)]
    return trace(testing.make_decoder(name), dynamic=True), batches


def t5(kind: type) -> tuple[Program, list[tuple[Tensor, ...]]]:
    sizes = {"d_model": 48, "d_kv": 10, "d_ff": 80, "num_layers": 2, "num_heads": 3, "vocab_size": 97}
    torch.manual_seed(0)
    model = kind(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = testing.draw_tokens(2, 7)
    inputs = (ids,) if kind is T5EncoderModel else (ids, torch.ones_like(ids), testing.draw_tokens(2, 5))
    return trace(model, inputs), [inputs, tuple(t.flip(0) for t in inputs)]


def image() -> tuple[Program, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    return trace(Net().eval(), (torch.randn(2, 3, 8, 8),)), [(torch.randn(2, 3, 8, 8),) for _ in range(3)]


MODELS: dict[str, Callable[[], tuple[Program, list[tuple[Tensor, ...]]]]] = {
    "decoder": lambda: decoder("llama"),
    "learned positions": lambda: decoder("gpt2"),
    "sliding windows": lambda: decoder("gemma3"),
    "mixture": lambda: decoder("mixtral"),
    "encoder": lambda: t5(T5EncoderModel),
    "encoder and decoder": lambda: t5(T5ForConditionalGeneration),
    "images": image,
}


@cache
def built(name: str) -> tuple[Program, list[tuple[Tensor, ...]]]:
    return MODELS[name]()
