"""What the rule tests are made of: a case is a function of activations, and the sizes that must be offered around it.

Each case's function is traced twice, between linear layers that make its operands and
(1) a linear layer that takes its result: the rule must map axes right and resize the op's own arguments;
(2) a plain sum over its result: an axis may be offered only if the op keeps zeros, since no weight masks the sum.
The sizes offered are part of the case, so that a rule that freezes everything fails too. Where nothing is offered to a
linear layer, nothing can be to a sum, which is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, SEQUENCE, INPUT, OUTPUT = 2, 5, 7, 11


@dataclass(frozen=True)
class Case:
    """``function(*activations, *parameters)``.

    Activations are [2, 5, width] for each of ``widths``, parameters have ``shapes``. ``linear`` and ``summed`` are the
    sizes of the families that must be offered if a linear layer or a sum takes the result.
    """

    function: Callable[..., Tensor]
    linear: Sequence[int] = (6,)
    summed: Sequence[int] = (6,)
    widths: Sequence[int] = (6,)
    shapes: Sequence[Sequence[int]] = ()


def both(function: Callable[..., Tensor], sizes: Sequence[int], *rest: Sequence[Any], **named: Any) -> Case:
    """A case that is offered the same to a linear layer and to a sum. ``rest``: widths, and shapes."""
    return Case(function, sizes, sizes, *rest, **named)


def none(function: Callable[..., Tensor], *rest: Sequence[Any], **named: Any) -> Case:
    """A case around which nothing may be offered."""
    return both(function, (), *rest, **named)


class Branch(nn.Module):
    """Linear layers, the case's function, and what takes its result: a linear layer or a sum."""

    def __init__(self, case: Case, consumer: str) -> None:
        super().__init__()
        self.function, self.consumer = case.function, consumer
        self.producers = nn.ModuleList(nn.Linear(INPUT, width) for width in case.widths)
        self.weights = nn.ParameterList(torch.randn(*shape) * 0.5 for shape in case.shapes)
        if consumer == "linear":
            result = self.result(torch.randn(BATCH, SEQUENCE, INPUT))
            self.last = nn.Linear(result.shape[-1], OUTPUT)

    def result(self, x: Tensor) -> Tensor:
        y = self.function(*(producer(x) for producer in self.producers), *self.weights)
        y = y if y.is_floating_point() else y.float()
        return y if self.consumer == "summed" or y.ndim <= 3 else y.flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.result(x)
        y = self.last(y).reshape(BATCH, -1) if self.consumer == "linear" else y.reshape(BATCH, -1).sum(1, keepdim=True)
        return y


class Cases(nn.Module):
    """Many cases side by side. ``columns`` says which of the output's belong to which branch."""

    def __init__(self, cases: Mapping[str, Case]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleDict(
            {
                f"{name}:{consumer}": Branch(case, consumer)
                for name, case in cases.items()
                for consumer in ("linear", "summed")
                if case.linear or consumer == "linear"
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches.values()], 1)

    def columns(self, x: Tensor) -> dict[str, slice]:
        found, start = {}, 0
        for name, branch in self.branches.items():
            found[name] = slice(start, start + branch(x).shape[1])
            start = found[name].stop
        return found
