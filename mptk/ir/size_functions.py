"""size_functions: functions of sizes in a few primitive ones, and an expression of sizes as a number.

A trace knows a size as an expression of torch's own functions. ``interpret`` gives each to a method of that name.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from mptk.compat.symbols import interpret
from mptk.errors import TargetError

SizeValue = Any
"""A number in Python, or what a format has in its place: a node of a graph, a value of ONNX."""


class SizeOperations(ABC):
    """Functions of sizes, made of a few primitive ones. torch's interpreter of expressions calls them by these names.

    A subclass says with ``apply(operator, *arguments)`` what the primitive ones are.

    ``steep``: its product with any number of these expressions but 0 is at least 1. It is a power of two, so nothing
    is rounded if sympy multiplies each part of a sum by it.
    """

    steep = 2.0**900

    @abstractmethod
    def apply(self, function: Callable[..., Any], *arguments: SizeValue) -> SizeValue:
        """A primitive function of numbers and values."""

    def constant(self, number: Any, dtype: torch.dtype) -> SizeValue:
        return {torch.int64: int, torch.bool: bool}.get(dtype, float)(number)

    def to_dtype(self, x: SizeValue, dtype: torch.dtype) -> SizeValue:
        return self.apply(torch.sym_float, x)

    def trunc_to_int(self, x: SizeValue, dtype: torch.dtype) -> SizeValue:
        return self.apply(math.trunc, x)

    def trunc(self, x: SizeValue) -> SizeValue:
        return self.apply(torch.sym_float, self.apply(math.trunc, x))

    def floor_to_int(self, x: SizeValue, dtype: torch.dtype = torch.int64) -> SizeValue:
        """``trunc``, less 1 if that is above x. A choice of two values would write the expression several times."""
        whole = self.apply(math.trunc, x)
        rest = self.sub(x, self.apply(torch.sym_float, whole))  # ONNX mixes no types
        below = self.maximum(-1.0, self.minimum(0.0, self.mul(rest, self.steep)))  # -1 if x < whole, else 0
        return self.add(whole, self.apply(math.trunc, below))

    def ceil_to_int(self, x: SizeValue, dtype: torch.dtype = torch.int64) -> SizeValue:
        return self.neg(self.floor_to_int(self.neg(x)))

    def round_to_int(self, x: SizeValue, dtype: torch.dtype = torch.int64) -> SizeValue:
        """To the nearest whole number, and from the middle to the even one, as Python rounds."""
        # ⌊x + 1/2⌋ is right except in the middle between two numbers. There 1 is taken off if it is odd.
        up = self.floor_to_int(self.add(x, 0.5))
        apart = self.abs(self.sub(self.sub(self.apply(torch.sym_float, up), x), 0.5))
        beside = self.minimum(1.0, self.mul(apart, self.steep))  # 0 if x is in the middle
        return self.sub(up, self.mul(self.sub(1, self.apply(math.trunc, beside)), self.mod(up, 2)))

    def round_quotient(self, a: SizeValue, b: SizeValue) -> SizeValue:
        """``round(a / b)`` of whole numbers, exactly."""
        # a/b + 1/2 = (2a + b) / 2b. In the middle the division leaves no rest.
        both, twice = self.add(self.mul(2, a), b), self.mul(2, b)
        up = self.floordiv(both, twice)
        in_the_middle = self.sub(1, self.minimum(1, self.mod(both, twice)))
        return self.sub(up, self.mul(in_the_middle, self.mod(up, 2)))

    def abs(self, x: SizeValue) -> SizeValue:
        return self.maximum(x, self.neg(x))

    def add(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.add, a, b)

    def sub(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.sub, a, b)

    def mul(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.mul, a, b)

    def neg(self, x: SizeValue) -> SizeValue:
        return self.apply(operator.neg, x)

    def truediv(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.truediv, a, b)

    int_truediv = truediv

    def floordiv(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.floordiv, a, b)

    def mod(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.mod, a, b)

    python_mod = mod

    def modular_indexing(self, a: SizeValue, b: SizeValue, c: SizeValue) -> SizeValue:
        return self.mod(self.floordiv(a, b), c)

    def pow(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.pow, a, b)

    pow_by_natural = pow

    def sqrt(self, x: SizeValue) -> SizeValue:
        return self.apply(torch.sym_sqrt, x)

    def maximum(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(torch.sym_max, a, b)

    def minimum(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(torch.sym_min, a, b)

    def where(self, condition: SizeValue, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(torch.sym_ite, condition, a, b)

    def piecewise(self, *pairs: tuple[SizeValue, SizeValue]) -> SizeValue:
        # The last condition of a complete ``Piecewise`` is True.
        found = pairs[-1][0]
        for value, condition in reversed(pairs[:-1]):
            found = self.where(condition, value, found)
        return found

    def expr_cond_pair(self, value: SizeValue, condition: SizeValue) -> tuple[SizeValue, SizeValue]:
        return value, condition

    def identity(self, x: SizeValue) -> SizeValue:
        return x

    def eq(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.eq, a, b)

    def ne(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.ne, a, b)

    def lt(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.lt, a, b)

    def le(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.le, a, b)

    def gt(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.gt, a, b)

    def ge(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.ge, a, b)

    def and_(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.and_, a, b)

    def bitwise_and(self, a: SizeValue, b: SizeValue) -> SizeValue:
        """Of a number and a mask of its last bits, which is all that torch.export can write."""
        # x & (2^n − 1) = x % 2^n; ``mask & (mask + 1)`` is 0 for exactly these masks.
        for number, mask in ((a, b), (b, a)):
            if isinstance(mask, int) and mask > 0 and not mask & (mask + 1):
                return self.mod(number, mask + 1)
        if isinstance(a, int) and isinstance(b, int):
            return a & b
        raise TargetError(f"torch.export cannot write {a} & {b} of sizes; use % and //")

    def or_(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.apply(operator.or_, a, b)

    # Both follow from ``&``: a + b counts the common bits twice.
    def bitwise_or(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.sub(self.add(a, b), self.bitwise_and(a, b))

    def bitwise_xor(self, a: SizeValue, b: SizeValue) -> SizeValue:
        return self.sub(self.bitwise_or(a, b), self.bitwise_and(a, b))

    def not_(self, a: SizeValue) -> SizeValue:
        return self.apply(torch.sym_not, a)


class SizeNumbers(SizeOperations):
    """Functions of numbers in Python, or of a trace's symbolic numbers."""

    def apply(self, function: Callable[..., Any], *arguments: SizeValue) -> SizeValue:
        return function(*arguments)


def number_at(size: sympy.Basic, values: Mapping[sympy.Symbol, Any]) -> Any:
    """An expression at some values, which may be sizes of a trace: then the result is symbolic, too.

    Raises:
        KeyError: a symbol has no value, or a function is unknown.
    """
    return interpret(SizeNumbers(), values, size)
