"""copies: a copy of a module to run or to trace: what ``forward`` changes is the copy's, and not the user's."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mptk.errors import MptkError, first_line


def copied(
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
    memo: dict[int, object] = {}
    for name, parameter in module.named_parameters():
        found = parameter if weight is None else weight(name, parameter)
        same = found is parameter
        memo[id(parameter)] = parameter if same else nn.Parameter(found, requires_grad=parameter.requires_grad)
    for name, tensor in module.named_buffers():
        memo[id(tensor)] = buffer((tensor if weight is None else weight(name, tensor)).detach())
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # which cannot be copied otherwise
                memo.setdefault(id(value), value.detach().clone())
    try:
        return copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        raise MptkError(
            f"this {type(module).__name__} cannot be copied ({first_line(error)}); keep tensors in parameters and "
            "buffers"
        ) from error


def separate(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors, of which those that share memory with an earlier one are cloned.

    A trace takes one tensor for two inputs as one input, and safetensors writes no memory twice.
    """
    seen: set[StorageWeakRef] = set()
    found: list[Tensor] = []
    for tensor in tensors:
        dense = tensor.layout is torch.strided and not tensor.is_meta
        place = StorageWeakRef(tensor.untyped_storage()) if dense else None
        found.append(tensor.clone() if place in seen else tensor)
        seen |= set() if place is None else {place}
    return tuple(found)


def attributes(module: nn.Module) -> dict[str, str]:
    """What a module holds in Python, by name: numbers, text, tensors and collections of these, as text to compare.

    Of a buffer it says the shape and the type.
    """
    found = {name: str((buffer.dtype, list(buffer.shape))) for name, buffer in module.named_buffers()}
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in _OF_TORCH:
                found[f"{path}.{name}" if path else name] = _said(value, 6, known)
    return found


_OF_TORCH = frozenset(vars(nn.Module())) | {"training"}


def _said(value: object, depth: int, known: Collection[int]) -> str:
    if id(value) in known:
        return ""
    if isinstance(value, Tensor):
        return "meta" if value.is_meta else str((value.dtype, value.tolist()))
    if isinstance(value, (nn.Module, type)) or callable(value) or depth == 0:
        return ""
    if isinstance(value, Mapping):
        return str({str(key): _said(part, depth - 1, known) for key, part in value.items()})
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return str([_said(part, depth - 1, known) for part in value])
    held = getattr(value, "__dict__", None)
    return repr(value) if held is None else str({name: _said(part, depth - 1, known) for name, part in held.items()})
