"""round_weights: add a rounding error to every weight, to measure how far rounding alone moves the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mptk.ir.passes import Pass, Result
from mptk.ir.program import Program


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Change every weight at random by the relative rounding error of its type."""

    name: ClassVar[str] = "round weights"

    def run(self, program: Program) -> Result:
        generator = torch.Generator().manual_seed(0)

        def jittered(weight: Tensor) -> Tensor:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            return weight * (1 + torch.finfo(weight.dtype).eps * noise)

        moved = {n: jittered(t) for n, t in program.state.items() if t.is_floating_point()}
        return Result(program.with_state(moved), bool(moved))

    def ensures(self, before: Program, after: Program) -> None:
        """The weights have the same names, shapes and types."""
        kinds = [{n: (t.shape, t.dtype) for n, t in program.state.items()} for program in (before, after)]
        assert kinds[0] == kinds[1], "a weight has another shape or type"
