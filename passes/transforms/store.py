"""store: round the weights to the type that they are stored in.

The program computes as before, in the type of its tensors, with numbers that a checkpoint of the stored type holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mptk.errors import MptkError
from mptk.ir.passes import Pass, PassResult, list_state_shapes
from mptk.ir.program import Program


@dataclass(frozen=True)
class Store(Pass):
    """Round the weights to the type that they are stored in."""

    dtype: torch.dtype
    name: ClassVar[str] = "store"

    def run(self, program: Program) -> PassResult:
        held = program.state_dict().likes  # constants, as rotary frequencies, are not in a checkpoint
        wider = [
            name
            for name, like in held.items()
            if name in program.state
            and is_wider(like, self.dtype)
            and getattr(program.state.entry(name), "held", None) != self.dtype
        ]
        if not wider:
            return PassResult(program, False)
        state = program.state.changed(dict.fromkeys(wider, partial(round_to_type, dtype=self.dtype)))
        return PassResult(replace(program, state=state), True, (f"{len(wider)} weights rounded",))

    def ensures(self, before: Program, after: Program) -> None:
        """The weights have the same names, shapes and types."""
        assert list_state_shapes(after) == list_state_shapes(before), "a weight has another shape"
        for name, like in after.state.likes.items():
            assert like.dtype == before.state.like(name).dtype, f"{name} has another type"


def round_to_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` with every number as ``dtype`` holds it; the tensor itself if that changes nothing.

    Raises:
        MptkError: a finite number is too large for ``dtype``.
    """
    if tensor.is_meta or not is_wider(tensor, dtype):
        return tensor
    rounded = tensor.detach().to(dtype).to(tensor.dtype)
    if not rounded.isfinite().all() and tensor.isfinite().all():
        raise MptkError(f"a weight is larger than {dtype} can hold; use --dtype bfloat16 or float32")
    return tensor if torch.equal(rounded, tensor) else rounded


def is_wider(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor's floating type has more bits than ``dtype``."""
    return tensor.is_floating_point() and torch.finfo(tensor.dtype).bits > torch.finfo(dtype).bits
