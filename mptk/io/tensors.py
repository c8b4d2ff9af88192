"""tensors: read the shapes in safetensors files, and write such files tensor by tensor.

A file is the same as if safetensors wrote all its tensors at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mptk.files import format_json
from mptk.io.deferred import Deferred, defer_weight, list_weight_names, materialize_tensor
from mptk.ir.weights import Weights

ALIGNED = 8
"""The header is filled up with spaces to a multiple of this."""


def read_likes(file: Path) -> dict[str, Tensor]:
    """Name → shape and type of each tensor in a safetensors file, on the meta device. None of them is read."""
    with safe_open(file, "pt") as opened:
        return {name: _read_like(opened, name) for name in opened.keys()}  # noqa: SIM118


def _read_like(opened: Any, name: str) -> Tensor:
    part = opened.get_slice(name)
    shape = part.get_shape()
    return torch.empty(shape, dtype=(part[:0] if shape else opened.get_tensor(name)).dtype, device="meta")


def write_weights(file: Path, weights: Weights, metadata: dict[str, str] | None = None) -> None:
    """Write ``weights`` under their own names. One is in memory at a time."""
    _write(weights, {name: defer_weight(name, like) for name, like in weights.likes.items()}, file, metadata)


def plan_shards(tensors: Mapping[str, Deferred], *, filename_pattern: str, max_shard_size: int | str) -> StateDictSplit:
    """Which tensors go into which file. As huggingface_hub does of tensors with numbers, parts of one stay together."""
    return split_state_dict_into_shards_factory(
        dict(tensors),
        filename_pattern=filename_pattern,
        max_shard_size=max_shard_size,
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        get_storage_id=lambda tensor: StorageWeakRef(tensor.untyped_storage()),
    )


def make_writer(weights: Weights) -> Callable[..., None]:
    """``save(tensors, file, metadata=...)``, which writes tensors that are made of ``weights``.

    Only the weights are in memory that one tensor is made of, and that tensor.
    """
    return partial(_write, weights)


def _write(
    weights: Weights, tensors: Mapping[str, Deferred], file: str | Path, metadata: dict[str, str] | None = None
) -> None:
    header, places = _plan_layout(tensors, metadata)
    together: dict[frozenset[str], list[str]] = {}
    for name in places:
        together.setdefault(list_weight_names(tensors[name]), []).append(name)
    with open(file, "wb") as out:
        out.write(header)
        for names, results in together.items():
            values = {name: weights[name] for name in names}
            for name in results:
                out.seek(len(header) + places[name])
                _put(out, materialize_tensor(tensors[name], values), tensors[name])
            del values


def _plan_layout(tensors: Mapping[str, Deferred], metadata: dict[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The file's header, and where each tensor begins after it, in the file's order."""
    # safetensors knows the order of tensors and the names of types
    said = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}, metadata)
    entries, places, end = json.loads(said[8:]), {}, 0
    for name, entry in entries.items():
        if name != "__metadata__":
            places[name], begin = end, end
            end += tensors[name].nbytes
            entry |= {"shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    header = format_json(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % ALIGNED)
    return len(header).to_bytes(8, "little") + header, places


def _put(out: BinaryIO, tensor: Tensor, like: Tensor) -> None:
    assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), "a weight is not what its shape and type say"
    whole = tensor.detach().cpu().contiguous().flatten()
    out.write(whole.view(torch.uint8).numpy().data)
