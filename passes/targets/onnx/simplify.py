"""simplify: what an exported graph goes through first, with onnxscript's rewrites as passes of onnx_ir.

onnxscript's own ``optimize`` gives the same graph but takes 20 times as long: it infers shapes node by node and tries
50 rules, most of them for convolutions. Here the exporter has already set the shapes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass, onnx_fusions
from onnxscript.rewriter.rules import common as rules

from passes.targets.onnx.plain_products import add_constant
from passes.targets.onnx.tensors import get_constant_tensor, make_lazy_tensor, read_tensor_shape

CONSTANT_SIZE = 1024
"""The largest constant that is folded at once, in elements. Sizes and indices are smaller, weights are larger."""


class FoldTransposesPass(ir.passes.InPlacePass):
    """Transpose large weights that have one use when they are written, not in the graph.

    The exporter writes a linear layer as ``MatMul(x, Transpose(weight))``. onnxscript's constant folding would hold all
    new weights in memory at once.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [node for node in graph if node.op_type == "Transpose" and _is_large(node.inputs[0])]
        for node in found:
            _fold(graph, node)
        return ir.passes.PassResult(model, bool(found))


def _is_large(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return value is not None and tensor is not None and len(value.uses()) == 1 and tensor.size > CONSTANT_SIZE


def _fold(graph: ir.Graph, transpose: ir.Node) -> None:
    weight, result = transpose.inputs[0], transpose.outputs[0]
    assert weight is not None
    # ONNX reverses the axes if a Transpose has no permutation.
    old, name = get_constant_tensor(weight), str(result.name)
    axes = transpose.attributes.get_ints("perm", tuple(reversed(range(len(old.shape)))))
    shape = [read_tensor_shape(old)[axis] for axis in axes]
    folded = add_constant(graph, name, make_lazy_tensor(old, lambda: np.transpose(old.numpy(), axes), shape))
    ir.convenience.replace_all_uses_with(result, folded)
    graph.remove(transpose, safe=True)
    graph.initializers.pop(str(weight.name))


class FoldConstantsPass(ir.passes.InPlacePass):
    """Compute values that depend only on small constants."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        # The exporter has set the shapes, and inferring them again takes most of the time.
        limits = {"input_size_limit": CONSTANT_SIZE, "output_size_limit": CONSTANT_SIZE}
        return fold_constants(model, onnx_shape_inference=False, **limits)


class SimplifyPass(RewritePass):
    """Drop products with 1, sums with 0 and casts to the same type."""

    def __init__(self) -> None:
        super().__init__([rules.mul_by_1_rule, rules.add_0_rule, rules.no_op_cast_rule])


class FusePass(ir.passes.InPlacePass):
    """Fuse RMSNorm, rotary embedding and attention into the operators of opset 23."""

    def requires(self, model: ir.Model) -> None:
        """Opset 23: onnxscript has fusions for this one only."""
        if model.opset_imports.get("") != 23:
            raise ir.passes.PreconditionError(f"opset {model.opset_imports.get('')} has no fusions")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, any(onnx_fusions.fuse(model).values()))


class RepeatAnglesPass(ir.passes.InPlacePass):
    """Repeat the cosines and sines of RotaryEmbedding for each row. Uses the shapes of its inputs.

    ``FusePass`` leaves angles that all rows share as [1, sequence, dim / 2]. ONNX Runtime's RotaryEmbedding wants as
    many rows as its input has.
    """

    def ensures(self, model: ir.Model) -> None:
        """No node's angles have one row if its input may have more."""
        if left := [node.name for node in model.graph if _has_shared_angles(node)]:
            raise ir.passes.PostconditionError(f"{left[0]} has the angles of one row")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        # Layers share their angles, so they share the repeated ones, too, unless their batches have other sizes.
        made: dict[tuple[ir.Value, object], ir.Value] = {}
        for node in [node for node in model.graph if _has_shared_angles(node)]:
            turned = node.inputs[0]
            assert turned is not None
            for place in (1, 2):
                waves = node.inputs[place]
                assert waves is not None
                key = waves, _find_row_size(turned) or turned
                if key not in made:
                    steps = ir.tape.Tape()
                    made[key] = _repeat_rows(steps, waves, turned)
                    model.graph.insert_before(node, steps.nodes)
                node.replace_input_with(place, made[key])
        return ir.passes.PassResult(model, bool(made))


def _has_shared_angles(node: ir.Node) -> bool:
    """Whether a RotaryEmbedding has angles of one row for an input of more."""
    # A fourth input has position ids, which look a row of angles up for each token.
    if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) > 3:
        return False
    return _find_row_size(_find_angles(node.inputs[1])) == 1 != _find_row_size(node.inputs[0])


def _find_row_size(value: ir.Value | None) -> object:
    """The size of the first axis, a number or its name; None if it is not known."""
    if value is None or value.shape is None:
        return None
    size = value.shape[0]
    return size if isinstance(size, int) else size.value


def _find_angles(cosines: ir.Value | None) -> ir.Value | None:
    """The value whose cosines, or sines, ``cosines`` are. The fusion gives the cosines themselves no shape."""
    made_by = None if cosines is None else cosines.producer()
    return made_by.inputs[0] if made_by is not None and made_by.op_type in ("Cos", "Sin") else cosines


def _repeat_rows(steps: ir.tape.Tape, waves: ir.Value, turned: ir.Value) -> ir.Value:
    """``waves`` [1, sequence, n] as [batch of ``turned``, sequence, n]."""
    batch = steps.op("Shape", [turned], {"start": 0, "end": 1})
    ones = steps.op("Constant", [], {"value_ints": [1, 1]})
    shape = steps.op("Concat", [batch, ones], {"axis": 0})
    return steps.op("Expand", [waves, shape])
