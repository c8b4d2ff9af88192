"""retype: a program in another floating type: its weights, and the types that its graph asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx
from torch.fx.node import Argument

from mptk.compat.torch import tree_leaves
from mptk.ir.passes import Pass, Result
from mptk.ir.program import Program

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Retype(Pass):
    """Make every floating type of the program another one; float inputs must have that type, too."""

    dtype: torch.dtype
    name: ClassVar[str] = "retype"

    def run(self, program: Program) -> Result:
        graph = program.copy_graph()
        for node in list(graph.graph.nodes):
            if "_assert_tensor_metadata" in str(node.target):
                graph.graph.erase_node(node)
            else:
                given = (node.args, node.kwargs)
                node.args, node.kwargs = fx.node.map_aggregate(given, lambda a: _retyped(a, self.dtype))
        graph.recompile()
        state = {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in program.state.items()}
        return Result(replace(program, graph=graph, state=state), _asks_for(program) != {self.dtype})

    def ensures(self, before: Program, after: Program) -> None:
        """The weights and the types that the graph asks for are of no other floating type."""
        assert _asks_for(after) <= {self.dtype}, "another floating type is left"


def _asks_for(program: Program) -> set[torch.dtype]:
    """The floating types of the weights, and those that calls name."""
    found = {t.dtype for t in program.state.values()}
    for node in program.graph.graph.nodes:
        for given in tree_leaves((node.args, node.kwargs)):
            if isinstance(given, torch.dtype):
                found.add(given)
    return found & set(FLOATS)


def _retyped(value: Argument, dtype: torch.dtype) -> Argument:
    return dtype if isinstance(value, torch.dtype) and value in FLOATS else value
