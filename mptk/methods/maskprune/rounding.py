"""rounding: train a model for the weights that its quantised graph will have (``--quantize-aware``).

Rounding has no gradient, so the exact weight gets that of the rounded one: the straight-through estimator (Bengio et
al. 2013, arXiv 1308.3432). Distilling a language model this way is LLM-QAT (Liu et al. 2023, arXiv 2305.17888).

Weights are rounded as ``passes/targets/onnx/block_weights.py`` rounds them. The graph also makes its channels equally
large before (``equalize.py``), and int4 for a text makes up for the errors of other columns (``gptq.py``). Training
does neither: both depend on the weights as they end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mptk.errors import InputError
from passes.targets.onnx.block_weights import BLOCK, choose_format

SCHEME_BITS: dict[str, Literal[8, 4]] = {"int8": 8, "int4": 4}
"""Bits of a scheme's products. Training is not told of fp16, which rounds by less than a step changes."""


@dataclass(frozen=True)
class _Format:
    """How a weight is rounded. ``transposed``: it is [inputs, outputs]."""

    bits: int
    block: int
    transposed: bool = False

    def round(self, weight: Tensor) -> Tensor:
        if self.transposed:
            return round_rows(weight.T, self.bits, self.block).T
        return round_rows(weight, self.bits, self.block)


class WeightRounding:
    """The parameters of a model that ``scheme`` rounds: of its linear layers and embeddings.

    Raises:
        InputError: there are none.
    """

    def __init__(self, model: nn.Module, scheme: str) -> None:
        bits = SCHEME_BITS[scheme]
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        self.formats: dict[Tensor, _Format] = {}
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                self.formats[module.weight] = _Format(8, BLOCK)
        for module in model.modules():  # afterwards: a table that is the head, too, has the head's blocks
            if isinstance(module, nn.Linear | Conv1D):
                transposed = isinstance(module, Conv1D)  # GPT-2's layers hold [inputs, outputs]
                inputs = module.weight.shape[0 if transposed else 1]
                self.formats[module.weight] = _Format(*choose_format(bits, inputs, module is head), transposed)
        if not self.formats:
            raise InputError(
                f"{type(model).__name__} has no linear layer whose weights {scheme} rounds; leave out --quantize-aware",
                name="quantize_aware",
            )

    @contextmanager
    def round_weights(self) -> Iterator[None]:
        """Inside, forward and backward passes compute with the rounded weights. Afterwards the exact ones are back."""
        exact = {parameter: parameter.data for parameter in self.formats}
        try:
            for parameter, form in self.formats.items():
                parameter.data = form.round(parameter.data)
            yield
        finally:
            for parameter, values in exact.items():
                parameter.data = values


def round_rows(weight: Tensor, bits: int, block: int) -> Tensor:
    """The values of a weight [outputs, inputs] after rounding to ``bits`` in blocks of ``block`` inputs.

    With 8 bits zero is the middle code; with 4 each block has a zero point.
    """
    outputs, inputs = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -inputs % block)).view(outputs, -1, block)
    least, most, codes = padded.amin(2, keepdim=True), padded.amax(2, keepdim=True), 2**bits
    if bits == 8:
        # The value that is farthest from zero has the code 0, whichever sign it has: it has one more step than 255.
        farthest = torch.where(most.abs() > least.abs(), most, least)
        scale, zero = farthest / (-codes / 2), torch.full_like(most, codes / 2)
    else:
        scale = (most.clamp(min=0) - least.clamp(max=0)) / (codes - 1)
        zero = (-least.clamp(max=0) / _avoid_zero(scale)).round()
    rounded = (padded / _avoid_zero(scale)).round().add(zero).clamp(0, codes - 1)
    values: Tensor = (rounded - zero) * scale
    return values.view(outputs, -1)[:, :inputs].to(weight.dtype)


def _avoid_zero(scale: Tensor) -> Tensor:
    """A block of zeros has the scale 0, by which nothing can be divided."""
    return torch.where(scale == 0, 1.0, scale)
