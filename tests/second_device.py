"""A second device, on the CPU: its tensors have values, and meet no others. For tests of where tensors are.

Torch without a GPU cannot differentiate fake CUDA tensors, and fake tensors have no values to branch on. So torch's
own hook for devices written in Python is used; the processor computes. A tensor of the device and one of the CPU in one
operation are an error here, as they are on a GPU. ``Crossings`` says what was copied from one to the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        """No: other tests' processes must not meet on it."""
        return False


class _Module(_DummyBackendModule):
    def is_available(self) -> bool:
        return False

    def get_rng_state(self, *_: object) -> Tensor:
        """That of the CPU, which draws the device's numbers, too."""
        return torch.get_rng_state()

    def set_rng_state(self, *_: object) -> None:
        """The CPU's is set by itself."""


_setup_privateuseone_for_python_backend("stand_in", _Module(), _Hook())
DEVICE = torch.device("stand_in", 0)


_held: list[weakref.ref[Tensor]] = []


def live_bytes() -> int:
    """Bytes of the tensors on the second device."""
    _held[:] = [reference for reference in _held if reference() is not None]
    storages = [t.untyped_storage() for t in (reference() for reference in _held) if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class SecondTensor(Tensor):
    """A tensor of the second device. ``held``: the tensor that has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> SecondTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        _held.append(weakref.ref(held))
        return made

    def __repr__(self) -> str:
        return f"SecondTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, lambda *_: None)


class SecondDevice(TorchDispatchMode):
    """Within it tensors can be made on the second device, and ``crossed`` lists the copies between the devices.

    Each entry: (where to, shape).
    """

    def __init__(self) -> None:
        super().__init__()
        self.crossed: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, _: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, lambda *copy: self.crossed.append(copy))


def _computed(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], see: Callable[[str, tuple[int, ...]], None]
) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    second = [t for t in tensors if isinstance(t, SecondTensor)]
    asked = kwargs.get("device")
    there = bool(second) if asked is None else torch.device(asked).type == DEVICE.type
    if func in COPIES:
        there = isinstance(args[0], SecondTensor) if func is COPIES[1] else there
        origin = args[1] if func is COPIES[1] else args[0]
        if isinstance(origin, SecondTensor) != there:
            see("to the second device" if there else "to the host", tuple(origin.shape))
    else:
        others = [t for t in tensors if not isinstance(t, SecondTensor) and t.ndim]
        assert not (second and others), f"{func} of tensors on two devices"
    known = {id(t.held): t for t in second}
    inner, options = tree_map_only(SecondTensor, lambda t: t.held, (args, kwargs))
    if asked is not None:
        options["device"] = torch.device("cpu")
    result = func(*inner, **options)
    if func is COPIES[1]:
        return args[0]
    if not there:
        return result
    return tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else SecondTensor(t), result)
