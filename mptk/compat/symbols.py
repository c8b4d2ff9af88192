"""symbols: build a model from symbolic integers, so that the sizes of its weights are expressions of its config.

There is no public way to build modules from symbolic sizes: torch makes such sizes only while it traces.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn.modules import normalization
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from mptk.compat.torch import stop_operator_cache

Symbol: TypeAlias = sympy.Symbol
SymbolicNumber: TypeAlias = Any
"""A sympy expression, an int or a float."""
# In the names of modules with the code of models: those of transformers, and diffusers' package.
CODE = re.compile(r"\.(modeling|configuration)_|^diffusers\.models\.")
# The largest denominator of an exponent. Fractions with larger ones could not be told apart from rounded floats.
MOST = 10**6


class _Whole(type):
    # isinstance(x, int) in the code of a model is also true of a symbolic integer.
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, (int, torch.SymInt))


class _Integer(metaclass=_Whole):
    """``int`` that keeps a symbolic number symbolic."""

    def __new__(cls, value: Any = 0, *base: int) -> Any:
        # int(symbol) would give its value, and the size would no longer depend on the config.
        if isinstance(value, torch.SymFloat):
            return value.__trunc__()
        return value if isinstance(value, torch.SymInt) else int(value, *base)


class _NoNumbers(TorchFunctionMode):
    """Lets NaN be read from tensors that have no numbers."""

    # Constructors read numbers that no size depends on, such as a rate for each layer from ``torch.linspace``.
    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        if func in (Tensor.item, Tensor.tolist) and isinstance(args[0], FakeTensor):
            return _make_unknown(() if func is Tensor.item else args[0].shape)
        return func(*args, **(kwargs or {}))


def _make_unknown(shape: Sequence[int]) -> object:
    return [_make_unknown(shape[1:]) for _ in range(shape[0])] if shape else math.nan


class Symbols:
    """Integers that torch computes with as symbols: the sizes of what is built from them are expressions of them."""

    def __init__(self) -> None:
        # Without this a size of 0 or 1, such as one KV head, would become a plain number.
        self._env = ShapeEnv(specialize_zero_one=False)

    def integer(self, name: str, value: int) -> tuple[Symbol, int | torch.SymInt]:
        """The sympy symbol of a new integer, and the integer itself, which is ``value`` if Python needs a number."""
        from torch._dynamo.source import ConstantSource  # takes time, so not before a trace

        symbol = self._env.create_symbol(
            value,
            ConstantSource(name),
            dynamic_dim=DimDynamic.DYNAMIC,
            constraint_dim=None,
            do_not_specialize_zero_one=True,
        )
        return symbol, self._env.create_symintnode(symbol, hint=value, source=None)

    @contextlib.contextmanager
    def build_symbolically(self, own: str) -> Iterator[None]:
        """Make tensors without numbers, and let the code of models and of the module ``own`` take symbols."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(stop_operator_cache())
            mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
            # Code that asks whether a size is an ``int``, or makes one of it, would refuse a symbol or lose it. A
            # global ``int`` of a module hides the builtin from that module only.
            for module in [m for name, m in sys.modules.items() if name == own or CODE.search(name)]:
                stack.enter_context(_patch_name(module, "int", _Integer))
            # nn.LayerNorm asks whether its shape is a ``numbers.Integral``.
            stack.enter_context(_patch_name(normalization, "numbers", SimpleNamespace(Integral=_Integer)))
            # Only shapes matter here, so nothing is moved or converted.
            stack.enter_context(_patch_name(nn.Module, "to", lambda module, *_, **__: module))
            # torch makes symbols unhashable; constructors put sizes into sets and dicts.
            stack.enter_context(_patch_name(torch.SymInt, "__hash__", lambda number: hash(number.node.hint)))
            # A comparison takes the branch of the symbols' values and sets no condition on them.
            for context in (self._env.suppress_guards(), mode, torch.device("cpu"), _NoNumbers()):
                stack.enter_context(context)
            yield


@contextlib.contextmanager
def _patch_name(module: object, name: str, value: object) -> Iterator[None]:
    absent = object()
    before = vars(module).get(name, absent)
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is absent:
            delattr(module, name)
        else:
            setattr(module, name, before)


