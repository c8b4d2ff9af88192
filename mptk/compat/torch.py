"""torch: fake tensors, nested inputs, operator schemas, symbolic sizes and exported programs."""

from __future__ import annotations

import contextlib
import linecache
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import FunctionSchema, Tensor, fx, nn
from torch import _check as check
from torch._C._functorch import get_unwrapped, maybe_get_bdim
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.predispatch import _add_batch_dim as vmap_opens
from torch._functorch.predispatch import _remove_batch_dim as vmap_closes
from torch._guards import SLoc
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph_module import _loader
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "FakeTensor",  # The type of traced values. A public name would replace it.
    "FakeTensorMode",  # Runs a model on shapes only, with real index constants, which meta tensors would lose.
    "Guard",  # What a trace needs of its sizes.
    "OpOverload",  # The type of a traced call's target. A public name would replace it.
    "build_exported",
    "check",  # States a relation between symbolic sizes; documented as ``torch._check``.
    "drop_tracked_inputs",
    "enable_python_dispatcher",  # Some kernels handle symbolic sizes only in Python. Export sets it, too.
    "express_size",
    "find_custom_function",
    "find_schema",
    "find_size_hint",
    "find_size_origin",
    "forget_sources",
    "forward_hooks",
    "hide_exporter_logs",
    "hide_fake_logs",
    "keep_small_constants",
    "list_field_names",
    "list_gradient_hooks",
    "list_guards",
    "mark_undecomposed",
    "move_samples_last",
    "record_locations",
    "stop_operator_cache",
    "tree_leaves",  # The tensors of nested inputs, in torch.export's own order.
    "tree_map",  # The same nesting with other tensors.
    "use_default_state",
    "vmap_closes",  # What a traced ``torch.vmap`` calls on its results. Its ops have no public names.
    "vmap_opens",  # The same on its operands.
]

# Paths in the stack of a question that an operator asks while export computes the shape of its result.
_KERNELS = ("/torch/_subclasses/", "/torch/_prims_common/", "/torch/_refs/")


@contextlib.contextmanager
def forget_sources() -> Iterator[None]:
    """Drop what torch keeps of the block: the source of each generated module, and its caches of symbolic sizes.

    torch drops neither and has no public way to, so a process that compiles many models would grow with each.
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


_AUTOCAST = ("cpu", "cuda", "xpu", "mps")
_NARROW = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def use_default_state() -> Iterator[None]:
    """Let torch compute as in a new process, whatever the caller has set around the call.

    Gradients can be taken, autocast is off, new tensors are on the CPU and not in half precision. A default type of
    float64 stays: the caller's module may make tensors in it.
    """
    with contextlib.ExitStack() as stack:
        # Each is set only if it differs: most callers have set nothing.
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (before := torch.get_default_dtype()) in _NARROW:
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(torch.float32)
        yield


def drop_tracked_inputs(exported: ExportedProgram) -> None:
    """Let go of the fake inputs that an export tracked, which would keep the whole export in memory for ever.

    The export needs them only while it runs. torch has no public way to drop them.
    """
    # Their symbolic sizes point back to what tracks them, from C++: no garbage collection finds that circle.
    for node in exported.graph.find_nodes(op="placeholder"):
        if isinstance(value := node.meta.get("val"), FakeTensor):
            sizes = value.fake_mode.shape_env
            if sizes is not None and sizes.tracked_fakes is not None:
                sizes.tracked_fakes.clear()
            return  # all inputs share one list


def find_schema(target: object) -> FunctionSchema | None:
    """The schema of an operator: arguments, results, and what is written or aliased. None for other callables.

    ``OpOverload`` has no public attribute for it.
    """
    found: FunctionSchema | None = getattr(target, "_schema", None)
    return found


def find_custom_function(tensor: Tensor) -> type | None:
    """The ``torch.autograd.Function`` with a backward of its own that made a tensor; None if none did."""
    found: type | None = getattr(type(tensor.grad_fn), "_forward_cls", None)
    return found


def list_gradient_hooks(module: nn.Module) -> Iterator[str]:
    """The names of parameters and parts with hooks on their gradients. torch lists them nowhere in public."""
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            yield name
    for name, part in module.named_modules():
        if part._backward_hooks or part._backward_pre_hooks:
            yield name


def forward_hooks(module: nn.Module) -> list[object]:
    """The hooks around a module's ``forward``, which torch lists nowhere in public."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def list_field_names(value: tuple[object, ...]) -> tuple[str, ...] | None:
    """The names of a named tuple's fields; None for another tuple."""
    # ``_fields`` is public, in spite of its underscore.
    found: tuple[str, ...] | None = getattr(value, "_fields", None)
    return found


def move_samples_last(value: Tensor) -> Tensor:
    """A value under ``torch.vmap`` with its samples as last dimensions; any other value as it is.

    What code under ``torch.vmap`` sees of a tensor cannot be kept beyond it. torch has no public way to the samples.
    """
    # Levels of ``torch.vmap`` may be nested; the innermost is unwrapped first.
    while (dim := maybe_get_bdim(value)) >= 0:
        value = get_unwrapped(value).movedim(dim, -1)
    return value


def find_size_hint(size: torch.SymInt) -> int | None:
    """The value of a symbolic size in the example inputs; None if it depends on data.

    ``int(size)`` would specialise the graph to that size.
    """
    hint: object = size.node.hint
    return hint if isinstance(hint, int) else None


