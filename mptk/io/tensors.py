"""tensors: weights that are read from safetensors files when they are asked for, and written one at a time.

``from_pretrained`` renames, splits and joins weights after it has read them, ``save_pretrained`` before it writes them.
Here both do so with ``Deferred`` tensors, which have a shape and a type and remember the calls that they went through.
The numbers are made later, by the same calls. So no more than one weight need be in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mptk.compat.accelerate import load_on_all
from mptk.compat.torch import tree_leaves, tree_map
from mptk.compat.transformers import replace_opener
from mptk.errors import FileError
from mptk.files import format_json
from mptk.io.checkpoint import read_float_types
from mptk.io.resident import Resident, open_stored_weight
from mptk.ir import Lazy, Weights


def read_likes(file: Path) -> dict[str, Tensor]:
    """Name → shape and type of each tensor in a safetensors file, on the meta device. None of them is read."""
    with safe_open(file, "pt") as opened:
        return {name: _read_like(opened, name) for name in opened.keys()}  # noqa: SIM118


def _read_like(opened: Any, name: str) -> Tensor:
    # A slice shows its type only in a tensor, so an empty one is read. A number without dimensions has no slices.
    part = opened.get_slice(name)
    shape = part.get_shape()
    return torch.empty(shape, dtype=(part[:0] if shape else opened.get_tensor(name)).dtype, device="meta")


# ---- tensors whose numbers are made later ----


class Deferred(Tensor):
    """A tensor on the meta device that is a named weight, or what a call made of such tensors.

    It has either ``weight``, a name, or ``call``: function, arguments, keywords and, of several results, its index.
    """

    weight: str | None = None
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, object], int | None]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if func is Tensor.to:  # loading would move it to a device: it stays on the meta device
            kwargs = {name: value for name, value in (kwargs or {}).items() if name != "device"}
        found = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        # A call may give back one of its arguments (``requires_grad_``), which must not come to be made of itself.
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
    # The tensors that the call took are among its arguments and keywords.
    parts = (list_weight_names(part) for part in tree_leaves(tensor.call[1:3]) if isinstance(part, Deferred))
    return frozenset[str]().union(*parts)


# Calls that give the weight itself if their only other argument is ``...``: ``from_pretrained`` reads ``slice[...]``.
_SAME = (Tensor.__getitem__, Tensor.to, Tensor.detach, Tensor.requires_grad_, Tensor.contiguous)


def find_own_weight(tensor: Deferred) -> str | None:
    """The name of the weight that ``tensor`` is, perhaps in another type; None if it is made of weights."""
    while tensor.weight is None:
        func, args, _, index = tensor.call
        if func not in _SAME or index is not None or any(each is not ... for each in args[1:]):
            return None
        tensor = args[0]
    return tensor.weight


def materialize_tensor(tensor: Deferred, weights: Mapping[str, Tensor]) -> Tensor:
    """``tensor`` with numbers, made of the numbers of its weights."""
    if tensor.weight is not None:
        return weights[tensor.weight]
    func, args, kwargs, index = tensor.call
    args, kwargs = tree_map(lambda a: materialize_tensor(a, weights) if isinstance(a, Deferred) else a, (args, kwargs))
    found = func(*args, **kwargs)
    result: Tensor = found if index is None else found[index]
    return result


# ---- open a model ----


class Files(dict[str, tuple[Path, Tensor]]):
    """The tensors of the safetensors files that ``from_pretrained`` opened: name → file, and shape and type."""

    @contextmanager
    def defer_reads(self) -> Iterator[None]:
        """Let ``from_pretrained`` read no weight: the model gets ``Deferred`` ones."""
        with load_on_all(), replace_opener(lambda file, *_, **__: _Opened(Path(file), self)):
            yield

    def open_weights(self, model: nn.Module, resident: Resident) -> Weights:
        """Parameters and saved buffers of ``model``, whose parameters then are plain tensors on the meta device.

        ``resident`` keeps what fits. Weights that the module holds in another form than the files (the experts of a
        layer in one tensor) are made when they are asked for.

        Raises:
            MptkError: a weight is of whole numbers.
        """
        # ``metas`` keeps tied weights tied: one deferred tensor under two names becomes one parameter.
        entries, buffers, metas = dict[str, Tensor | Lazy](), dict(model.named_buffers()), dict[int, nn.Parameter]()
        self._check(model)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Deferred):  # the class computed it, and no file holds it
                entries[name] = tensor.detach()
                continue
            entry = entries[name] = self._make_entry(name, tensor, resident)
            owner, _, leaf = name.rpartition(".")
            # ``forward`` reads buffers while the model is traced, so they are read now. They are small.
            if name in buffers:
                value = entries[name] = entry.make()
                setattr(model.get_submodule(owner), leaf, value)
            else:
                meta = metas.setdefault(id(tensor), nn.Parameter(entry.like, requires_grad=tensor.requires_grad))
                setattr(model.get_submodule(owner), leaf, meta)
        return Weights(entries)

    def _check(self, model: nn.Module) -> None:
        """Refuse whole numbers where the model has floats: quantised weights whose config does not say so."""
        held = {file: read_float_types(file) for file in {file for file, _ in self.values()}}
        for tensor in model.state_dict(keep_vars=True).values():
            for key in list_weight_names(tensor) if isinstance(tensor, Deferred) and tensor.is_floating_point() else ():
                file, _ = self[key]
                if held[file][key] is None:
                    raise FileError(
                        f"{key} in {file} is not of floating-point numbers; give the float checkpoint", name=key
                    )

    def _make_entry(self, name: str, tensor: Deferred, resident: Resident) -> Lazy:
        like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        # A weight of the file, which may be stored in another type.
        if (key := find_own_weight(tensor)) is not None:
            file, stored = self[key]
            return open_stored_weight(file, key, like, resident, stored.dtype if stored.is_floating_point() else None)
        # One that is made of several: only the result is kept in memory, not its parts.
        unkept, names = Resident(0), sorted(list_weight_names(tensor))
        parts = {key: open_stored_weight(self[key][0], key, self[key][1], unkept) for key in names}

        def make() -> Tensor:
            return materialize_tensor(tensor, {key: part.make() for key, part in parts.items()})

        # By its name in the model: of one stored weight several may be made, as queries, keys and values.
        return Lazy(like, partial(resident.get, f"{self[names[0]][0]}|made|{name}", make))


class _Opened:
    """What ``from_pretrained`` gets for a safetensors file: the methods of ``safe_open`` that it calls."""

    def __init__(self, file: Path, files: Files) -> None:
        with safe_open(file, "pt") as opened:
            self._metadata = opened.metadata()
        self._likes = read_likes(file)
        files.update({key: (file, like) for key, like in self._likes.items()})

    def keys(self) -> list[str]:
        return list(self._likes)

    def metadata(self) -> object:
        return self._metadata

    def get_slice(self, key: str) -> Deferred:
        return defer_weight(key, self._likes[key])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: the file is closed already."""


