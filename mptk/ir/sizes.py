"""sizes: the sizes of traced values as plain integers. A symbolic size is its value in the example inputs."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mptk.compat.torch import size_expression, size_hint
from mptk.errors import MptkError


def shape_of(value: Tensor) -> tuple[int, ...]:
    """Sizes of a traced tensor."""
    sizes = tuple(value.shape)
    for size in sizes:
        if type(size) is not int:
            return tuple(example_size(s) for s in sizes)
    return sizes


def result_shape(node: fx.Node) -> tuple[int, ...]:
    """Sizes of a node's result. It must be one tensor."""
    return shape_of(node.meta["val"])


def example_size(size: int | torch.SymInt) -> int:
    """One size as an integer.

    Raises:
        MptkError: the size depends on data.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size_hint(size)
    if hint is None:
        raise MptkError(f"a size depends on data ({size}), so axes cannot be followed; use a traceable implementation")
    return hint


def is_open(size: int | torch.SymInt) -> bool:
    """Whether a program holds for other values of a size than its example's: the trace may have made it one number."""
    return isinstance(size, torch.SymInt) and not getattr(size_expression(size), "is_number", False)
