"""ops: names, arguments and memory use of a graph's calls, and the sizes of traced values as plain integers.

A symbolic size is its value in the example inputs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from mptk.compat.torch import express_size, find_schema, find_size_hint
from mptk.errors import AnalysisError

Vertex = TypeVar("Vertex", bound=Hashable)
TYPE_CHECK = torch.ops.aten._assert_tensor_metadata.default
"""torch.export adds this check of a value's type. In an autocast the value has another type, so passes ignore it."""


def find_reachable(start: Iterable[Vertex], sources: Callable[[Vertex], Iterable[Vertex]]) -> set[Vertex]:
    """``start`` and everything that ``sources`` leads to from there, such as ``fx.Node.all_input_nodes``."""
    # A list and no recursion: graphs are deeper than Python's stack.
    found, waiting = set[Vertex](), list(start)
    while waiting:
        if (node := waiting.pop()) not in found:
            found.add(node)
            waiting += sources(node)
    return found


def name_op(node: fx.Node) -> str:
    """``aten.add.Tensor`` for an ATen op, else the Python function's module and name."""
    return name_target(node.target)


@functools.cache
def name_target(target: object) -> str:
    """The name of a node's target."""
    if hasattr(target, "overloadpacket"):  # an ATen op or a custom one; others are Python functions, like getitem
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


@functools.cache
def name_base_op(target: object) -> str:
    """``add`` of ``aten.add.Tensor``."""
    return name_target(target).split(".")[1]


@functools.cache
def list_schema_arguments(target: object) -> tuple[str, ...]:
    """The names of an ATen op's arguments, in the order of its schema."""
    signature = find_schema(target)
    return tuple(a.name for a in signature.arguments) if signature is not None else ()


@functools.cache
def find_aliased_arguments(target: object, *, writes: bool) -> tuple[int, ...]:
    """Positions of arguments in an op's schema: those it writes to, or those whose memory its result may share."""
    signature = find_schema(target)
    infos = [a.alias_info for a in signature.arguments] if signature is not None else []
    return tuple(i for i, info in enumerate(infos) if info is not None and (info.is_write or not writes))


def find_storage(node: fx.Node) -> fx.Node:
    """The value that owns the memory of a call's result; the node itself if the call allocates."""
    # Back from view to view. One of several results shares memory as the call itself does.
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    signature = find_schema(source.target)
    if signature is None or not any(result.alias_info is not None for result in signature.returns):
        return node
    given = (source.args[p] for p in find_aliased_arguments(source.target, writes=False) if p < len(source.args))
    return next((find_storage(value) for value in given if isinstance(value, fx.Node)), node)


def find_written_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes to. A norm by its input's own statistics writes the running ones."""
    if name_base_op(node.target) in _RUNNING and get_argument(node, _RUNNING[name_base_op(node.target)]):
        found = [get_argument(node, "running_mean"), get_argument(node, "running_var")]
    else:
        found = [node.args[p] for p in find_aliased_arguments(node.target, writes=True) if p < len(node.args)]
    several = [each if isinstance(each, (list, tuple)) else [each] for each in found]
    return [value for each in several for value in each if isinstance(value, fx.Node)]


_RUNNING = {"batch_norm": "training", "instance_norm": "use_input_stats"}
"""Norm → the argument with which it writes running statistics. ATen's schema declares these ops free of writes."""


def get_argument(node: fx.Node, name: str, default: object = None) -> Any:  # Any: its type is the op's own
    """An argument of a call by its name in the op's schema, whether it was given by position or by name."""
    names = list_schema_arguments(node.target)
    if name in node.kwargs or name not in names:
        return node.kwargs.get(name, default)
    position = names.index(name)
    return node.args[position] if position < len(node.args) else default


def set_argument(node: fx.Node, name: str, value: Argument) -> None:
    """Replace an argument of a call by its name in the op's schema. A positional argument stays positional."""
    position = list_schema_arguments(node.target).index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def resolve_shape(value: Tensor) -> tuple[int, ...]:
    """Sizes of a traced tensor."""
    # Most shapes hold only ints. They are returned at once: the analysis asks for each value's shape many times.
    sizes = tuple(value.shape)
    for size in sizes:
        if type(size) is not int:
            return tuple(resolve_size(s) for s in sizes)
    return sizes


def resolve_result_shape(node: fx.Node) -> tuple[int, ...]:
    """Sizes of a node's result. It must be one tensor."""
    return resolve_shape(node.meta["val"])


def resolve_size(size: int | torch.SymInt) -> int:
    """One size as an integer. Raises MptkError if the size depends on data."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    # ``int(size)`` would make the trace hold for this size only.
    hint = find_size_hint(size)
    if hint is None:
        raise AnalysisError(
            f"a size depends on data ({size}), so axes cannot be followed; use a traceable implementation", name=size
        )
    return hint


def is_open(size: int | torch.SymInt) -> bool:
    """Whether a program holds for other values of a size than its example's: the trace may have made it one number."""
    return isinstance(size, torch.SymInt) and not getattr(express_size(size), "is_number", False)
