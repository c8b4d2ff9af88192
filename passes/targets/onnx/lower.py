"""lower: replace ops and complex numbers so that torch.onnx.export translates the graph op by op, undecomposed.

torch.onnx.export first runs ``ExportedProgram.run_decompositions``, which retraces the graph twice on symbolic shapes
and takes nine tenths of the export's time. The exporter already knows nearly every op of the pre-dispatch graph. It
even translates linear, silu and scaled_dot_product_attention better than their parts. So a few local replacements are
enough (``LowerOps``):

1. an assertion is dropped;
2. a call that returns its input (same shape, same dtype) is replaced by the input;
3. a change of dtype becomes ``_to_copy``;
4. an operator with an alias gets the name that the exporter knows;
5. an op that writes in place (``x = linear(...); x += y``) becomes the op without the write, if the tensor is fresh,
   has no view, and is read after the write only through the op's result. For any other write, the graph is left to
   torch's own decomposition, which makes it functional, and only case 1 applies;
6. attention with one key head for all query heads sets ``enable_gqa``, since the exporter does not broadcast the head;
   and a mask with one row for all queries gets a row for each, since ONNX Runtime does not broadcast the row.

``LowerComplex`` then replaces complex values by their real and imaginary parts, in a last dimension of size 2. ONNX has
no complex numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.node import Argument

from mptk.compat.torch import OpOverload, enable_python_dispatcher, express_size, find_schema, mark_undecomposed
from mptk.errors import TraceError
from mptk.ir import Pass, PassResult, Program, list_state_shapes, name_op, write_size_functions

aten = torch.ops.aten
ASSERTIONS = {
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
"""Calls without a result. ONNX has no such operators; ``check_sizes.py`` writes what a graph must refuse."""
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
"""Operators that the exporter knows only by another name."""


@dataclass(frozen=True)
class LowerOps(Pass):
    """Replace ops that the ONNX exporter does not know, and drop calls that return their input."""

    name: ClassVar[str] = "lower ops"

    def requires(self, program: Program) -> None:
        """Real weights."""
        if not program.has_values:
            raise TraceError(
                "cannot write ONNX: the program was traced without weights; load the model's weights first"
            )

    def run(self, program: Program) -> PassResult:
        module = program.copy_graph()
        write_size_functions(module.graph, onnx=True)
        # A write that case 5 does not allow leaves the whole graph to torch's decomposition: then the exporter does not
        # meet the original ops, so nothing else needs to be lowered. A copy starts again from the unchanged graph.
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

    def is_shown(user: fx.Node) -> bool:
        return user is not node and (node < user or _is_view(user))

    # ``add_.Tensor`` writes, ``add.Tensor`` does not: torch names the pair alike.
    name = node.target.overloadpacket.__name__
    twin = getattr(getattr(aten, name.removesuffix("_"), None), signature.overload_name or "default", None)
    if twin is None or not name.endswith("_") or any(map(is_shown, written.users)):
        return False
    node.target = twin
    return True


def _is_view(node: fx.Node) -> bool:
    """Whether the node's output shares memory with an input, which others may read."""
    if node.target is operator.getitem:  # a part of a result shares memory if the result does
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
    elif packet is aten.square:  # for this op and the next, the exporter has no translation and no other name
        node.target, node.args = aten.mul.Tensor, (source, source)
    elif packet is aten.numpy_T:
        node.target, dimensions = aten.permute.default, node.meta["val"].ndim
        node.args = (source, list(reversed(range(dimensions))))
    elif packet in RETURN_THEIR_INPUT and isinstance(source, fx.Node):
        if _read_type(source) == _read_type(node):  # case 2
            node.replace_all_uses_with(source)
            node.graph.erase_node(node)
        elif packet is aten.to:  # case 3
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


Lowering = Callable[[tuple[Argument, ...]], fx.Node]
"""A call's arguments, pairs for complex values → the call on pairs."""


