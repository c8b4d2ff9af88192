"""The steps that programs are made of: functions ``(make, x, …, **options)`` of [B, T, C] values, registered by name.

``make`` gives a step its parameters: the first call, at build time, creates them; later calls find them again in the
same order. So a step is an ordinary function of its inputs, and widths need not be told in advance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Kind:
    """A step's function, its op family, how many values it takes, and the choices that its options have.

    The width of the first input is a multiple of ``multiple``. ``writes``: it may write to its first input.
    """

    name: str
    family: str
    function: Function
    inputs: int
    multiple: int
    writes: bool
    options: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Step:
    """One step of a program. ``inputs`` count back from the newest value (0), past the first one they wrap around."""

    kind: str
    inputs: tuple[int, ...] = (0,)
    options: Mapping[str, Any] = field(default_factory=dict)


CATALOGUE: dict[str, Kind] = {}


def step(
    family: str, *, inputs: int = 1, multiple: int = 1, writes: bool = False, **options: tuple[Any, ...]
) -> Callable[[Function], Function]:
    """Register a function as a kind of step, under its own name. ``options`` name the choices of its keywords."""

    def register(function: Function) -> Function:
        name = function.__name__.rstrip("_")
        assert name not in CATALOGUE
        CATALOGUE[name] = Kind(name, family, function, inputs, multiple, writes, options)
        return function

    return register


class Applied(nn.Module):
    """A step's function with the parameters that it has made."""

    def __init__(self, function: Function, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, dict(options)
        self.parts, self.weights = nn.ModuleList(), nn.ParameterList()

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(Maker(self.parts, self.weights), *values, **self.options)


class Maker:
    """Makes the parameters of one call of a step, or finds those of the call before."""

    def __init__(self, parts: nn.ModuleList, weights: nn.ParameterList) -> None:
        self.parts, self.weights = parts, weights
        self.next_part = self.next_weight = 0

    def weight(self, *shape: int, scale: float = 0.5) -> Tensor:
        """A parameter of random numbers."""
        if self.next_weight == len(self.weights):
            self.weights.append(nn.Parameter(torch.randn(*shape) * scale))
        self.next_weight += 1
        return self.weights[self.next_weight - 1]

    def layer(self, build: Callable[[], nn.Module]) -> nn.Module:
        """A module of torch, its vectors at random (a norm's weight is not all ones)."""
        if self.next_part == len(self.parts):
            layer = build().eval()
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.ndim == 1 and tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5, 1.5)
            self.parts.append(layer)
        self.next_part += 1
        return self.parts[self.next_part - 1]

    def linear(self, x: Tensor, out: int, *, bias: bool = True) -> Tensor:
        """A linear layer on the last dimension of ``x``."""
        return self.layer(lambda: nn.Linear(x.shape[-1], out, bias=bias))(x)

    def fit(self, x: Tensor, width: int) -> Tensor:
        """``x`` itself if it has that width, else through a linear layer."""
        return x if x.shape[-1] == width else self.linear(x, width)
