"""store: round the weights to the type that they are stored in.

The program computes as before, in the type of its tensors, with numbers that a checkpoint of the stored type holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mptk.errors import MptkError
from mptk.ir.passes import Pass, Result, shapes
from mptk.ir.program import Program


@dataclass(frozen=True)
class Store(Pass):
    """Round the weights to the type that they are stored in."""

    dtype: torch.dtype
    name: ClassVar[str] = "store"

    def run(self, program: Program) -> Result:
        held = program.state_dict().keys()  # constants, as rotary frequencies, are not in a checkpoint
        state = {n: stored(t, self.dtype) if n in held else t for n, t in program.state.items()}
        rounded = sum(tensor is not state[name] for name, tensor in program.state.items())
        if not rounded:
            return Result(program, False)
        return Result(replace(program, state=state), True, (f"{rounded} weights rounded",))

    def ensures(self, before: Program, after: Program) -> None:
        """The weights have the same names, shapes and types."""
        assert shapes(after) == shapes(before), "a weight has another shape"
        for name, tensor in after.state.items():
            assert tensor.dtype == before.state[name].dtype, f"{name} has another type"


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` with every number as ``dtype`` holds it; the tensor itself if that changes nothing.

    Raises:
        MptkError: a finite number is too large for ``dtype``.
    """
    if not tensor.is_floating_point() or tensor.is_meta or torch.finfo(tensor.dtype).bits <= torch.finfo(dtype).bits:
        return tensor
    rounded = tensor.detach().to(dtype).to(tensor.dtype)
    if not rounded.isfinite().all() and tensor.isfinite().all():
        raise MptkError(f"a weight is larger than {dtype} can hold; use --dtype bfloat16 or float32")
    return tensor if torch.equal(rounded, tensor) else rounded
