"""Small modules: one layer that is cut, with a body of one's own after it, and its proof; layers that are added up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mptk import analyze, trace
from mptk.ir import Analysis
from mptk.testing import cut_and_compare, draw_plan

WIDTH, INNER, HIDDEN, OUT = 7, 10, 12, 11
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers, 8 → 40 → 4, of which the first is cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 40), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.up(x).relu())
        return found


class Small(nn.Module):
    """``up``: what is cut (10 units, or ``inner``); ``body`` makes the output of it with the weights it asks for."""

    def __init__(self, body: Callable[..., Any], inner: int = INNER, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(WIDTH, inner)
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.randn(*s) * 0.5) for name, s in shapes.items()})
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.up(x), **self.weights)


class Residual(nn.Module):
    """Layers that are added to what comes before, ``strong`` ones a thousand times as much as the others."""

    def __init__(self, strong: set[int], layers: int, inner: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleList(nn.Linear(24, inner) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(inner, 24) for _ in range(layers))
        with torch.no_grad():
            for layer in set(range(layers)) - strong:
                self.down[layer].weight *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


def prove(module: nn.Module, *inputs: Tensor) -> Analysis:
    """Analyse, and cut all families together, and the first by itself."""
    analysis = analyze(trace(module.eval(), inputs or (X,)))
    names = [f.name for f in analysis.families]
    for chosen in {tuple(names), tuple(names[:1])}:
        if (plan := draw_plan(analysis, chosen)).families:
            difference = cut_and_compare(analysis, plan, inputs or (X,))
            assert difference.error <= 1e-5 < 1e-3 < difference.moved, (chosen, difference)
    return analysis


def offered(analysis: Analysis) -> list[int]:
    return sorted(f.size for f in analysis.families)
