"""ops: names, arguments and memory use of a graph's calls."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx
from torch.fx.node import Argument

from mptk.compat.torch import schema


def op_name(node: fx.Node) -> str:
    """``aten.add.Tensor`` for an ATen op, else the Python function's module and name."""
    return target_name(node.target)


@functools.cache
def target_name(target: object) -> str:
    """The name of a node's target."""
    if hasattr(target, "overloadpacket"):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


@functools.cache
def base_name(target: object) -> str:
    """``add`` of ``aten.add.Tensor``."""
    return target_name(target).split(".")[1]


@functools.cache
def argument_names(target: object) -> tuple[str, ...]:
    """The names of an ATen op's arguments, in the order of its schema."""
    signature = schema(target)
    return tuple(a.name for a in signature.arguments) if signature is not None else ()


@functools.cache
def aliased_arguments(target: object, *, writes: bool) -> tuple[int, ...]:
    """Positions of arguments in an op's schema: those it writes to, or those whose memory its result may share."""
    signature = schema(target)
    infos = [a.alias_info for a in signature.arguments] if signature is not None else []
    return tuple(i for i, info in enumerate(infos) if info is not None and (info.is_write or not writes))


def named_argument(node: fx.Node, name: str, default: object = None) -> Any:  # Any: its type is the op's own
    """An argument of a call by its name in the op's schema, whether it was given by position or by name."""
    names = argument_names(node.target)
    if name in node.kwargs or name not in names:
        return node.kwargs.get(name, default)
    position = names.index(name)
    return node.args[position] if position < len(node.args) else default


def set_argument(node: fx.Node, name: str, value: Argument) -> None:
    """Replace an argument of a call by its name in the op's schema. A positional argument stays positional."""
    position = argument_names(node.target).index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
