"""lower_complex: replace complex values by their real and imaginary parts, in a last dimension of size 2.

ONNX has no complex numbers. Complex rotary embeddings need few ops: polar, view_as_complex, view_as_real, products, and
changes of shape. A graph with any other complex op does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx
from torch.fx.node import Argument

from mptk.compat.torch import enable_python_dispatcher
from mptk.ir.ops import name_op
from mptk.ir.passes import Pass, PassResult, list_state_shapes
from mptk.ir.program import Program
from passes.targets.onnx.lower import aten, replace_graph

Lowering = Callable[[tuple[Argument, ...]], fx.Node]
"""A call's arguments, pairs for complex values → the call on pairs."""


@dataclass(frozen=True)
class LowerComplex(Pass):
    """Replace complex numbers by pairs of real ones, if all complex ops of the graph are known."""

    name: ClassVar[str] = "lower complex"

    def run(self, program: Program) -> PassResult:
        complex_ops = _list_complex_ops(program.graph.graph)
        unknown = sorted({name_op(node) for node in complex_ops if _get_packet(node) not in LOWERED})
        if unknown or not complex_ops:
            return PassResult(program, False, (f"complex {', '.join(unknown)} left",) if unknown else ())
        module = program.copy_graph()
        _lower(module.graph, _list_complex_ops(module.graph))
        return PassResult(replace_graph(program, module), True)

    def ensures(self, before: Program, after: Program) -> None:
        """If anything changed, no complex number is left. The weights have the same names and shapes."""
        assert after is before or not _list_complex_ops(after.graph.graph), "a complex number is left"
        assert list_state_shapes(after) == list_state_shapes(before), "a weight has another shape"


def _list_complex_ops(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if any(map(_is_complex, (node, *node.all_input_nodes)))]


def _lower(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Replace ``nodes``. They keep no users, but stay in the graph."""
    pairs: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        with graph.inserting_before(node):
            pair = LOWERED[_get_packet(node)](fx.map_arg(node.args, lambda n: pairs.get(n, n)))
        if _is_complex(node):
            pairs[node] = pair
        else:
            node.replace_all_uses_with(pair)


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
    if not isinstance(y, fx.Node):
        return _call(aten.mul.Tensor, x, y)
    a, b, c, d = (_call(aten.select.int, pair, -1, part) for pair in (x, y) for part in (0, 1))
    real = _call(aten.sub.Tensor, _call(aten.mul.Tensor, a, c), _call(aten.mul.Tensor, b, d))
    return _stack(real, _call(aten.add.Tensor, _call(aten.mul.Tensor, a, d), _call(aten.mul.Tensor, b, c)))


def _lower_along(op: Callable[..., object]) -> Lowering:
    """For an op on one dimension: a negative dimension now counts from the parts."""

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
