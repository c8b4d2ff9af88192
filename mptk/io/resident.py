"""resident: what stays in memory of weights that are read from files when a stage needs them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mptk.errors import ChangedError
from mptk.ir import Lazy

MEMORY_SHARE = 0.5
"""Share of the free memory for weights and values between stages, if the user names no bound. Libraries, activations
and logits come on top (docs/scale.md)."""


class Resident:
    """Tensors that were read, up to ``bound`` bytes in all. The one that was not used for longest goes first."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._tensors: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        """The tensor, from memory or by ``read``."""
        if name in self._tensors:
            self._tensors.move_to_end(name)
            return self._tensors[name]
        tensor = read()
        self._tensors[name] = tensor
        self._bytes += tensor.nbytes
        # A tensor larger than the bound drops itself, and the caller still has it.
        while self._bytes > self.bound:
            self._bytes -= self._tensors.popitem(last=False)[1].nbytes
        return tensor


def open_stored_weight(
    file: Path,
    key: str,
    like: Tensor,
    resident: Resident,
    held: torch.dtype | None = None,
) -> Lazy:
    """The tensor ``key`` of a safetensors file, in the type of ``like``. ``held``: its type in the file."""
    file = file.absolute()  # the current folder may change before it is read
    size = _measure_file(file)

    def read_narrow() -> Tensor:
        try:
            # Opened for each tensor: the file's mapping is then closed with the tensor, and its pages go.
            with safe_open(file, "pt") as opened:
                tensor: Tensor = opened.get_tensor(key)
        except SafetensorError as error:
            raise ChangedError(
                f"{file} was changed or damaged while it was read ({error}); start again", name=file
            ) from error
        return tensor

    def make() -> Tensor:
        # To touch a mapped page that the file no longer has would end the process (SIGBUS).
        if _measure_file(file) < size:
            raise ChangedError(f"{file} was removed or cut short while it was read; start again", name=file)
        return resident.get(f"{file}|{key}", lambda: read_narrow().to(like.dtype))

    return Lazy(like, make, held, read_narrow if held is not None else None)


def _measure_file(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def measure_free_memory() -> float:
    """Bytes of memory that a new process can have: what is free, and what this process's control group allows."""
    # MemAvailable counts caches that the system would give up. In a container the group's limit may be far lower.
    info, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not info.is_file():
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    lines = (line.split() for line in info.read_text().splitlines())
    free = next(float(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return free if allowed == "max" else min(free, float(allowed))


def choose_memory_bound(asked: int | None) -> int:
    """Bytes that weights and intermediate values may take: the user's bound, or a share of the free memory."""
    return asked if asked is not None else int(MEMORY_SHARE * measure_free_memory())
