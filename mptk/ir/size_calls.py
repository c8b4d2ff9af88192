"""size_calls: conditions on sizes as calls of a graph, and back.

A trace has a condition as an expression of torch's own functions, which torch.export cannot save. Here it becomes calls
that torch.export can save and a plain loader runs: ``aten._assert_scalar(condition, message)``. So the graph itself
refuses other sizes, in any program.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from mptk.compat.symbols import Symbols, interpret, to_expression
from mptk.compat.torch import express_size
from mptk.errors import TargetError
from mptk.ir.limits import CallSizes, solve_size
from mptk.ir.size_functions import SizeOperations, SizeValue

ASSERT = torch.ops.aten._assert_scalar.default
READ_SIZE = torch.ops.aten.sym_size.int
REFUSED = "this program was traced for other sizes: "
"""How the message of such an assertion begins."""


class SizeCalls(SizeOperations):
    """Functions of sizes as calls that are inserted into an FX graph. ``like``: whose place in the source they get."""

    def __init__(self, graph: fx.Graph, like: fx.Node | None = None) -> None:
        self.graph, self.meta = graph, {} if like is None else like.meta

    def apply(self, function: Callable[..., Any], *arguments: SizeValue) -> SizeValue:
        if not any(isinstance(each, fx.Node) for each in arguments):
            return function(*arguments)
        if function is math.trunc and _is_whole(arguments[0]):  # ONNX truncates only floats
            return arguments[0]
        call = self.graph.call_function(function, arguments)
        values = (a.meta["val"] if isinstance(a, fx.Node) else a for a in arguments)
        call.meta = {**self.meta, "val": function(*values)}
        return call


# A quotient of whole numbers is floored, ceiled and rounded in whole numbers: as a float it would be inexact for large
# sizes (in the ONNX exporter's float32 above 2^24).


def _write_floor(calls: SizeCalls, x: SizeValue) -> SizeValue:
    if _is_whole(x):
        return x
    return calls.floordiv(*x.args) if _is_quotient(x) else calls.floor_to_int(x)


def _write_ceil(calls: SizeCalls, x: SizeValue) -> SizeValue:
    if _is_whole(x):
        return x
    # ⌈a/b⌉ = −⌊−a/b⌋
    return calls.neg(calls.floordiv(calls.neg(x.args[0]), x.args[1])) if _is_quotient(x) else calls.ceil_to_int(x)


def _round(calls: SizeCalls, x: SizeValue, digits: None = None) -> SizeValue:
    if _is_whole(x):
        return x
    return calls.round_quotient(*x.args) if _is_quotient(x) else calls.round_to_int(x)


def _is_quotient(x: SizeValue) -> bool:
    """Whether ``x`` is a quotient of whole numbers."""
    return isinstance(x, fx.Node) and x.target is operator.truediv and all(map(_is_whole, x.args))


def _is_whole(value: SizeValue) -> bool:
    return isinstance(value.meta["val"] if isinstance(value, fx.Node) else value, int | torch.SymInt)


WRITTEN_OUT: dict[object, Callable[..., SizeValue]] = {
    math.ceil: _write_ceil,
    math.floor: _write_floor,
    operator.and_: SizeCalls.bitwise_and,
    operator.or_: SizeCalls.bitwise_or,
    builtins.round: _round,
    builtins.abs: SizeCalls.abs,
    operator.abs: SizeCalls.abs,
    operator.xor: SizeCalls.bitwise_xor,
}
"""Functions of sizes that torch.export traces but cannot save → what writes them in primitive ones."""


def _write_remainder(calls: SizeCalls, a: SizeValue, b: SizeValue) -> SizeValue:
    """``a % b`` of floats as a − b · ⌊a / b⌋; of whole numbers as it is."""
    if _is_whole(a) and _is_whole(b):
        return calls.mod(a, b)
    one, other = (calls.apply(torch.sym_float, each) for each in (a, b))
    whole = calls.apply(torch.sym_float, calls.floor_to_int(calls.truediv(one, other)))
    return calls.sub(one, calls.mul(whole, other))


class ExporterCalls(SizeCalls):
    """Functions of sizes for the ONNX exporter, which can write a floor, and whose floats are float32."""

    steep = 2.0**100  # 2^900 is infinite in float32

    def floor_to_int(self, x: SizeValue, dtype: torch.dtype = torch.int64) -> SizeValue:
        return self.apply(math.floor, x)


NOT_IN_ONNX: dict[object, Callable[..., SizeValue]] = {operator.mod: _write_remainder}
"""Functions of sizes that the ONNX exporter writes wrong."""


def write_size_functions(graph: fx.Graph, *, onnx: bool = False) -> None:
    """Replace the graph's functions of sizes by ones that torch.export can save, or the ONNX exporter, in place."""
    written, kind = (WRITTEN_OUT | NOT_IN_ONNX, ExporterCalls) if onnx else (WRITTEN_OUT, SizeCalls)
    for node in list(graph.nodes):
        if node.target in written and isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat):
            with graph.inserting_before(node):
                found = written[node.target](kind(graph, node), *node.args)
            node.replace_all_uses_with(found)
            graph.erase_node(node)


