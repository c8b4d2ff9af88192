"""lower: replace ops so that torch.onnx.export translates the graph op by op, without decomposing it.

torch.onnx.export first runs ``ExportedProgram.run_decompositions``, which retraces the graph twice on symbolic shapes
and takes nine tenths of the export's time. The exporter already knows nearly every op of the pre-dispatch graph. It
even translates linear, silu and scaled_dot_product_attention better than their parts. So a few local replacements are
enough:

1. an assertion is dropped;
2. a call that returns its input (same shape, same dtype) is replaced by the input;
3. a change of dtype becomes ``_to_copy``;
4. an operator with an alias gets the name that the exporter knows;
5. an op that writes in place (``x = linear(...); x += y``) becomes the op without the write, if the tensor is fresh,
   has no view, and is read after the write only through the op's result. For any other write, the graph is left to
   torch's own decomposition, which makes it functional, and only case 1 applies;
6. attention with one key head for all query heads sets ``enable_gqa``, since the exporter does not broadcast the head;
   and a mask with one row for all queries gets a row for each, since ONNX Runtime does not broadcast the row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mptk.compat.torch import OpOverload, express_size, find_schema, mark_undecomposed
from mptk.errors import MptkError
from mptk.ir.passes import Pass, PassResult, list_state_shapes
from mptk.ir.program import Program
from mptk.ir.size_calls import write_size_functions

aten = torch.ops.aten
ASSERTIONS = {
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
RETURN_THEIR_INPUT = {
    aten.alias,
    aten.clone,
    aten.contiguous,
    aten.detach,
    aten.expand,
    aten.lift_fresh_copy,
    aten.reshape,
    aten.slice,
    aten.squeeze,
    aten.to,
    aten.view,
}
"""Ops whose output equals their input if it has the same shape and dtype."""

SYNONYMS: dict[object, Callable[..., object]] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.max.other: aten.maximum.default,
    aten.min.other: aten.minimum.default,
}


@dataclass(frozen=True)
class LowerOps(Pass):
    """Replace ops that the ONNX exporter does not know, and drop calls that return their input."""

    name: ClassVar[str] = "lower ops"

    def requires(self, program: Program) -> None:
        """Real weights."""
        if not program.has_values:
            raise MptkError("cannot write ONNX: the program was traced without weights; load the model's weights first")

    def run(self, program: Program) -> PassResult:
        module = program.copy_graph()
        write_size_functions(module.graph, onnx=True)
        nodes = [node for node in module.graph.nodes if isinstance(node.target, OpOverload)]
        if all(_make_functional(node) for node in nodes):
            for node in nodes:
                _lower(node)
            return PassResult(replace_graph(program, module), module.code != program.graph.code)
        module = program.copy_graph()
        for node in list(module.graph.nodes):
            if node.target in ASSERTIONS:
                module.graph.erase_node(node)
        lowered = replace_graph(program, module)
        return PassResult(lowered, module.code != program.graph.code, ("writes in place are left to torch",))

    def ensures(self, before: Program, after: Program) -> None:
        """No assertion is left; the weights have the same names and shapes."""
        assert ASSERTIONS.isdisjoint(node.target for node in after.graph.graph.nodes), "an assertion is left"
        assert list_state_shapes(after) == list_state_shapes(before), "a weight has another shape"


def replace_graph(program: Program, module: fx.GraphModule) -> Program:
    """``program`` with the graph ``module``: dead calls removed, and the signature's output names updated."""
    module.graph.eliminate_dead_code()
    module.recompile()
    return program.with_graph(module)


def to_exporter(program: Program) -> ExportedProgram:
    """A lowered program for ``torch.onnx.export``. It is decomposed only if a write in place is left."""
    exported = program.to_exported()
    signatures = [find_schema(node.target) for node in program.graph.graph.nodes]
    mutable = any(signature is not None and signature.is_mutable for signature in signatures)
    return exported if mutable else mark_undecomposed(exported)


def _make_functional(node: fx.Node) -> bool:
    """Whether ``node`` writes to no input. If case 5 allows it, ``node`` is changed into its op without the write."""
    assert isinstance(node.target, OpOverload)
    signature = find_schema(node.target)
    assert signature is not None
    if not signature.is_mutable:
        return True
    written = node.args[0]
    if not isinstance(written, fx.Node) or written.op != "call_function" or _is_view(written):
        return False

    def shows(user: fx.Node) -> bool:
        return user is not node and (node < user or _is_view(user))

    name = node.target.overloadpacket.__name__
    twin = getattr(getattr(aten, name.removesuffix("_"), None), signature.overload_name or "default", None)
    if twin is None or not name.endswith("_") or any(map(shows, written.users)):
        return False
    node.target = twin
    return True


def _is_view(node: fx.Node) -> bool:
    """Whether the node's output shares memory with an input, which others may read."""
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    signature = find_schema(node.target)
    return signature is None or any(result.alias_info is not None for result in signature.returns)


def _lower(node: fx.Node) -> None:
    assert isinstance(node.target, OpOverload)
    packet = node.target.overloadpacket
    source = node.args[0] if node.args else None
    if node.target in ASSERTIONS:
        node.graph.erase_node(node)
    elif node.target in SYNONYMS:
        node.target = SYNONYMS[node.target]
    elif packet is aten.scaled_dot_product_attention:
        _lower_attention(node)
    elif packet is aten.square:
        node.target, node.args = aten.mul.Tensor, (source, source)
    elif packet is aten.numpy_T:
        node.target, dimensions = aten.permute.default, node.meta["val"].ndim
        node.args = (source, list(reversed(range(dimensions))))
    elif packet in RETURN_THEIR_INPUT and isinstance(source, fx.Node):
        if _read_type(source) == _read_type(node):
            node.replace_all_uses_with(source)
            node.graph.erase_node(node)
        elif packet is aten.to:
            node.target = aten._to_copy.default
            node.args, node.kwargs = (source,), {"dtype": node.meta["val"].dtype}


def _lower_attention(node: fx.Node) -> None:
    """Case 6."""
    query, key = (operand.meta["val"] for operand in node.args[:2] if isinstance(operand, fx.Node))
    if key.shape[1] == 1 != query.shape[1]:
        node.kwargs = {**node.kwargs, "enable_gqa": True}
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if not isinstance(mask, fx.Node):
        return
    rows_of_mask = mask.meta["val"].shape[-2]
    if isinstance(rows_of_mask, int) and rows_of_mask == 1:
        sizes = [-1] * (mask.meta["val"].ndim - 2)
        with node.graph.inserting_before(node):
            rows = node.graph.call_function(aten.sym_size.int, (node.args[0], 2))
            wide = node.graph.call_function(aten.expand.default, (mask, [*sizes, rows, -1]))
        rows.meta["val"], wide.meta["val"] = query.shape[2], mask.meta["val"].expand(*sizes, query.shape[2], -1)
        node.replace_input_with(mask, wide)


def _read_type(node: fx.Node) -> tuple[torch.dtype, list[object]]:
    """Dtype and shape. Symbolic sizes are expressions, since a comparison of the sizes would add a guard."""
    value: Tensor = node.meta["val"]
    return value.dtype, [size if isinstance(size, int) else express_size(size) for size in value.shape]
