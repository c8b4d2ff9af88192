"""round_weights: add a rounding error to every weight, to measure how far mere rounding moves the outputs."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mptk.ir.passes import Pass, PassResult
from mptk.ir.program import Program


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Change every weight at random by the relative rounding error of its type."""

    name: ClassVar[str] = "round weights"

    def run(self, program: Program) -> PassResult:
        floats = [name for name, like in program.state.likes.items() if like.is_floating_point()]
        moved = program.state.changed({name: partial(_add_jitter, seed=zlib.crc32(name.encode())) for name in floats})
        return PassResult(replace(program, state=moved), bool(floats))

    def ensures(self, before: Program, after: Program) -> None:
        """The weights have the same names, shapes and types."""
        kinds = [{n: (like.shape, like.dtype) for n, like in p.state.likes.items()} for p in (before, after)]
        assert kinds[0] == kinds[1], "a weight has another shape or type"


def _add_jitter(weight: Tensor, seed: int) -> Tensor:
    if weight.is_meta:
        return weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight)
    return weight * (1 + torch.finfo(weight.dtype).eps * noise)
