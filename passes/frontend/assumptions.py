"""assumptions: what torch.export took for granted of the sizes of the inputs, and the lines that made it so."""

from __future__ import annotations

from typing import TypeGuard

import sympy
import torch
from torch import Tensor, fx

from mptk.compat.torch import assumed, origin
from mptk.ir.limits import Condition, Limits
from mptk.ir.sizes import is_open
from mptk.ir.source_location import source_line


def limits_of(graph: fx.Graph) -> Limits:
    """The conditions on the sizes of the inputs that Python asked for, and where a size became a number."""
    values = [(node.name, node.meta.get("val")) for node in graph.nodes if node.op == "placeholder"]
    tensors = [(name, value) for name, value in values if isinstance(value, Tensor)]
    places = (((name, d), size) for name, value in tensors for d, size in enumerate(value.shape))
    sizes = {place: size for place, size in places if _is_symbolic(size)}
    lines = {place: line for place, s in sizes.items() if not is_open(s) and (line := source_line(origin(s)))}
    conditions = {
        guard.holds: Condition(guard.holds, source_line(guard.stack))
        for guard in assumed(sizes.values())
        if not guard.kernel and guard.holds not in (sympy.true, sympy.false)
    }
    return Limits(tuple(conditions.values()), lines)


def _is_symbolic(size: object) -> TypeGuard[torch.SymInt]:
    return isinstance(size, torch.SymInt)
