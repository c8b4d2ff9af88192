"""outputs: a program whose outputs are other values of its graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from torch import fx
from torch.export.graph_signature import TensorArgument

from mptk.errors import MptkError
from mptk.ir.program import Program


def output_names(program: Program) -> list[str]:
    """The names of the values that a program returns, in order."""
    return [node.name for node in program.graph.graph.output_node().args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]


def with_outputs(program: Program, names: Sequence[str]) -> Program:
    """``program`` with the values of these names as its outputs.

    What an analysis may cut depends on the outputs, and passes keep the names of values. So a value can be taken from
    the outputs for an analysis, and be made an output again after the cut.

    Raises:
        MptkError: there is no such value.
    """
    module = program.copy_graph()
    values = {node.name: node for node in module.graph.nodes}
    if missing := [name for name in names if name not in values]:
        raise MptkError(f"the graph has no value {missing[0]} after the cut")
    module.graph.output_node().args = (tuple(values[name] for name in names),)
    module.recompile()
    signature = copy.deepcopy(program.signature)
    like = signature.output_specs[0]
    specs = [replace(like, arg=TensorArgument(name=name)) for name in names]
    return replace(program, graph=module, signature=replace(signature, output_specs=specs))
