"""weights: tensors by name that need not be in memory. A pass describes new weights; they are made when one asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mptk.compat.torch import FakeTensor

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Lazy:
    """A weight that ``make`` reads or computes at each request.

    ``like``: its shape and type, on the meta device. ``held``: a narrower type that holds its numbers exactly.
    ``narrow``: makes it in that type, without the way through the wider one.
    """

    like: Tensor
    make: Callable[[], Tensor]
    held: torch.dtype | None = None
    narrow: Callable[[], Tensor] | None = None


class Weights(Mapping[str, Tensor]):
    """Weights by name. ``weights[name]`` makes a lazy one; nothing keeps it."""

    def __init__(self, entries: Mapping[str, Tensor | Lazy]) -> None:
        # Not ``entries[name]``, which would make each lazy weight of another ``Weights``.
        self._entries = {name: _find_entry(entries, name) for name in entries}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return entry.make() if isinstance(entry, Lazy) else entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    # Without this, Mapping asks ``self[name]``, which makes the weight.
    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def get_entry(self, name: str) -> Tensor | Lazy:
        """The tensor, or how it is made."""
        return self._entries[name]

    def find_like(self, name: str) -> Tensor:
        """A tensor of this weight's shape and type: itself if it is in memory, else one on the meta device."""
        entry = self._entries[name]
        return entry.like if isinstance(entry, Lazy) else entry

    def find_in_memory(self, name: str) -> Tensor | None:
        """A weight whose numbers are there without work; None for a lazy or an empty one."""
        entry = self._entries[name]
        return entry if isinstance(entry, Tensor) and not _is_empty(entry) else None

    @property
    def likes(self) -> dict[str, Tensor]:
        """``find_like`` of every weight."""
        return {name: self.find_like(name) for name in self._entries}

    @property
    def real(self) -> bool:
        """Whether the numbers are there, in memory or to be made: no weight is a fake tensor or on the meta device."""
        return not any(isinstance(e, Tensor) and _is_empty(e) for e in self._entries.values())

    def read_narrow(self, name: str) -> Tensor:
        """The weight in the narrowest type that it is known to be held in."""
        entry = self._entries[name]
        return entry.narrow() if isinstance(entry, Lazy) and entry.narrow is not None else self[name]

    def cast(self, dtype: torch.dtype) -> Weights:
        """Weights in ``dtype``. Tensors that hold no floating-point numbers keep their type."""
        floats = [name for name, like in self.likes.items() if like.is_floating_point()]
        return self.with_entries({name: _cast(self._entries[name], dtype) for name in floats})

    def with_entries(self, changes: Mapping[str, Tensor | Lazy]) -> Weights:
        """These weights with others in the place of some; lazy ones of ``changes`` stay lazy."""
        return Weights({**self._entries, **{name: _find_entry(changes, name) for name in changes}})

    def select_names(self, names: Mapping[str, str]) -> Weights:
        """A selection under other names: new name → name."""
        return Weights({new: self._entries[name] for new, name in names.items()})

    def with_edits(self, changes: Mapping[str, Edit], *, moves: bool = False) -> Weights:
        """These weights, each passed through its change when it is asked for.

        A change must also take a tensor on the meta device, for its shape and type. ``moves``: it only selects or moves
        numbers, so a narrower type can still hold them.
        """
        return self.with_entries(
            {name: _change_entry(self._entries[name], change, moves) for name, change in changes.items()}
        )


def _find_entry(entries: Mapping[str, Tensor | Lazy], name: str) -> Tensor | Lazy:
    return entries.get_entry(name) if isinstance(entries, Weights) else entries[name]


def _change_entry(entry: Tensor | Lazy, change: Edit, moves: bool) -> Tensor | Lazy:
    if isinstance(entry, Lazy):
        like, narrow = change(entry.like), entry.narrow
        # New numbers may need more bits than the narrow type has.
        if not moves:
            return Lazy(like, lambda: change(entry.make()))
        return Lazy(like, lambda: change(entry.make()), entry.held, narrow and (lambda: change(narrow())))
    if _is_empty(entry):  # without numbers the change costs nothing, and ``real`` must stay False
        return change(entry)
    return Lazy(change(entry.to("meta")), lambda: change(entry))


def _cast(entry: Tensor | Lazy, dtype: torch.dtype) -> Tensor | Lazy:
    # The file may hold this type already: then read it as it is, without the way through the wider one.
    if isinstance(entry, Lazy) and entry.narrow is not None and entry.held == dtype:
        return Lazy(entry.like.to(dtype), entry.narrow, dtype, entry.narrow)
    return _change_entry(entry, lambda tensor: tensor.to(dtype), False)


def _is_empty(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta
