"""autocast: run a program's products in a narrower type, as torch's autocast does: on any device, and backward, too.

Parameters are rounded to the type. A call that joins several float values and is not elementwise (a product, a
convolution, attention, a norm with weights) takes all of them in that type. Elementwise calls promote, and casts to
float32 in the model's source stay. What no parameter reaches, such as rotary angles, keeps its own type: a position of
four digits has no place in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mptk.compat.torch import schema, tree_leaves, tree_map
from mptk.ir.program import Program

CHECK = torch.ops.aten._assert_tensor_metadata.default
"""The trace's own note of a value's type, which is another one here."""


@dataclass(frozen=True)
class Autocast:
    """``reached``: the values that depend on a parameter."""

    dtype: torch.dtype
    reached: frozenset[fx.Node]

    @staticmethod
    def of(program: Program, dtype: torch.dtype) -> Autocast | None:
        """How ``program`` runs in ``dtype``; None if that is float32, in which it runs as it is."""
        if dtype is torch.float32:
            return None
        learned, reached = set(program.parameters), set[fx.Node]()
        for node in program.graph.graph.nodes:
            if program.weights.get(node.name) in learned or not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        return Autocast(dtype, frozenset(reached))

    def value(self, node: fx.Node, value: Any) -> Any:
        """A weight, or a value that crosses a border."""
        return self._cast(value, self.dtype) if node in self.reached else value

    def skips(self, node: fx.Node) -> bool:
        """Whether the call would only check the type that the trace had."""
        return node.target is CHECK and node in self.reached

    def operands(self, node: fx.Node, operands: Any) -> Any:
        """The arguments of a call. One that writes keeps the type of what it writes into."""
        target = node.target
        if node not in self.reached or torch.Tag.pointwise in getattr(target, "tags", ()):
            return operands
        floats = [t for t in tree_leaves(operands) if isinstance(t, Tensor) and t.is_floating_point()]
        if len(floats) < 2:
            return operands
        declared = schema(target)
        dtype = floats[0].dtype if declared is not None and declared.is_mutable else self.dtype
        return tree_map(lambda value: self._cast(value, dtype), operands)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        ours = isinstance(value, Tensor) and value.dtype in (torch.float32, self.dtype)
        return value.to(dtype) if ours else value


def widened(value: Any) -> Any:
    """A result in float32: losses and whatever else is made of it are computed in that."""
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, value)
