"""torch: fake tensors, nested inputs, operator schemas, symbolic sizes and exported programs."""

from __future__ import annotations

import contextlib
import linecache
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import FunctionSchema, Tensor, fx, nn
from torch import _check as check
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.graph_module import _loader
from torch.nn.modules import normalization
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "FakeTensor",  # The type of traced values. A public name would replace it.
    "FakeTensorMode",  # Runs a model on shapes alone, with real index constants. Meta tensors would lose those.
    "OpOverload",  # The type of a traced call's target. A public name would replace it.
    "build_exported",
    "check",  # States a relation between symbolic sizes; documented as ``torch._check``.
    "drop_tracked_inputs",
    "enable_python_dispatcher",  # Some kernels handle symbolic sizes only in Python. Export sets it, too.
    "quiet_exporter",
    "schema",
    "size_expression",
    "size_hint",
    "sources_forgotten",
    "tree_leaves",  # The tensors of nested inputs, in torch.export's own order.
    "tree_map",  # The same nesting with other tensors.
    "uncached_operators",
    "undecomposed",
]


@contextlib.contextmanager
def sources_forgotten() -> Iterator[None]:
    """Within it torch keeps the source of each module that it generates, and what it found out about symbolic sizes.

    Afterwards both are dropped. torch drops neither, so a process that compiles many models would grow with each. It
    has no public way to.
    """
    before = set(_loader.eval_cache)
    try:
        yield
    finally:
        for method in vars(ShapeEnv).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()
        for name in _loader.eval_cache.keys() - before:
            del _loader.eval_cache[name]
            linecache.cache.pop(name, None)


def drop_tracked_inputs(exported: ExportedProgram) -> None:
    """Let go of the fake inputs that an export tracked, which would keep all of it in memory for ever.

    Their symbolic sizes point back to what tracks them from C++, so no garbage collection finds the circle. The export
    needs them only while it runs. torch has no public way to drop them.
    """
    for node in exported.graph.find_nodes(op="placeholder"):
        if isinstance(value := node.meta.get("val"), FakeTensor):
            sizes = value.fake_mode.shape_env
            if sizes is not None and sizes.tracked_fakes is not None:
                sizes.tracked_fakes.clear()
            return


def schema(target: object) -> FunctionSchema | None:
    """The schema of an operator: arguments, results, and what is written or aliased. None for other callables.

    ``OpOverload`` has no public attribute for it.
    """
    found: FunctionSchema | None = getattr(target, "_schema", None)
    return found


def size_hint(size: torch.SymInt) -> int | None:
    """The value of a symbolic size in the example inputs; None if it depends on data.

    ``int(size)`` would specialise the graph to that size.
    """
    hint: object = size.node.hint
    return hint if isinstance(hint, int) else None


def size_expression(size: torch.SymInt) -> object:
    """A symbolic size as a sympy expression. Comparing the sizes themselves would add a guard to the graph."""
    expression: object = size.node.expr
    return expression


def build_exported(
    like: ExportedProgram,
    graph: fx.GraphModule,
    signature: ExportGraphSignature,
    *,
    state: dict[str, Tensor],
    constants: Mapping[str, Tensor],
    example_inputs: tuple[tuple[object, ...], dict[str, object]] | None,
) -> ExportedProgram:
    """An ``ExportedProgram`` with another graph and weights. Size ranges, nesting and verifier are those of ``like``.

    torch asks users not to call the constructor. A public way to edit an exported program would replace this.
    """
    return ExportedProgram(
        root=graph,
        graph=graph.graph,
        graph_signature=signature,
        state_dict=state,
        range_constraints=like.range_constraints,
        module_call_graph=like.module_call_graph,
        example_inputs=example_inputs,
        constants=dict(constants),
        verifiers=[like.verifier],
    )


class _Undecomposed(ExportedProgram):
    def run_decompositions(self, *_: object, **__: object) -> ExportedProgram:
        return self


def undecomposed(exported: ExportedProgram) -> ExportedProgram:
    """``exported`` for ``torch.onnx.export`` without decomposition, for which that has no option."""
    return _Undecomposed(
        root=exported.graph_module,
        graph=exported.graph,
        graph_signature=exported.graph_signature,
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
        verifiers=list(exported.verifiers),
    )


@contextlib.contextmanager
def uncached_operators() -> Iterator[None]:
    """Within it fake tensors do not remember what operators gave, which a symbolic trace would keep for ever.

    There is no public switch.
    """
    import torch._dynamo.config  # takes time, so not before a trace

    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence ``torch.onnx.export``, which logs a warning for each torchvision operator if torchvision is missing."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


CODE = re.compile(r"\.(modeling|configuration)_")
"""In the names of modules with the code of models."""


class _Whole(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, (int, torch.SymInt))


class _Integer(metaclass=_Whole):
    """``int`` that keeps a symbolic number symbolic."""

    def __new__(cls, value: Any = 0, *base: int) -> Any:
        if isinstance(value, torch.SymFloat):
            return value.__trunc__()
        return value if isinstance(value, torch.SymInt) else int(value, *base)


class _NoNumbers(TorchFunctionMode):
    """Within it a number read from a tensor without numbers is NaN."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.item, Tensor.tolist) and isinstance(args[0], FakeTensor):
            return _unknown(() if func is Tensor.item else args[0].shape)
        return func(*args, **(kwargs or {}))


def _unknown(shape: Sequence[int]) -> Any:
    return [_unknown(shape[1:]) for _ in range(shape[0])] if shape else math.nan


class Symbols:
    """Integers that torch computes with as symbols: the sizes of what is built from them are expressions of them."""

    def __init__(self) -> None:
        self._env = ShapeEnv(specialize_zero_one=False)  # type: ignore[no-untyped-call]

    def integer(self, name: str, value: int) -> tuple[Any, torch.SymInt]:
        """The sympy symbol of a new integer, and the integer itself. Where Python needs a number it is ``value``."""
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
    def building(self, own: str) -> Iterator[None]:
        """Within it tensors are made without numbers, and the code of models and of the module ``own`` takes symbols.

        What asks whether a number is an ``int``, or makes one of it, would refuse it or lose what it depends on.
        """
        mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        with contextlib.ExitStack() as stack:
            for module in [m for name, m in sys.modules.items() if name == own or CODE.search(name)]:
                stack.enter_context(_named(module, "int", _Integer))
            stack.enter_context(_named(normalization, "numbers", SimpleNamespace(Integral=_Integer)))
            stack.enter_context(_named(nn.Module, "to", lambda module, *_, **__: module))
            stack.enter_context(_named(torch.SymInt, "__hash__", lambda number: hash(number.node.hint)))
            for context in (self._env.suppress_guards(), mode, torch.device("cpu"), _NoNumbers()):
                stack.enter_context(context)
            yield


@contextlib.contextmanager
def _named(module: Any, name: str, value: object) -> Iterator[None]:
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


def expression(number: object) -> Any:
    """A number as a sympy expression if it is symbolic, or itself."""
    return number.node.expr if isinstance(number, (torch.SymInt, torch.SymFloat)) else number
