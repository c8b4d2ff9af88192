"""limits: the sizes that a traced program may be called with, and which of them the trace fixed, with the source line.

A trace holds one path through ``forward``: a branch on a size, a loop over a dimension or a size as a number in Python
fixes something. torch.export knows each as a condition on the sizes. A call that does not meet them is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import sympy
import torch

from mptk.errors import DataError, MptkError
from mptk.ir.size_functions import number_at

SymbolicSize = Any
"""A size of an input: a number, or a sympy expression of others."""


@dataclass(frozen=True)
class Condition:
    """What the sizes must meet, and the line of the model's source that made it so; empty if it is not known."""

    holds: sympy.Basic
    line: str = ""


@dataclass(frozen=True)
class Limits:
    """What a trace found out about the sizes of its inputs.

    Attributes:
        conditions: what other sizes must meet for the same path through ``forward``.
        lines: (input, dimension) → the line of the source that made its size a number.
        several: symbols of sizes that must not be 1, at which the module itself computes something else.
        note: why fewer sizes are open than could be; empty if all are.
        contiguous: whether inputs must be contiguous, since the module asks for strides and depends on them.
        gradients: ``off`` if gradients must be off at the call, since the module computes something else while they are
            on; ``inputs`` if only the inputs must not require them; else empty.
        trains: why the program trains differently from the module; empty if it does not.
    """

    conditions: tuple[Condition, ...] = ()
    lines: Mapping[tuple[str, int], str] = field(default_factory=dict)
    several: frozenset[str] = frozenset()
    note: str = ""
    contiguous: bool = False
    gradients: Literal["", "off", "inputs"] = ""
    trains: str = ""


@dataclass(frozen=True)
class SolvedSize:
    """A size as ``factor · symbol + offset``."""

    symbol: sympy.Symbol
    factor: int
    offset: int


def solve_size(size: SymbolicSize) -> SolvedSize | None:
    """A size of an input as a linear function of one symbol; None if it is another one, or a number.

    A module that splits a dimension into pieces makes its size a multiple of a symbol.
    """
    if not isinstance(size, sympy.Expr) or len(size.free_symbols) != 1:
        return None
    # f(0) is the offset. What is left divided by the symbol is a whole number only if f is linear.
    (symbol,) = size.free_symbols
    offset = size.subs(symbol, 0)
    factor = sympy.expand(size - offset) / symbol
    if not (offset.is_Integer and factor.is_Integer and factor > 0):
        return None
    return SolvedSize(symbol, int(factor), int(offset))


