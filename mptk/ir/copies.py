"""copies: copy a module to run or trace it, so that ``forward`` does not change the user's own; and find its state."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mptk.compat.torch import forward_hooks
from mptk.errors import ModelError, take_first_line


def copy_module(
    module: nn.Module,
    weight: Callable[[str, Tensor], Tensor] | None = None,
    buffer: Callable[[Tensor], Tensor] = Tensor.clone,
) -> nn.Module:
    """A copy of the modules, their hooks and attributes. Parameters are the user's own; buffers are cloned.

    ``weight``: name, parameter or buffer → the tensor in its place; it gives the tensor itself to leave it. Attributes
    that hold a parameter or a buffer (a cache) hold the copy's.

    Raises:
        MptkError: an attribute cannot be copied.
    """
    # deepcopy takes what ``memo`` holds for an object in place of a copy. So weights are not copied, and an attribute
    # that holds a weight holds the same tensor as the copy's parameter.
    memo: dict[int, object] = {}
    for name, parameter in module.named_parameters():
        found = parameter if weight is None else weight(name, parameter)
        same = found is parameter
        memo[id(parameter)] = parameter if same else nn.Parameter(found, requires_grad=parameter.requires_grad)
    for name, tensor in module.named_buffers():
        memo[id(tensor)] = buffer((tensor if weight is None else weight(name, tensor)).detach())
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # torch refuses to deepcopy a result of a computation
                memo.setdefault(id(value), value.detach().clone())
    try:
        return copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"this {type(module).__name__} cannot be copied ({take_first_line(error)}); keep tensors in parameters and "
            "buffers",
            name=type(module).__name__,
        ) from error


def separate(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors; one that shares memory with an earlier one is cloned.

    A trace takes one tensor for two inputs as one input, and safetensors writes no memory twice.
    """
    seen: set[StorageWeakRef] = set()
    found: list[Tensor] = []
    for tensor in tensors:
        dense = tensor.layout is torch.strided and not tensor.is_meta  # others have no storage to compare
        place = StorageWeakRef(tensor.untyped_storage()) if dense else None
        found.append(tensor.clone() if place in seen else tensor)
        seen |= set() if place is None else {place}
    return tuple(found)


def describe_attributes(module: nn.Module) -> dict[str, str]:
    """What a module holds in Python, by name: numbers, text, tensors and collections of these, as text to compare.

    Buffers only by shape and type: the program keeps their numbers itself.
    """
    found = {name: str((buffer.dtype, list(buffer.shape))) for name, buffer in module.named_buffers()}
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in _OF_TORCH:
                found[f"{path}.{name}" if path else name] = _describe_value(value, 6, known)
    return found


def describe_outside_state(module: nn.Module) -> dict[str, str]:
    """What the code of a module keeps outside of its objects, by name, as text to compare.

    This is: attributes of its classes, globals that its functions name, and variables that functions and hooks close
    over. Libraries are left out.
    """
    found, known = dict[str, str](), {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    functions, seen = list[FunctionType](), set[int]()
    # First the classes of all parts, their functions and hooks, then what these functions reach, and so on.
    for part in module.modules():
        for kind in type(part).__mro__:
            if not _is_own(kind.__module__):
                continue
            for name, value in vars(kind).items():
                function = getattr(value, "__func__", value)
                if isinstance(function, FunctionType):
                    functions.append(function)
                elif not name.startswith("__"):
                    found[f"{kind.__name__}.{name}"] = _describe_value(value, 6, known)
        functions += _find_functions([*vars(part).values(), *forward_hooks(part)], 4)
    while functions:
        function = functions.pop()
        if id(function) in seen or not _is_own(function.__module__):
            continue
        seen.add(id(function))
        for name, value in _find_named_values(function):
            functions += _find_functions(value, 4)
            if not isinstance(value, FunctionType | ModuleType):
                found[name] = _describe_value(value, 6, known)
    return found


def _find_functions(value: object, depth: int) -> list[FunctionType]:
    """The functions that a value is or holds, in collections and in ``functools.partial``."""
    if isinstance(value, FunctionType):
        return [value]
    if isinstance(value, MethodType):
        return _find_functions(value.__func__, depth)
    if isinstance(value, partial):
        return _find_functions([value.func, value.args, value.keywords], depth)
    if depth == 0 or not isinstance(value, (Mapping, list, tuple, set, frozenset, deque)):
        return []
    parts = value.values() if isinstance(value, Mapping) else value
    return [function for each in parts for function in _find_functions(each, depth - 1)]


def _is_own(name: str | None) -> bool:
    """Whether a module of Python is the user's: neither torch's nor another library's with known state."""
    return (name or "").partition(".")[0] not in STATELESS


def _find_named_values(function: FunctionType) -> Iterator[tuple[str, object]]:
    """The globals and the enclosing variables that a function names, with their values."""
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            yield f"{function.__name__}.{name}", cell.cell_contents


STATELESS = frozenset(
    ["builtins", "einops", "numpy", "peft", "timm", "torch", "torchaudio", "torchvision", "transformers", "typing"]
)
"""Packages whose code keeps no state that a model depends on."""
_OF_TORCH = frozenset(vars(nn.Module())) | {"training"}


def _describe_value(value: object, depth: int, known: Collection[int], seen: set[int] | None = None) -> str:
    """A value as text to compare. ``seen``: what was described already; it is described only once."""
    seen = set() if seen is None else seen
    # Weights and buffers are the program's own state, and code is not state.
    if id(value) in known or len(seen) > MOST_SAID:
        return ""
    if isinstance(value, Tensor):
        return "meta" if value.is_meta else str((value.dtype, value.tolist()))
    if isinstance(value, (nn.Module, type, FunctionType, MethodType, ModuleType)) or depth == 0:
        return ""
    if callable(value) and not _is_own(type(value).__module__):  # a library's, which may keep caches
        return ""
    held = getattr(value, "__dict__", None)
    # A number or text: its own repr. Objects and collections are looked into, since a repr may be only an address.
    if held is None and not isinstance(value, (Mapping, list, tuple, set, frozenset, deque)):
        return repr(value)
    if id(value) in seen:
        return ""
    seen.add(id(value))
    if isinstance(value, Mapping):
        return str({str(key): _describe_value(part, depth - 1, known, seen) for key, part in value.items()})
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return str([_describe_value(part, depth - 1, known, seen) for part in value])
    return str({name: _describe_value(part, depth - 1, known, seen) for name, part in (held or {}).items()})


MOST_SAID = 5_000
"""Objects and collections that are looked into for one value: code may name objects that hold a whole program."""
