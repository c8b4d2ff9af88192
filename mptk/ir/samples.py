"""samples: what a model is run on to be traced, calibrated, trained, measured and proven."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100
"""A target that no loss counts: the default of torch's ``cross_entropy``."""
POSITION = 768
"""How many numbers of an input without token ids count as one token: a patch of a vision transformer, 16 · 16 · 3."""
_TARGETS = "targets"


@dataclass(frozen=True)
class Samples:
    """Samples of a model's inputs, along the first dimension.

    Attributes:
        inputs: argument of the model's ``forward`` → tensor [samples, …], in the order of the program's inputs; token
            ids are int64 [samples, length].
        targets: what the loss compares the outputs with: class numbers at the outputs' positions (``IGNORED`` if there
            is none), or the dense model's outputs. None if the loss needs none.
        together: the one number of samples that a program takes at once; None if it takes any.
    """

    inputs: Mapping[str, Tensor]
    targets: Tensor | None = None
    together: int | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values()), ()))

    def __getitem__(self, rows: slice | Tensor) -> Samples:
        # A program for a fixed number of samples gets whole batches: the slice is widened to their borders.
        if isinstance(rows, slice) and self.together is not None:
            start, stop, _ = rows.indices(len(self))
            rows = slice(start // self.together * self.together, -(-stop // self.together) * self.together)
        return self.map(lambda tensor: tensor[rows])

    def fit_batch_size(self, count: int) -> Samples:
        """The samples for a program that takes ``count`` at once: a multiple of these, the first ones again if few."""
        # Whole batches of the samples; if there are fewer than one batch, they repeat.
        kept = torch.arange(max(count, len(self) // count * count)) % len(self)
        return replace(self[kept], together=count)

    def map(self, change: Callable[[Tensor], Tensor]) -> Samples:
        """The samples with every tensor changed."""
        targets = None if self.targets is None else change(self.targets)
        return Samples({name: change(tensor) for name, tensor in self.inputs.items()}, targets, self.together)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The program's inputs, in order."""
        return tuple(self.inputs.values())

    @property
    def positions(self) -> int:
        """About how many tokens one sample counts as. This decides how many samples go into a batch."""
        found = (x[:1].numel() if is_tokens(x) else -(-x[:1].numel() // POSITION) for x in self.tensors)
        return max(1, sum(found))

    def split(self, count: int) -> list[Samples]:
        """Batches of ``count`` samples, or of ``together``. The last batch may be smaller."""
        count = self.together or count
        return [self[first : first + count] for first in range(0, len(self), count)]

    def make_batches(self, positions: int) -> list[Samples]:
        """Batches of about that many ``positions``, at least one sample each."""
        return self.split(max(1, positions // self.positions))

    def chunk(self, count: int) -> list[Samples]:
        """``count`` parts of equal size, as ``Tensor.chunk``."""
        return self.split(-(-len(self) // count))

    def to(self, device: torch.device) -> Samples:
        """The samples on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def shorten(self, count: int, length: int) -> Samples:
        """The first ``count`` samples without targets: token ids are cut to ``length``, other inputs stay."""
        count = self.together or count
        inputs = {n: x[:count, :length] if is_tokens(x) else x[:count] for n, x in self.inputs.items()}
        return Samples(inputs, together=self.together)

    def of_length(self, length: int) -> Samples:
        """The samples without targets, each with ``length`` tokens: its own ones, again and again."""
        inputs = {
            n: x.repeat(1, -(-length // x.shape[1]))[:, :length] if is_tokens(x) else x for n, x in self.inputs.items()
        }
        return Samples(inputs)

    def repeat(self, count: int) -> Samples:
        """The samples ``count`` times in a row."""
        return self.map(lambda tensor: tensor.repeat(count, *[1] * (tensor.ndim - 1)))

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """All tensors by name, for a file."""
        named = dict(self.inputs) | ({} if self.targets is None else {_TARGETS: self.targets})
        return {f"{prefix}.{name}": tensor for name, tensor in named.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], examples: Sequence[Samples], prefix: str) -> Samples | None:
        """What ``to_tensors`` gave, with the inputs of the first of ``examples`` that are there; None if none are."""
        # Examples are the forms that a task's inputs may have; the first whose names are all there is the file's.
        for names in (example.inputs for example in examples):
            if all(f"{prefix}.{name}" in tensors for name in names):
                inputs = {name: tensors[f"{prefix}.{name}"] for name in names}
                return Samples(inputs, tensors.get(f"{prefix}.{_TARGETS}"))
        return None


def concatenate_samples(parts: Sequence[Samples]) -> Samples:
    """All samples of ``parts``, one after the other."""
    first = parts[0]
    targets = None if first.targets is None else torch.cat([each.targets for each in parts if each.targets is not None])
    inputs = {name: torch.cat([each.inputs[name] for each in parts]) for name in first.inputs}
    return replace(first, inputs=inputs, targets=targets)


def join_outputs(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    """What a model gives for each sample as one row: float32 [samples, numbers], of all its outputs."""
    each = [outputs] if isinstance(outputs, Tensor) else outputs
    return torch.cat([tensor.reshape(len(tensor), -1).float() for tensor in each], 1)


def is_tokens(tensor: Tensor) -> bool:
    """Whether an input holds token ids, [samples, length]."""
    return tensor.ndim == 2 and not tensor.is_floating_point()


def make_token_samples(ids: Tensor) -> Samples:
    """Windows of token ids, int64 [n, length]; each position's target is the next token."""
    targets = torch.full_like(ids, IGNORED)  # the last position has no next token
    targets[:, :-1] = ids[:, 1:]
    return Samples({"input_ids": ids}, targets)
