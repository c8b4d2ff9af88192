"""retype: a program in another floating type: its weights, and the types that its graph asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from mptk.ir.program import Program

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def retype(program: Program, dtype: torch.dtype) -> Program:
    """The program with every floating type made ``dtype``, to tell rounding from errors. Inputs must be so, too."""
    graph = program.copy_graph()
    for node in list(graph.graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            graph.graph.erase_node(node)
        else:
            node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda a: _retyped(a, dtype))
    graph.recompile()
    return replace(program, graph=graph, state={n: _retyped(t, dtype) for n, t in program.state.items()})


def _retyped(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return dtype if value in FLOATS else value