def assert_sizes(graph: fx.Graph, sizes: CallSizes) -> None:
    """Insert assertions, in place: the graph refuses sizes for which it does not hold, before it computes."""
    placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    # Before all calls: they may fail on such sizes with a message of their own, or compute for long.
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        calls = SizeCalls(graph)

        def read(name: str, d: int) -> fx.Node:
            call = graph.call_function(READ_SIZE, (placeholders[name], d))
            call.meta["val"] = placeholders[name].meta["val"].shape[d]
            return call

        values = compute_symbols(sizes, calls, read)
        for condition in sizes.conditions:
            try:
                holds = interpret(calls, values, condition.holds)
            except KeyError as error:
                raise TargetError(
                    f"a graph cannot hold the condition on sizes that {sizes.describe_condition(condition)}: it lacks "
                    f"{error}; write "
                    "what depends on sizes with tensors (docs/tracing.md)"
                ) from error
            if isinstance(holds, fx.Node):  # not so if the condition is a constant
                call = graph.call_function(ASSERT, (holds, REFUSED + sizes.describe_condition(condition)))
                call.meta["val"] = None


def compute_symbols(
    sizes: CallSizes, operations: SizeOperations, read: Callable[[str, int], SizeValue]
) -> dict[sympy.Symbol, SizeValue]:
    """Symbol → its value, computed from the inputs' sizes. ``read``: gives the size of an input's dimension."""
    # Only symbols that a condition names: each costs a few calls of the graph.
    needed = {symbol for condition in sizes.conditions for symbol in condition.holds.free_symbols}
    found = dict[sympy.Symbol, SizeValue]()
    for name, dims in sizes.inputs:
        for d, size in enumerate(dims):
            if (solved := solve_size(size)) is None or solved.symbol in found or solved.symbol not in needed:
                continue
            value = read(name, d)
            if solved.offset:
                value = operations.sub(value, solved.offset)
            found[solved.symbol] = operations.floordiv(value, solved.factor) if solved.factor != 1 else value
    return found


def take_assertions(graph: fx.Graph, inputs: CallSizes) -> list[sympy.Basic]:
    """Take the assertions of ``assert_sizes`` out of a graph, in place. Returns the conditions, as the calls compute.

    ``inputs``: the sizes of the graph's inputs, whose symbols the conditions have.
    """
    found = dict[fx.Node, fx.Node]()
    for node in graph.find_nodes(op="call_function", target=ASSERT):
        holds, message = node.args
        if isinstance(holds, fx.Node) and str(message).startswith(REFUSED):
            found[node] = holds
    # Torch divides the example values, too: a small size over a large number is 0, by which nothing can be divided. A
    # large size cannot be an exponent, so small ones come first.
    try:
        conditions = _express_conditions(found.values(), inputs, 2)
    except ZeroDivisionError:
        conditions = _express_conditions(found.values(), inputs, 1 << 20)
    for node, holds in found.items():
        graph.erase_node(node)
        _erase_unused(graph, holds)
    return conditions


def _express_conditions(calls: Iterable[fx.Node], inputs: CallSizes, least: int) -> list[sympy.Basic]:
    """What the ``calls`` on sizes compute, in the symbols of ``inputs``. ``least``: the smallest example of a size."""
    # The calls are run again on fresh symbolic sizes, so torch itself makes them expressions. ``own`` then puts the
    # inputs' symbols back. Their example values are distinct, like the sizes that they stand for.
    integers, symbols = Symbols(), dict[str, sympy.Symbol]()
    known, own = dict[tuple[str, int], torch.SymInt | int](), dict[sympy.Symbol, sympy.Basic]()
    for name, dims in inputs.inputs:
        for d, size in enumerate(dims):
            if isinstance(size, int):
                known[name, d] = size
                continue
            key = str(size)
            if key not in symbols:
                symbols[key], made = integers.integer(f"{name}_{d}", least + len(symbols))
                own[symbols[key]] = size
                known[name, d] = made
            else:
                known[name, d] = next(known[n, k] for (n, k) in known if own.get(to_expression(known[n, k])) == size)
    values = [_compute_value(call, known) for call in calls]
    found = [express_size(value) if isinstance(value, torch.SymBool) else sympy.sympify(value) for value in values]
    return [condition.xreplace(own) for condition in found]


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a call that nothing reads, and what it only reads."""
    if node.op != "call_function" or node.users:
        return
    read = node.all_input_nodes
    graph.erase_node(node)
    for each in read:
        _erase_unused(graph, each)


def _compute_value(node: fx.Node, known: Mapping[tuple[str, int], SizeValue]) -> SizeValue:
    if node.target is READ_SIZE:
        tensor, dim = node.args
        assert isinstance(tensor, fx.Node)
        return known[tensor.name, dim]  # type: ignore[index]
    arguments = [_compute_value(a, known) if isinstance(a, fx.Node) else a for a in node.args]
    assert callable(node.target)
    return node.target(*arguments)