# ---- write files ----

# safetensors fills its header up with spaces to a multiple of this, and a file must be the same as if it wrote it.
ALIGNED = 8


def write_weights(file: Path, weights: Weights, metadata: dict[str, str] | None = None) -> None:
    """Write ``weights`` under their own names. One is in memory at a time."""
    _write(weights, {name: defer_weight(name, like) for name, like in weights.likes.items()}, file, metadata)


def plan_shards(tensors: Mapping[str, Deferred], *, filename_pattern: str, max_shard_size: int | str) -> StateDictSplit:
    """Which tensors go into which file."""
    # huggingface_hub keeps tensors that share a storage in one file, but takes meta tensors for tensors without one.
    return split_state_dict_into_shards_factory(
        dict(tensors),
        filename_pattern=filename_pattern,
        max_shard_size=max_shard_size,
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        get_storage_id=lambda tensor: StorageWeakRef(tensor.untyped_storage()),
    )


def make_writer(weights: Weights) -> Callable[..., None]:
    """``save(tensors, file, metadata=...)``, which writes tensors that are made of ``weights``, one at a time."""
    return partial(_write, weights)


def _write(
    weights: Weights, tensors: Mapping[str, Deferred], file: str | Path, metadata: dict[str, str] | None = None
) -> None:
    header, places = _plan_layout(tensors, metadata)
    # Tensors that are made of the same weights (the experts of a layer) are written together: each weight is read once.
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
            del values  # before the next ones are read


def _plan_layout(tensors: Mapping[str, Deferred], metadata: dict[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The file's header, and where each tensor begins after it, in the file's order."""
    # safetensors itself decides on the order of tensors and the names of types: it writes the same file with empty
    # tensors, in whose header the shapes and places are then filled in.
    said = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}, metadata)
    entries, places, end = json.loads(said[8:]), {}, 0
    for name, entry in entries.items():
        if name != "__metadata__":
            places[name], begin = end, end
            end += tensors[name].nbytes
            entry |= {"shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    header = format_json(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % ALIGNED)
    return len(header).to_bytes(8, "little") + header, places  # a file begins with the header's length


def _put(out: BinaryIO, tensor: Tensor, like: Tensor) -> None:
    assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), "a weight is not what its shape and type say"
    whole = tensor.detach().cpu().contiguous().flatten()
    out.write(whole.view(torch.uint8).numpy().data)
