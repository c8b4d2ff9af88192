"""extract: a part of an ONNX graph as a graph of its own: from given values to given outputs.

An encoder–decoder is traced, analysed and cut as one program, so that both parts follow one plan. Its graph is then
divided at the encoder's last hidden state, which is an output of the first part and an input of the second.

1. A value that is given becomes an input. What made it goes, unless another output needs it.
2. A size that was read from an input that the part no longer has is read from one that has an axis of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common


@dataclass(frozen=True)
class GraphPart:
    """A part of a graph. ``inputs``: name of a value of the whole graph → the input's name. ``outputs``: names.

    An input that nothing of the part reads is left out.
    """

    inputs: Mapping[str, str]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ExtractPass(ir.passes.InPlacePass):
    """Keep a part of the graph: from given values to given outputs."""

    part: GraphPart

    def requires(self, model: ir.Model) -> None:
        """The graph has these values."""
        missing = {*self.part.inputs, *self.part.outputs} - _index_values(model).keys()
        if missing:
            raise ir.passes.PreconditionError(f"the graph has no value {min(missing)}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, values = model.graph, _index_values(model)
        # Outputs first: what only the other outputs need is then unused.
        outputs = [values[name] for name in self.part.outputs]
        graph.outputs.clear()
        graph.outputs.extend(outputs)
        # Case 1. The graph's other inputs stay until it is known whether the part reads them.
        given = {name: _convert_to_input(values[name]) for name in self.part.inputs}
        others = [value for value in graph.inputs if value.name not in given]
        graph.inputs.clear()
        graph.inputs.extend([*given.values(), *others])
        common.RemoveUnusedNodesPass()(model)
        # Case 2, of the inputs that the part reads only for a size.
        for value in others:
            _read_elsewhere(value, list(given.values()))
        common.RemoveUnusedNodesPass()(model)
        read = [value for value in (*given.values(), *others) if value.uses()]
        graph.inputs.clear()
        graph.inputs.extend(read)
        # Names come last: a given value's new name may be an input's old one.
        for name, value in given.items():
            value.name = self.part.inputs[name]
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """The graph has no other inputs than the given ones."""
        others = {value.name for value in model.graph.inputs} - set(self.part.inputs.values())
        if others:
            raise ir.passes.PostconditionError(f"the part also reads {', '.join(sorted(map(str, others)))}")


def _index_values(model: ir.Model) -> dict[str, ir.Value]:
    """The inputs and the results of nodes, by name."""
    results = (value for node in model.graph for value in node.outputs)
    return {str(value.name): value for value in (*model.graph.inputs, *results)}


def _convert_to_input(value: ir.Value) -> ir.Value:
    """Case 1. The old value keeps its producer, in case another output needs it."""
    if value.is_graph_input():
        return value
    made = ir.val(f"{value.name}_given", shape=value.shape, type=value.type)
    ir.convenience.replace_all_uses_with(value, made)
    return made


def _read_elsewhere(value: ir.Value, given: list[ir.Value]) -> None:
    """Case 2: for each ``Shape`` of ``value`` that reads one axis. Axes of one name have one size."""
    for node, _ in tuple(value.uses()):
        start = node.attributes.get_int("start", 0)
        if node.op_type != "Shape" or node.attributes.get_int("end", 0) != start + 1:
            continue
        for other in given:
            axes = list(other.shape or ())
            wanted = value.shape[start] if value.shape is not None else None
            if wanted in axes and isinstance(wanted, ir.SymbolicDim) and wanted.value is not None:
                axis = axes.index(wanted)
                node.replace_input_with(0, other)
                node.attributes["start"] = ir.AttrInt64("start", axis)
                node.attributes["end"] = ir.AttrInt64("end", axis + 1)
                break