@dataclass(frozen=True)
class CallSizes:
    """The sizes that a program may be called with: of each input, its name and its sizes. A symbol has one value."""

    inputs: tuple[tuple[str, tuple[SymbolicSize, ...]], ...]
    names: tuple[str, ...]
    limits: Limits

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """All conditions on open sizes: what the trace asked for, and which sizes must be more than 1."""
        symbols = {str(symbol): symbol for symbol in self.list_symbols()}
        several = [Condition(sympy.Gt(s, 1, evaluate=False)) for n, s in symbols.items() if n in self.limits.several]
        return (*self.limits.conditions, *several)

    def check(self, shapes: Sequence[Sequence[int]]) -> None:
        """Raise MptkError for the first size of the inputs, in order, for which the program does not hold."""
        # The first input with a symbol gives it its value. Expressions are checked last, when all symbols have values.
        values: dict[sympy.Symbol, int] = {}
        for k, ((_, sizes), shape) in enumerate(zip(self.inputs, shapes, strict=True)):
            if len(sizes) != len(shape):
                raise DataError(
                    f"{self.names[k]} has {len(shape)} dimensions, and {len(sizes)} were traced; give example inputs "
                    "like the call's inputs",
                    name=self.names[k],
                )
            for d, (size, given) in enumerate(zip(sizes, shape, strict=True)):
                if (solved := solve_size(size)) is not None and solved.symbol not in values:
                    values[solved.symbol] = (given - solved.offset) // solved.factor
                fixed = values[size] if isinstance(size, sympy.Symbol) else size
                name = self._name_dim(k, d)
                if isinstance(fixed, int | torch.SymInt) and fixed != given:
                    raise self._make_error(name, f"{name} must be {fixed}{self._describe_line(k, d)}", given)
                if given == 1 and str(size) in self.limits.several:
                    raise self._make_error(name, f"{name} must be more than 1: there the module computes otherwise", 1)
        self._check_expressions(values, shapes)

    def _check_expressions(self, values: Mapping[sympy.Symbol, int], shapes: Sequence[Sequence[int]]) -> None:
        for k, (_, sizes) in enumerate(self.inputs):
            for d, size in enumerate(sizes):
                if not isinstance(size, int | sympy.Symbol) and _number(size, values) != shapes[k][d]:
                    name = self._name_dim(k, d)
                    must = f"{name} must be {self._describe_expression(size)}{self._describe_line(k, d)}"
                    raise self._make_error(name, must, shapes[k][d])
        for condition in self.limits.conditions:
            if not _number(condition.holds, values):
                own = condition.holds.free_symbols
                given = ", ".join(
                    f"{self._describe_expression(symbol)} = {n}" for symbol, n in values.items() if symbol in own
                )
                name = self._describe_expression(condition.holds)
                raise self._make_error(name, self.describe_condition(condition), given)

    def describe_condition(self, condition: Condition) -> str:
        """A condition with the names of the dimensions and its line: ``x.shape[1] < 100 (net.py:7) must hold``."""
        line = f" ({condition.line})" if condition.line else ""
        return f"{self._describe_expression(condition.holds)}{line} must hold"

    @property
    def fixed(self) -> list[str]:
        """What the model's code fixed, in the words of a report: ``batch = 2 (module.py:7)``."""
        places = ((k, d, size) for k, (_, sizes) in enumerate(self.inputs) for d, size in enumerate(sizes))
        found = [
            f"{self._name_dim(k, d)} = {size}{self._describe_line(k, d)}"
            for k, d, size in places
            if self._describe_line(k, d)
        ]
        found += [f"{self._describe_expression(c.holds)} ({c.line})" for c in self.limits.conditions if c.line]
        found += [f"{self._name_symbol(symbol)} > 1" for symbol in sorted(self.limits.several)]
        return list(dict.fromkeys(found))

    def find_fixed_size(self, dim: int) -> int | None:
        """The fixed size that dimension ``dim`` has in all inputs; None if it is open, or the inputs differ."""
        found = {sizes[dim] for _, sizes in self.inputs if len(sizes) > dim}
        size = next(iter(found), None)
        return size if len(found) == 1 and isinstance(size, int) else None

    def list_symbols(self) -> list[sympy.Symbol]:
        """The symbols of sizes that may be others, in the order of the inputs."""
        solved = (solve_size(size) for _, sizes in self.inputs for size in sizes)
        return list(dict.fromkeys(each.symbol for each in solved if each is not None))

    def find_values(self, shapes: Sequence[Sequence[int]]) -> dict[sympy.Symbol, int]:
        """The values of all symbols for inputs of these shapes, which the program holds for."""
        found = dict[sympy.Symbol, int]()
        for (_, sizes), shape in zip(self.inputs, shapes, strict=True):
            for size, given in zip(sizes, shape, strict=True):
                if (solved := solve_size(size)) is not None:
                    found.setdefault(solved.symbol, (given - solved.offset) // solved.factor)
        return found

    def find_shapes(self, values: Mapping[sympy.Symbol, int]) -> list[tuple[int, ...]] | None:
        """The shapes of the inputs for these values of all symbols; None if the program does not hold for them."""
        if not all(_number(condition.holds, values) for condition in self.conditions):
            return None
        return self.compute_shapes(values)

    def compute_shapes(self, values: Mapping[sympy.Symbol, int]) -> list[tuple[int, ...]]:
        """The shapes of the inputs for these values of all symbols."""
        return [tuple(s if isinstance(s, int) else int(_number(s, values)) for s in sizes) for _, sizes in self.inputs]

    def find_sides(self, values: Mapping[sympy.Symbol, int]) -> list[Sides]:
        """For each condition, sizes near ``values`` that meet it and that do not. ``values``: sizes that meet all."""
        # One symbol is moved at a time. On the unmet side only this condition may fail: sizes that another one refuses
        # first would not test it.
        found = []
        for condition in self.conditions:
            sides = dict[bool, dict[sympy.Symbol, int]]()
            for symbol in sorted(condition.holds.free_symbols & values.keys(), key=str):
                for size in _list_near_sizes(condition.holds, values[symbol]):
                    tried = {**values, symbol: size}
                    failing = [other for other in self.conditions if not _number(other.holds, tried)]
                    if not failing or failing == [condition]:
                        sides.setdefault(not failing, tried)
            found.append(Sides(condition, sides.get(True), sides.get(False)))
        return found

    def _make_error(self, name: str, what: str, given: object) -> MptkError:
        """The error about the dimension or the condition ``name``."""
        said = given if isinstance(given, str) else f"it is {given}"
        return DataError(
            f"this program was traced for other sizes: {what}, and {said}; "
            "give such inputs, or trace the model with an example of these sizes",
            name=name,
        )

    def _describe_line(self, k: int, d: int) -> str:
        line = self.limits.lines.get((self.inputs[k][0], d))
        return f" ({line})" if line else ""

    def _name_dim(self, k: int, d: int) -> str:
        """``batch`` for the first dimension of all inputs, ``x.shape[1]`` for the second of x."""
        # A first dimension that all inputs share is the batch.
        whole = d == 0 and len({sizes[0] for _, sizes in self.inputs if sizes}) == 1
        return "batch" if whole else f"{self.names[k]}.shape[{d}]"

    def _name_symbol(self, symbol: str) -> str:
        places = ((k, d) for k, (_, sizes) in enumerate(self.inputs) for d, s in enumerate(sizes) if str(s) == symbol)
        return next((self._name_dim(k, d) for k, d in places), symbol)

    def _describe_expression(self, expression: sympy.Basic) -> str:
        """An expression with the names of the dimensions; an equation as ``a = b``."""
        if isinstance(expression, sympy.Eq):
            return f"{self._describe_expression(expression.lhs)} = {self._describe_expression(expression.rhs)}"
        if isinstance(expression, sympy.Ne):
            return f"{self._describe_expression(expression.lhs)} != {self._describe_expression(expression.rhs)}"
        # sympy prints Eq(a, b) and Ne(a, b), which no user writes; other relations print as they are written.
        names = {s: sympy.Symbol(self._name_symbol(str(s))) for s in expression.free_symbols}
        return str(expression.xreplace(names))


@dataclass(frozen=True)
class Sides:
    """Sizes on both sides of a condition; None if there are none near."""

    condition: Condition
    met: Mapping[sympy.Symbol, int] | None
    unmet: Mapping[sympy.Symbol, int] | None


NEAR, FARTHEST = 64, 2048
"""Sizes up to ``NEAR`` are tried, and those around a condition's own numbers up to ``FARTHEST``: more take memory."""


def _list_near_sizes(holds: sympy.Basic, size: int) -> list[int]:
    """Other sizes, the nearest first."""
    # A condition changes at its own numbers (x < 100), so both sides are found there or among small sizes.
    numbers = {int(n) for n in holds.atoms(sympy.Integer) if abs(int(n)) <= FARTHEST}
    around = {n + by for n in numbers for by in (-1, 0, 1) if n + by > 0}
    return sorted({*range(1, NEAR + 1), *around} - {size}, key=lambda other: (abs(other - size), other))


def _number(expression: SymbolicSize, values: Mapping[sympy.Symbol, int]) -> Any:
    """An expression for these values; False if it cannot be decided (a symbol without a value, a quotient by 0).

    While another trace runs, the values may be symbolic. The new trace then gets the condition, too.
    """
    try:
        return number_at(expression, values)
    except (KeyError, ZeroDivisionError, OverflowError, ValueError):  # the last two: outside of a function's range
        return False
