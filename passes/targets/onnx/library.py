"""library: onnxscript's graph rewrites as passes of onnx_ir.

onnxscript's own ``optimize`` gives the same graph but takes 20 times as long: it infers shapes node by node and tries
50 rules, most of them for convolutions. Here the exporter has already set the shapes.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass, onnx_fusions
from onnxscript.rewriter.rules import common as rules

CONSTANT_SIZE = 1024
"""The largest constant that is folded, in elements."""


class FoldConstantsPass(ir.passes.InPlacePass):
    """Compute values that depend only on small constants."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
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