def to_expression(number: object) -> SymbolicNumber:
    """A number as a sympy expression if it is symbolic, or itself."""
    return number.node.expr if isinstance(number, (torch.SymInt, torch.SymFloat)) else number


def evaluate_numbers(numbers: Sequence[SymbolicNumber], values: dict[Symbol, int]) -> list[Any]:
    """The numbers at the values of all their symbols. A quotient by 0 counts as 0, which no weight has for a size."""
    # Many sizes are the same expression: each is computed once.
    found = dict[SymbolicNumber, Any]()
    for number in dict.fromkeys(number for number in numbers if find_symbols(number)):
        try:
            value = sympy_interp(PythonReferenceAnalysis, values, number)
            found[number] = int(value) if number.is_integer else value
        except ZeroDivisionError:
            found[number] = 0
    return [found.get(number, number) for number in numbers]


def interpret(functions: object, values: Mapping[Symbol, Any], number: SymbolicNumber) -> Any:
    """An expression computed by ``functions``, an object with a method for each function of sizes.

    Raises:
        KeyError: a symbol has no value, or a function is unknown.
    """
    return sympy_interp(functions, dict(values), number)


def find_symbols(number: SymbolicNumber) -> frozenset[Symbol]:
    """The symbols that a number depends on."""
    return frozenset(number.free_symbols) if isinstance(number, sympy.Basic) else frozenset()


def compute_value(number: SymbolicNumber, values: Mapping[Symbol, int]) -> Any:
    """A number at some values of its symbols."""
    found = number.xreplace(dict(values)) if isinstance(number, sympy.Basic) else number
    return int(found) if isinstance(found, sympy.Integer) else found


def compute_exponents(number: SymbolicNumber, values: Mapping[Symbol, int]) -> dict[Symbol, Fraction]:
    """By how many percent a number grows at ``values`` if a symbol grows by one percent, as if nothing were rounded.

    If the number is a product, this is the symbol's exponent. The parts of a sum count by their sizes.
    """
    # ∂ log f / ∂ log s = s · f′ / f
    smooth = _smooth(number, values) if find_symbols(number) else sympy.Integer(1)
    found = {symbol: compute_value(symbol * smooth.diff(symbol) / smooth, values) for symbol in find_symbols(smooth)}
    # A number that is 0 at ``values`` has no exponent (all blocks but the last of one): sympy gives infinity.
    finite = {s: float(e) for s, e in found.items() if not isinstance(e, sympy.Basic) or e.is_real}
    return {s: Fraction(e).limit_denominator(MOST) for s, e in finite.items() if math.isfinite(e) and e}


def _smooth(number: sympy.Basic, values: Mapping[Symbol, int]) -> sympy.Basic:
    """An expression near ``values`` without branches and rounding, so that it can be differentiated."""
    # By name: torch's classes for functions of sizes (torch.utils._sympy.functions) are private.
    kind, args = type(number).__name__, [_smooth(part, values) for part in number.args]
    # Functions with branches become the branch that is taken at ``values``.
    if kind in ("Max", "Min"):
        return (max if kind == "Max" else min)(args, key=lambda part: compute_value(part, values))
    if kind == "Where":
        return args[1] if compute_value(args[0], values) else args[2]
    # A remainder jumps, so it counts as a constant.
    if kind in ("Mod", "PythonMod"):
        return sympy.Integer(compute_value(number, values))
    # Quotients and roundings become quotients.
    if kind.endswith("Div"):
        if len(parts := sympy.Add.make_args(args[0])) > 1:
            # n + b − 1 and n + b / 2 only round n / b up or to the nearest: such small terms go.
            least = compute_value(args[1], values)
            args[0] = sympy.Add(*(p for p in parts if p != args[1] and compute_value(p, values) >= least)) or args[1]
        return args[0] / args[1]
    if "Pow" in kind:
        return sympy.Pow(*args)
    if kind == "OpaqueUnaryFn_sqrt":
        return sympy.sqrt(args[0])
    if kind.startswith(("To", "Trunc", "Ceil", "Floor", "Round")):
        return args[0]
    return number.func(*args) if args else number
