"""retype: change the floating type of a program's weights and of the casts in its graph."""

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
    """Use one floating type throughout the program. Float inputs must have that type, too."""

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
        floats = [n for n, like in program.state.likes.items() if like.is_floating_point()]
        state = program.state.changed(dict.fromkeys(floats, lambda t: t.to(self.dtype)))
        return Result(replace(program, graph=graph, state=state), _asks_for(program) != {self.dtype})

    def ensures(self, before: Program, after: Program) -> None:
        """No other floating type is left in the weights or the graph's calls."""
        assert _asks_for(after) <= {self.dtype}, "another floating type is left"


def _asks_for(program: Program) -> set[torch.dtype]:
    """The floating types of the weights and of the calls' arguments."""
    found = {like.dtype for like in program.state.likes.values()}
    for node in program.graph.graph.nodes:
        for given in tree_leaves((node.args, node.kwargs)):
            if isinstance(given, torch.dtype):
                found.add(given)
    return found & set(FLOATS)


def _retyped(value: Argument, dtype: torch.dtype) -> Argument:
    return dtype if isinstance(value, torch.dtype) and value in FLOATS else value
