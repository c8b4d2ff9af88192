"""slice_early: take rows before a product and not after it.

``Slice(Transpose(Reshape(MatMul(x, W) + b)))`` along an axis of ``x`` becomes ``Transpose(Reshape(MatMul(Slice(x), W) +
b))``. So the decoder of an encoder–decoder computes keys and values only of the positions that its cache lacks: of all
in the first step, of none after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


class SliceEarlyPass(ir.passes.InPlacePass):
    """Move each Slice along one axis before the products whose results it reads. Uses the shapes of these values."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Slice" and node.domain == "":
                modified |= _move(model.graph, node)
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class _Link:
    """A node between the product and the Slice: slicing its output's ``axis`` is slicing its first input's ``before``.

    ``rank``: how many axes that input has.
    """

    node: ir.Node
    axis: int
    before: int
    rank: int


def _move(graph: ir.Graph, node: ir.Node) -> bool:
    """Move a Slice as far to the front as it goes. Returns whether it passed a product."""
    # Only a slice of one axis, with numbers for the axis and sizes that are known.
    axes, (sliced,) = _read_numbers(node.inputs[3] if len(node.inputs) > 3 else None), node.outputs
    if axes is None or len(axes) != 1 or sliced.is_graph_output() or sliced.shape is None:
        return False
    # Follow the axis back through the nodes that keep it apart, but no further than the earliest product: before that,
    # a slice saves no work.
    links = list[_Link]()
    rank = len(sliced.shape)
    value, axis = node.inputs[0], axes[0] % rank
    while (link := _link(value, axis, rank)) is not None:
        links.append(link)
        value, axis, rank = link.node.inputs[0], link.before, link.rank
    while links and links[-1].node.op_type != "MatMul":
        links.pop()
    if not links:
        return False
    # Slice the product's input with the same start, end and step, along its own axis.
    last, others, first = node.inputs[0], list(node.inputs[1:]), links[-1]
    steps = ir.tape.Tape()
    others[2] = steps.op("Constant", [], {"value_ints": [first.before]})
    first.node.replace_input_with(0, steps.op("Slice", [first.node.inputs[0], *others]))
    for link in links:
        _resize(link, sliced.shape[axes[0]], steps)
    graph.insert_before(node, steps.nodes)
    assert last is not None
    ir.convenience.replace_all_uses_with(sliced, last)
    graph.remove(node, safe=True)
    return True


def _link(value: ir.Value | None, axis: int, rank: int) -> _Link | None:
    """The node that makes ``value``, if a slice of ``value`` is what it makes of a slice of its first input.

    ``rank``: of ``value``. A product multiplies rows [batch, rows, inputs] by a weight, with or without a bias.
    """
    # Another reader of ``value`` needs it whole.
    node = None if value is None else value.producer()
    if node is None or value is None or node.domain or value.is_graph_output() or len(tuple(value.uses())) > 1:
        return None
    if node.op_type == "Transpose":
        return _Link(node, axis, node.attributes["perm"].as_ints()[axis], rank)
    shapes = [None if x is None else x.shape for x in node.inputs]
    source, other, made = shapes[0], shapes[-1], value.shape
    if node.op_type == "Reshape" and source is not None and made is not None:
        # The axes up to this one must stay as they are; those behind it must be numbers, for the new shape.
        kept = axis < min(len(source), len(made)) and source[: axis + 1] == made[: axis + 1]
        known = all(isinstance(size, int) for size in made[axis + 1 :])
        return _Link(node, axis, axis, len(source)) if kept and known else None
    weight = {"MatMul": 2, "Add": 1}.get(node.op_type)  # the rank of a weight, of a bias
    rows = (axis, rank) == (1, 3) and weight is not None and other is not None and len(other) == weight
    return _Link(node, axis, axis, rank) if rows else None


def _resize(link: _Link, size: int | ir.SymbolicDim, steps: ir.tape.Tape) -> None:
    """Give the output of a node the ``size`` of its sliced axis."""
    (made,) = link.node.outputs
    if made.shape is None:
        return
    if link.node.op_type == "Reshape":
        # 0 takes a size from the input, which is the sliced one now.
        rest = [int(size) for size in made.shape[link.axis + 1 :]]  # type: ignore[arg-type]
        as_input = [0] * (link.axis + 1)
        link.node.replace_input_with(1, steps.op("Constant", [], {"value_ints": [*as_input, *rest]}))
        link.node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    made.shape = ir.Shape([size if place == link.axis else old for place, old in enumerate(made.shape)])


def _read_numbers(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant; None if it is not one."""
    constant = None if value is None else value.const_value
    return None if constant is None else [int(number) for number in constant.numpy().reshape(-1)]
