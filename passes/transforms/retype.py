"""retype: change the floating type of a program's weights and of the casts in its graph, and change it back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from mptk.compat.torch import tree_leaves
from mptk.ir.ops import TYPE_CHECK
from mptk.ir.passes import Pass, PassResult
from mptk.ir.program import Program, Types

OWN_TYPES = "own types"
"""In the ``meta`` of a call: the floating types among its arguments before they were changed."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Retype(Pass):
    """Use one floating type throughout the program. Float inputs must have that type, too."""

    dtype: torch.dtype
    name: ClassVar[str] = "retype"

    def run(self, program: Program) -> PassResult:
        graph = program.copy_graph()
        for node in list(graph.graph.nodes):
            if node.target is TYPE_CHECK:
                graph.graph.erase_node(node)
            else:
                given = (node.args, node.kwargs)
                node.meta.setdefault(OWN_TYPES, [a for a in tree_leaves(given) if _is_type(a)])
                node.args, node.kwargs = fx.node.map_aggregate(given, lambda a: self.dtype if _is_type(a) else a)
        graph.recompile()
        floats = [n for n, like in program.state.likes.items() if like.is_floating_point()]
        state = program.state.changed(dict.fromkeys(floats, lambda t: t.to(self.dtype)))
        types = program.types or Types(self.dtype, {n: program.state.like(n).dtype for n in floats})
        made = replace(program, graph=graph, state=state, types=replace(types, wide=self.dtype))
        return PassResult(made, _list_float_types(program) != {self.dtype})

    def ensures(self, before: Program, after: Program) -> None:
        """No other floating type is left in the weights or the graph's calls."""
        assert _list_float_types(after) <= {self.dtype}, "another floating type is left"


def _list_float_types(program: Program) -> set[torch.dtype]:
    """The floating types of the weights and of the calls' arguments."""
    found = {like.dtype for like in program.state.likes.values()}
    for node in program.graph.graph.nodes:
        for given in tree_leaves((node.args, node.kwargs)):
            if isinstance(given, torch.dtype):
                found.add(given)
    return found & set(FLOATS)


def _is_type(value: Argument) -> bool:
    return isinstance(value, torch.dtype) and value in FLOATS


def restore_types(program: Program) -> Program:
    """The program in its module's types: weights and casts have their types from before ``Retype``."""
    if program.types is None:
        return program
    graph = program.copy_graph()
    for node in graph.graph.nodes:
        own = iter(node.meta.pop(OWN_TYPES, ()))
        given = (node.args, node.kwargs)
        node.args, node.kwargs = fx.node.map_aggregate(given, partial(_restore_type, own=own))
    graph.recompile()
    own_types = program.types.own
    casts = {n: partial(Tensor.to, dtype=dtype) for n, dtype in own_types.items() if n in program.state}
    return replace(program, graph=graph, state=program.state.changed(casts), types=None)


def _restore_type(value: Argument, own: Iterator[torch.dtype]) -> Argument:
    return next(own, value) if _is_type(value) else value
