"""deferred: tensors whose numbers are made later, by the calls that they went through meanwhile.

``save_pretrained`` renames, splits and joins weights before it writes them, ``from_pretrained`` after it has read them.
With these they do so to shapes only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mptk.compat.torch import tree_leaves, tree_map


class Deferred(Tensor):
    """A tensor on the meta device that is a named weight, or what a call made of such tensors."""

    weight: str | None = None
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, object], int | None]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if func is Tensor.to:  # it stays on the meta device
            kwargs = {name: value for name, value in (kwargs or {}).items() if name != "device"}
        found = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        given = {id(value) for value in tree_leaves((args, kwargs))}
        several = isinstance(found, (tuple, list))
        for i, result in enumerate(found if several else (found,)):
            if isinstance(result, Deferred) and id(result) not in given:
                result.call = func, args, kwargs or {}, i if several else None
        return found


def defer_weight(name: str, like: Tensor) -> Deferred:
    """The weight ``name``, of the shape and type of ``like``."""
    tensor: Deferred = torch.empty_like(like, device="meta").as_subclass(Deferred)
    tensor.weight = name
    return tensor


def list_weight_names(tensor: Deferred) -> frozenset[str]:
    """The names of the weights that ``tensor`` is made of."""
    if tensor.weight is not None:
        return frozenset([tensor.weight])
    parts = (list_weight_names(part) for part in tree_leaves(tensor.call[1:3]) if isinstance(part, Deferred))
    return frozenset[str]().union(*parts)


_SAME = (Tensor.__getitem__, Tensor.to, Tensor.detach, Tensor.requires_grad_, Tensor.contiguous)


def find_own_weight(tensor: Deferred) -> str | None:
    """The name of the weight that ``tensor`` is, be it in another type; None if it is made of weights."""
    while tensor.weight is None:
        func, args, _, index = tensor.call
        if func not in _SAME or index is not None or any(each is not ... for each in args[1:]):
            return None
        tensor = args[0]
    return tensor.weight


def materialize_tensor(tensor: Deferred, weights: Mapping[str, Tensor]) -> Tensor:
    """``tensor`` with numbers, from those of its weights."""
    if tensor.weight is not None:
        return weights[tensor.weight]
    func, args, kwargs, index = tensor.call
    args, kwargs = tree_map(lambda a: materialize_tensor(a, weights) if isinstance(a, Deferred) else a, (args, kwargs))
    found = func(*args, **kwargs)
    result: Tensor = found if index is None else found[index]
    return result
