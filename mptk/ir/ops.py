"""ops: the names and the arguments of a graph's calls."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx

from mptk.compat.torch import schema


def op_name(node: fx.Node) -> str:
    """``aten.add.Tensor`` for a call of it; a Python function's module and name otherwise."""
    return target_name(node.target)


@functools.cache
def target_name(target: Any) -> str:
    """The name of what a node calls."""
    if hasattr(target, "overloadpacket"):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


@functools.cache
def base_name(target: Any) -> str:
    """``add`` of ``aten.add.Tensor``."""
    return target_name(target).split(".")[1]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def named_argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an ATen call by its name in the op's schema, wherever it was given."""
    if name in node.kwargs:
        return node.kwargs[name]
    signature = schema(node.target)
    names = [a.name for a in signature.arguments] if signature is not None else []
    return node.args[names.index(name)] if name in names and names.index(name) < len(node.args) else default


def set_argument(node: fx.Node, position: int, name: str, value: Any) -> None:
    """Replace an argument of a call where it stands: among the positional ones, or by name."""
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