@dataclass(frozen=True)
class Guard:
    """A condition on sizes that a trace needs, as a sympy expression.

    ``stack``: where Python asked for it, as lines of a traceback, outermost first. ``kernel``: an operator asked while
    its shapes were computed, and the graph holds the same call of it whatever the answer is.
    """

    holds: sympy.Basic
    stack: str
    kernel: bool


@contextlib.contextmanager
def record_locations() -> Iterator[None]:
    """Let export keep the Python stack with each condition on sizes, and not only one frame."""
    original = ShapeEnv._get_sloc
    ShapeEnv._get_sloc = lambda self, framework_loc=None: SLoc(framework_loc, _stack())  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShapeEnv._get_sloc = original  # type: ignore[method-assign]


def _stack() -> str:
    # From whoever asked ``ShapeEnv`` out to where export called the model; the frames around that are mptk's.
    frame, lines = sys._getframe(2), list[str]()
    while frame is not None and not frame.f_code.co_filename.endswith("/torch/export/_trace.py"):
        lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}')
        frame = frame.f_back  # type: ignore[assignment]
    return "\n".join(reversed(lines))


def list_guards(sizes: Iterable[torch.SymInt]) -> list[Guard]:
    """The conditions under which a trace with these symbolic sizes holds, in the order in which it asked for them."""
    environment: ShapeEnv | None = next((size.node.shape_env for size in sizes), None)
    if environment is None:
        return []
    pairs = ((environment.replace(guard.expr), str(guard.sloc.maybe_user_loc)) for guard in environment.guards)
    return [Guard(holds, stack, _is_in_kernel(stack)) for holds, stack in pairs]


def find_size_origin(size: torch.SymInt) -> str:
    """The stack that made a symbolic size a number, or another size; empty if nothing did."""
    # A symbol may be replaced by another, and that again: the last replacement counts.
    symbol, stack = size.node._expr, ""
    while (place := size.node.shape_env.replacements_slocs.get(symbol)) is not None:
        stack, symbol = str(place.maybe_user_loc), size.node.shape_env.replacements[symbol]
    return "" if _is_in_kernel(stack) else stack


def _is_in_kernel(stack: str) -> bool:
    """Whether an operator asked the question, and did not ask for a number."""
    # If it asks for a number (guard_int), the count of its results may depend on it, as with ``unbind``.
    return any(part in stack for part in _KERNELS) and " in guard_int\n" not in stack


def express_size(size: torch.SymInt | torch.SymBool) -> Any:
    """A symbolic size, or a condition on sizes, as a sympy expression.

    Comparing the sizes themselves would add a guard to the graph.
    """
    return size.node.expr


def build_exported(
    like: ExportedProgram,
    graph: fx.GraphModule,
    signature: ExportGraphSignature,
    *,
    state: dict[str, Tensor],
    constants: Mapping[str, Tensor],
    example_inputs: tuple[tuple[object, ...], dict[str, object]] | None,
) -> ExportedProgram:
    """An ``ExportedProgram`` with another graph and weights. Size ranges, nesting and verifier are taken from ``like``.

    A public way to edit an exported program would replace this.
    """
    # torch asks users not to call the constructor.
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


def mark_undecomposed(exported: ExportedProgram) -> ExportedProgram:
    """``exported`` in a form that ``torch.onnx.export`` does not decompose. It has no option for that."""
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
def stop_operator_cache() -> Iterator[None]:
    """Let fake tensors not remember the results of operators. There is no public switch."""
    # The cache is global, and its keys would keep all symbolic sizes of a trace for ever.
    import torch._dynamo.config  # takes time, so not before a trace

    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


KNOWN_NUMBERS = 4096
"""Elements of the largest constant whose numbers ``keep_small_constants`` keeps. torch's own limit is 1."""


@contextlib.contextmanager
def keep_small_constants() -> Iterator[None]:
    """Let a trace compute with the numbers of constants of up to ``KNOWN_NUMBERS`` elements.

    So sizes that ``forward`` computes from a constant stay numbers. There is no public switch.
    """
    # Both modules have a name of their own for the limit.
    before = [(module, module.CONSTANT_NUMEL_LIMIT) for module in (fake_tensor, proxy_tensor)]
    for module, _ in before:
        setattr(module, "CONSTANT_NUMEL_LIMIT", KNOWN_NUMBERS)  # noqa: B010 (mypy: torch declares it final)
    try:
        yield
    finally:
        for module, limit in before:
            setattr(module, "CONSTANT_NUMEL_LIMIT", limit)  # noqa: B010


@contextlib.contextmanager
def hide_exporter_logs(name: str = "torch.onnx._internal.exporter._registration") -> Iterator[None]:
    """Silence ``torch.onnx.export``, which logs a warning for each torchvision operator if torchvision is missing.

    ``name``: of another logger; ``torch.export`` logs the traceback of what it also raises.
    """
    with _set_level(name, logging.CRITICAL), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def hide_fake_logs() -> contextlib.AbstractContextManager[None]:
    """Silence fake tensors, which log the traceback of each operator that refuses its shapes."""
    return _set_level(fake_tensor.__name__, logging.CRITICAL)


@contextlib.contextmanager
def _set_level(name: str, wanted: int) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(wanted)
    try:
        yield
    finally:
        logger.setLevel(level)
