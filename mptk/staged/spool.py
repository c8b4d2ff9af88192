"""spool: values between stages, in memory up to a bound and the rest in files of a temporary folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from mptk.files import Staging, make_scratch
from mptk.ir import Lazy, Weights

Values = dict[fx.Node, Any]
"""Values of a graph: tensors, sizes, or lists of these."""

Layout = Callable[[Tensor], Tensor]

# Bytes of the smallest tensor that goes to a file by default: below that, files cost more than they free.
SMALLEST_FILE = 1 << 16


class Spool:
    """Values by key. At most ``bound`` bytes of tensors stay in memory. Files go with the spool.

    ``smallest``: bytes of the smallest tensor that goes to a file.
    """

    def __init__(self, bound: float, smallest: int = SMALLEST_FILE) -> None:
        self._bound, self._smallest, self._bytes = bound, smallest, 0.0
        self._kept: dict[object, dict[object, object]] = {}
        self._files: dict[object, dict[object, tuple[Path, Layout]]] = {}
        self._likes: dict[str, Tensor] = {}
        self._staging: Staging | None = None
        self._count = 0

    def put(self, key: object, values: Mapping[Any, Any]) -> None:
        """Keep ``values`` under ``key``."""
        kept, files = self._kept.setdefault(key, {}), self._files.setdefault(key, {})
        for name, value in values.items():
            size = value.nbytes if isinstance(value, Tensor) else 0
            if size >= self._smallest and self._bytes + size > self._bound:
                files[name] = self._write(value)
            else:
                kept[name] = value
                self._bytes += size

    def take(self, key: object, keep: bool = False) -> dict[Any, Any]:
        """The values under ``key``, which are then gone unless ``keep``."""
        kept, files = dict(self._kept[key]), dict(self._files[key])
        found = {**kept, **{name: restored(load_file(file)["value"]) for name, (file, restored) in files.items()}}
        if not keep:
            self._bytes -= sum(value.nbytes for value in kept.values() if isinstance(value, Tensor))
            for file, _ in files.values():
                file.unlink()
            del self._kept[key], self._files[key]
        return found

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor under ``name``. If one is there already, keep their sum."""
        before = self.take(name).get(name) if name in self._kept else None
        self.put(name, {name: tensor if before is None else before + tensor})
        self._likes[name] = tensor.to("meta")

    @property
    def weights(self) -> Weights:
        """What was added, by name."""
        return Weights({name: Lazy(like, partial(self._take_tensor, name)) for name, like in self._likes.items()})

    def _take_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self.take(name, keep=True)[name]
        return tensor

    def _write(self, tensor: Tensor) -> tuple[Path, Layout]:
        if self._staging is None:  # most spools write no file
            self._staging = make_scratch()
        self._count += 1
        file = self._staging.folder / str(self._count)
        flat, layout = _flatten_tensor(tensor.detach())
        save_file({"value": flat.cpu()}, file)
        return file, layout


def spool_weights(weights: Iterable[tuple[str, Tensor]], bound: float) -> Weights:
    """The weights, each with its name, in a spool of their own."""
    spool = Spool(bound)
    for name, weight in weights:
        spool.add(name, weight)
    return spool.weights


def _flatten_tensor(tensor: Tensor) -> tuple[Tensor, Layout]:
    """The numbers of a tensor in the order of its memory, each once, and what gives it its old layout."""
    # Kernels round differently in another layout, and a staged run must give the numbers of one in memory.
    strides = list(tensor.stride())
    order = sorted(range(tensor.ndim), key=strides.__getitem__, reverse=True)
    once = tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in strides)]  # an expanded dimension
    back = [order.index(d) for d in range(tensor.ndim)]
    shape, device = tensor.shape, tensor.device
    return once.permute(order).contiguous(), lambda flat: flat.to(device).permute(back).expand(shape)
