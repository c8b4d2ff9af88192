"""sharing: divide calibration over the processes of a run, and add up what each of them found.

Each process takes consecutive batches and all get the same result, so that all choose alike. What is found are sums, so
only the order of rounding depends on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from accelerate.utils import gather, reduce
from torch import Tensor

from mptk.distributed.processes import processes, shards

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Sharing:
    """How many processes work on one thing, and which one this is."""

    count: int = 1
    index: int = 0

    def own(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """This process's part of ``batches``."""
        each, more = divmod(len(batches), self.count)
        start = self.index * each + min(self.index, more)
        return batches[start : start + each + (self.index < more)]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor. All must ask for it, in the same order."""
        if self.count == 1:
            return tensor
        summed: Tensor = reduce(tensor, "sum")
        return summed

    def all(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, in their order. All must ask for it, in the same order."""
        return [tensor] if self.count == 1 else list(gather(tensor[None].contiguous()))


def sharing(batches: int) -> Sharing:
    """The processes of this run, if there are enough ``batches`` for all; else each does everything.

    The same holds if weights are in shards (FSDP2): some work is then done only by the first process.
    """
    there = processes()
    alone = shards() or there.num_processes > batches
    return Sharing() if alone else Sharing(there.num_processes, there.process_index)