@dataclass(frozen=True)
class LowerComplex(Pass):
    """Replace complex numbers by pairs of real ones, if all complex ops of the graph are known.

    Complex rotary embeddings need few ops (``LOWERED``): polar, view_as_complex, view_as_real, products, and changes of
    shape. A graph with any other complex op does not change; the pass's record names the op.
    """

    name: ClassVar[str] = "lower complex"

    def run(self, program: Program) -> PassResult:
        complex_ops = _list_complex_ops(program.graph.graph)
        unknown = sorted({name_op(node) for node in complex_ops if _get_packet(node) not in LOWERED})
        if unknown or not complex_ops:
            return PassResult(program, False, (f"complex {', '.join(unknown)} left",) if unknown else ())
        # In the graph's order, so that a complex operand has its pair before its users ask for it. The replaced nodes
        # lose their users and go as dead code.
        module = program.copy_graph()
        pairs: dict[fx.Node, fx.Node] = {}
        for node in _list_complex_ops(module.graph):
            with module.graph.inserting_before(node):
                pair = LOWERED[_get_packet(node)](fx.map_arg(node.args, lambda n: pairs.get(n, n)))
            if _is_complex(node):
                pairs[node] = pair
            else:  # view_as_real: the pair is its result
                node.replace_all_uses_with(pair)
        return PassResult(replace_graph(program, module), True)

    def ensures(self, before: Program, after: Program) -> None:
        """If anything changed, no complex number is left. The weights have the same names and shapes."""
        assert after is before or not _list_complex_ops(after.graph.graph), "a complex number is left"
        assert list_state_shapes(after) == list_state_shapes(before), "a weight has another shape"


def _list_complex_ops(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if any(map(_is_complex, (node, *node.all_input_nodes)))]


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _get_packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None)


def _call(op: Callable[..., object], first: fx.Node | list[fx.Node], *rest: Argument) -> fx.Node:
    """A new call with its example value, at the graph's place for new nodes."""
    owner = first[0] if isinstance(first, list) else first
    call = owner.graph.call_function(op, (first, *rest))
    values = fx.map_arg(call.args, lambda n: n.meta["val"])
    with owner.meta["val"].fake_mode, enable_python_dispatcher():
        call.meta["val"] = op(*values)
    return call


def _stack(real: fx.Node, imaginary: fx.Node) -> fx.Node:
    return _call(aten.stack.default, [real, imaginary], -1)


def _cast_node(argument: Argument) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def _return_input(args: tuple[Argument, ...]) -> fx.Node:
    """The input itself: for the views between pairs and complex numbers, and for copies."""
    return _cast_node(args[0])


def _lower_polar(args: tuple[Argument, ...]) -> fx.Node:
    length, angle = map(_cast_node, args)
    cosine, sine = _call(aten.cos.default, angle), _call(aten.sin.default, angle)
    return _stack(_call(aten.mul.Tensor, length, cosine), _call(aten.mul.Tensor, length, sine))


def _lower_product(args: tuple[Argument, ...]) -> fx.Node:
    x, y = _cast_node(args[0]), args[1]
    if not isinstance(y, fx.Node):  # a real factor scales both parts
        return _call(aten.mul.Tensor, x, y)
    a, b, c, d = (_call(aten.select.int, pair, -1, part) for pair in (x, y) for part in (0, 1))
    # (a + bi)(c + di)
    real = _call(aten.sub.Tensor, _call(aten.mul.Tensor, a, c), _call(aten.mul.Tensor, b, d))
    return _stack(real, _call(aten.add.Tensor, _call(aten.mul.Tensor, a, d), _call(aten.mul.Tensor, b, c)))


def _lower_along(op: Callable[..., object]) -> Lowering:
    """For an op on one dimension. The parts are a dimension behind the last, so a negative one moves by one."""

    def lower(args: tuple[Argument, ...]) -> fx.Node:
        pair, dim, *rest = args
        assert isinstance(dim, int)
        return _call(op, _cast_node(pair), dim if dim >= 0 else dim - 1, *rest)

    return lower


LOWERED: dict[object, Lowering] = {
    aten._to_copy: _return_input,
    aten.index_select: _lower_along(aten.index_select.default),
    aten.mul: _lower_product,
    aten.polar: _lower_polar,
    aten.slice: _lower_along(aten.slice.Tensor),
    aten.to: _return_input,
    aten.unsqueeze: _lower_along(aten.unsqueeze.default),
    aten.view_as_complex: _return_input,
    aten.view_as_real: _return_input,
}
"""Operator → its call on pairs. To add one is to say what it does to a last dimension of size 2."""
