"""torch: fake tensors, nested inputs, operator schemas, symbolic sizes and exported programs."""

from __future__ import annotations

import contextlib
import linecache
import logging
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import FunctionSchema, Tensor, fx
from torch import _check as check
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph_module import _loader
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
