"""check_sizes: let a graph refuse the sizes for which its program does not hold.

ONNX has no assertion. So an input goes through a Reshape to its own shape, and to the impossible size -2 if a condition
is not met: every runtime refuses that. The Reshape's name is the condition, which the runtime's error shows. If the
condition is met, a Reshape costs nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from mptk.compat.symbols import interpret
from mptk.errors import TargetError
from mptk.ir import REFUSED, CallSizes, SizeOperations, SizeValue, compute_symbols

# Python's numbers: float64, since float32 would round sizes.
INT, FLOAT, BOOL = ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.BOOL
IMPOSSIBLE = -2
"""A size that no Reshape takes: -1 means «as many as fit», and there is nothing below it."""
ARITHMETIC: dict[Callable[..., Any], str] = {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    operator.mod: "Mod",
    operator.pow: "Pow",
    torch.sym_max: "Max",
    torch.sym_min: "Min",
}
COMPARISONS: dict[Callable[..., Any], str] = {
    operator.eq: "Equal",
    operator.lt: "Less",
    operator.le: "LessOrEqual",
    operator.gt: "Greater",
    operator.ge: "GreaterOrEqual",
}
LOGIC: dict[Callable[..., Any], str] = {operator.and_: "And", operator.or_: "Or", torch.sym_not: "Not"}
"""These three tables: functions for which ONNX has an operator of the same meaning. ``SizeNodes`` builds the others."""


@dataclass(frozen=True)
class CheckSizesPass(ir.passes.InPlacePass):
    """Put the conditions on sizes into a graph.

    ``sizes``: of the program's inputs. ``names``: the program's name of an input → the graph's.
    """

    sizes: CallSizes
    names: Mapping[str, str]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raises MptkError for a condition that depends on more than the inputs' sizes."""
        # Any input will do: the conditions are checked in a row before everything that reads the first one.
        inputs = {value.name: value for value in model.graph.inputs}
        tape, checked = ir.tape.Tape(), model.graph.inputs[0]
        nodes, given, found = SizeNodes(tape), list(checked.uses()), checked
        values = compute_symbols(self.sizes, nodes, lambda name, d: nodes.make_size(inputs[self.names[name]], d))
        for condition in self.sizes.conditions:
            said = self.sizes.describe_condition(condition)
            try:
                holds = interpret(nodes, values, condition.holds)
            except KeyError as error:
                raise TargetError(
                    f"a graph cannot check that {said}: it lacks {error}; leave out ONNX", name="onnx"
                ) from error
            if isinstance(holds, ir.Value):  # else it holds whatever the sizes are
                found = nodes.require(found, holds, f"{REFUSED}{said}")
        if found is checked:
            return ir.passes.PassResult(model, False)
        for node, place in given:
            node.replace_input_with(place, found)
        model.graph.extend(tape.nodes)
        model.graph.sort()  # the new nodes stand at the end, and the old ones read them
        return ir.passes.PassResult(model, True)


class SizeNodes(SizeOperations):
    """Functions of sizes as ONNX nodes of scalars: int64, double or bool."""

    def __init__(self, tape: ir.tape.Tape) -> None:
        self.tape = tape

    def make_size(self, value: ir.Value, dim: int) -> ir.Value:
        """The size of a dimension."""
        shape = self._add_node("Shape", [value], INT, {"start": dim, "end": dim + 1})
        return self._add_node("Squeeze", [shape], INT)

    def require(self, value: ir.Value, holds: ir.Value, said: str) -> ir.Value:
        """``value``, which cannot be computed unless ``holds``. ``said``: what the runtime's error says then."""
        impossible = self._add_node("Constant", [], INT, {"value_ints": [IMPOSSIBLE]})
        shape = self._add_node("Where", [holds, self._add_node("Shape", [value], INT), impossible], INT)
        assert value.dtype is not None
        # ``allowzero``: a size of 0, of an empty cache, is meant as such.
        found = self._add_node("Reshape", [value, shape], value.dtype, {"allowzero": 1})
        found.shape = value.shape
        (node,) = [node for node in self.tape.nodes if found in node.outputs]
        node.name = said
        return found

    def apply(self, function: Callable[..., Any], *arguments: SizeValue) -> SizeValue:
        # Of numbers only, Python computes the result itself.
        if not any(isinstance(each, ir.Value) for each in arguments):
            return function(*arguments)
        given = [each if isinstance(each, ir.Value) else self._make_constant(each) for each in arguments]
        # ONNX has no operator for some functions, and others differ from Python's.
        if function is operator.ne:
            return self.not_(self.eq(*given))
        if function is torch.sym_ite:
            return self._add_node("Where", [given[0], *self._cast_alike(*given[1:])], self._choose_type(*given[1:]))
        if function in LOGIC:
            return self._add_node(LOGIC[function], given, BOOL)
        if function in COMPARISONS:
            return self._add_node(COMPARISONS[function], self._cast_alike(*given), BOOL)
        if function is operator.neg:
            return self._add_node("Neg", given, self._choose_type(*given))
        if function in (math.trunc, torch.sym_float):
            return self._cast(given[0], INT if function is math.trunc else FLOAT)
        if function is torch.sym_sqrt:
            return self._add_node("Sqrt", [self._cast(given[0], FLOAT)], FLOAT)
        if function is operator.truediv:
            return self._add_node("Div", [self._cast(each, FLOAT) for each in given], FLOAT)
        if function is operator.floordiv:
            return self._divide(*given)
        if function is operator.mod and self._choose_type(*given) is FLOAT:
            # Python's rest has the divisor's sign. ONNX's has it, too, of integers; of floats it has the dividend's.
            return self.sub(given[0], self.mul(given[1], self._divide(*given)))
        if function not in ARITHMETIC:
            raise KeyError(function)
        return self._add_node(ARITHMETIC[function], self._cast_alike(*given), self._choose_type(*given))

    def _divide(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The whole quotient, rounded down: Div of integers rounds towards 0, and Mod has the divisor's sign."""
        if self._choose_type(a, b) is FLOAT:
            return self._add_node("Floor", [self.truediv(a, b)], FLOAT)
        rest: ir.Value = self.mod(a, b)
        return self._add_node("Div", [self.sub(a, rest), b], INT)

    def _make_constant(self, number: float) -> ir.Value:
        kind = BOOL if isinstance(number, bool) else INT if isinstance(number, int) else FLOAT
        return self._add_node("Constant", [], kind, {"value": ir.tensor(number, dtype=kind)})

    def _cast_alike(self, *values: ir.Value) -> list[ir.Value]:
        kind = self._choose_type(*values)
        return [self._cast(each, kind) for each in values]

    def _choose_type(self, *values: ir.Value) -> ir.DataType:
        kinds = {each.dtype for each in values}
        return FLOAT if FLOAT in kinds else INT if INT in kinds else BOOL

    def _cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        return value if value.dtype is kind else self._add_node("Cast", [value], kind, {"to": kind.value})

    def _add_node(
        self, name: str, inputs: list[ir.Value], kind: ir.DataType, attributes: Mapping[str, Any] | None = None
    ) -> ir.Value:
        found: ir.Value = self.tape.op(name, inputs, attributes or {})
        found.dtype = kind
        return found
