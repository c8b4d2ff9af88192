"""slices: a ladder's smaller models, stored as parts of its largest model's weights.

Most weights of a smaller model are rows and columns of the larger one's. For each dimension d of such a weight the
file has ``NAME@d``: the positions that the smaller model has of the larger one's, int32; empty if it has all. Weights
that are not such slices, bit for bit, are in the file under their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mptk.io import check_weights, load_tensors, read_likes, write_weights
from mptk.ir import Lazy, Weights
from mptk.reading import make_damage_error

Places = Mapping[str, Sequence[Tensor]]
"""Weight → for each dimension the positions that a smaller model has of a larger one's, ascending, int64."""


def slice_weight(weight: Tensor, places: Sequence[Tensor]) -> Tensor:
    """The part of a larger model's weight that a smaller model has; the whole weight without places."""
    for d, index in enumerate(places):
        if len(index) < weight.shape[d]:
            weight = weight.index_select(d, index.to(weight.device))
    return weight


def open_file_weights(files: Sequence[Path]) -> Weights:
    """The weights in a checkpoint's files, each read when it is asked for, under their names there.

    Raises:
        MptkError: a file is damaged.
    """
    return Weights({name: lazy for file in files for name, lazy in _open_lazy(file).items()})


def _open_lazy(file: Path) -> dict[str, Lazy]:
    check_weights(file)

    def read(name: str) -> Tensor:
        with safe_open(file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return {name: Lazy(like, partial(read, name)) for name, like in read_likes(file).items()}


def write_part(file: Path, larger: Weights, places: Places, part: Path) -> None:
    """Write to ``part`` the weights of ``file``, with positions in place of those that are slices of ``larger``."""
    found, lazy = dict[str, Tensor | Lazy](), _open_lazy(file)
    for name, own in lazy.items():
        tensor, at = own.make(), places.get(name, ())
        # A number without dimensions would have no entry at all, and so be lost.
        if name not in larger or not tensor.ndim or not _has_same_bits(slice_weight(larger[name], at), tensor):
            found[name] = own
            continue
        for d, size in enumerate(larger.find_like(name).shape):
            whole = d >= len(at) or len(at[d]) == size
            found[f"{name}@{d}"] = torch.empty(0, dtype=torch.int32) if whole else at[d].int()
    write_weights(part, Weights(found), _read_metadata(file))


def restore_file(part: Path, larger: Weights, file: Path) -> None:
    """Write to ``file`` the weights that ``write_part`` was given.

    Raises:
        MptkError: ``part`` is damaged, or does not fit ``larger``.
    """
    # Read what the file holds: whole weights, and positions by weight and dimension. It may be anybody's file.
    wrong = make_damage_error(part, "prune again")
    stored, found, places = load_tensors(part, wrong), dict[str, Tensor | Lazy](), dict[str, dict[int, Tensor]]()
    for key, tensor in stored.items():
        name, mark, d = key.rpartition("@")
        if not mark:
            found[key] = tensor
        elif name in larger and d in map(str, range(larger.find_like(name).ndim)) and tensor.dtype == torch.int32:
            places.setdefault(name, {})[int(d)] = tensor.long()
        else:
            raise wrong(f"{key} does not fit the largest model")
    # Slice the larger model's weights. Each is made only when it is written.
    for name, each in places.items():
        like = larger.find_like(name)
        every = [each[d] if len(each.get(d, ())) else torch.arange(size) for d, size in enumerate(like.shape)]
        if not all(_is_inside(index, size) for index, size in zip(every, like.shape, strict=True)):
            raise wrong(f"{name} has positions that the largest model lacks")
        found[name] = Lazy(slice_weight(like, every), partial(_slice, larger, name, every))
    write_weights(file, Weights(found), _read_metadata(part))


def _is_inside(index: Tensor, size: int) -> bool:
    return index.ndim == 1 and bool(((index >= 0) & (index < size)).all())


def _slice(larger: Weights, name: str, places: Sequence[Tensor]) -> Tensor:
    return slice_weight(larger[name], places)


def _read_metadata(file: Path) -> dict[str, str] | None:
    opened: Any
    with safe_open(file, "pt") as opened:
        about: dict[str, str] | None = opened.metadata()
    return about


def _has_same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes: NaN differs from itself, and 0 equals −0.
    return bool(one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8)))
