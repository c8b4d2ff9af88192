"""opening: a model whose weights are read from its safetensors files when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mptk.compat.accelerate import load_on_all
from mptk.compat.transformers import replace_opener
from mptk.errors import MptkError
from mptk.io.checkpoint import read_float_types
from mptk.io.deferred import Deferred, defer_weight, find_own_weight, list_weight_names, materialize_tensor
from mptk.io.resident import Resident, open_stored_weight
from mptk.io.tensors import read_likes
from mptk.ir.weights import Lazy, Weights


class Files(dict[str, tuple[Path, Tensor]]):
    """The tensors of the safetensors files that ``from_pretrained`` opened: name → file, and shape and type."""

    @contextmanager
    def defer_reads(self) -> Iterator[None]:
        """Within it ``from_pretrained`` reads no weight: the model gets ``Deferred`` ones."""
        with load_on_all(), replace_opener(lambda file, *_, **__: _Opened(Path(file), self)):
            yield

    def weights(self, model: nn.Module, resident: Resident) -> Weights:
        """Parameters and saved buffers of ``model``; its parameters are then plain tensors on the meta device.

        ``resident`` keeps what fits. Weights that the module holds in another form than the files (the experts of a
        layer in one tensor) are made when they are asked for.

        Raises:
            MptkError: a weight is of whole numbers.
        """
        entries, buffers, metas = dict[str, Tensor | Lazy](), dict(model.named_buffers()), dict[int, nn.Parameter]()
        self._check(model)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Deferred):
                entries[name] = tensor.detach()
                continue
            entry = entries[name] = self._make_entry(tensor, resident)
            owner, _, leaf = name.rpartition(".")
            if name in buffers:
                value = entries[name] = entry.make()
                setattr(model.get_submodule(owner), leaf, value)
            else:
                meta = metas.setdefault(id(tensor), nn.Parameter(entry.like, requires_grad=tensor.requires_grad))
                setattr(model.get_submodule(owner), leaf, meta)
        return Weights(entries)

    def _check(self, model: nn.Module) -> None:
        held = {file: read_float_types(file) for file in {file for file, _ in self.values()}}
        for tensor in model.state_dict(keep_vars=True).values():
            for key in list_weight_names(tensor) if isinstance(tensor, Deferred) and tensor.is_floating_point() else ():
                file, _ = self[key]
                if held[file][key] is None:
                    raise MptkError(f"{key} in {file} is not of floating-point numbers; give the float checkpoint")

    def _make_entry(self, tensor: Deferred, resident: Resident) -> Lazy:
        like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if (key := find_own_weight(tensor)) is not None:
            file, stored = self[key]
            return open_stored_weight(file, key, like, resident, stored.dtype if stored.is_floating_point() else None)
        unkept, names = Resident(0), sorted(list_weight_names(tensor))
        parts = {key: open_stored_weight(self[key][0], key, self[key][1], unkept) for key in names}

        def make() -> Tensor:
            return materialize_tensor(tensor, {key: part.make() for key, part in parts.items()})

        return Lazy(like, partial(resident.get, f"{self[names[0]][0]}|{names}", make))


class _Opened:
    """A safetensors file as ``from_pretrained`` opens it, whose tensors are read later."""

    def __init__(self, file: Path, files: Files) -> None:
        with safe_open(file, "pt") as opened:
            self._metadata = opened.metadata()
        self._likes = read_likes(file)
        files.update({key: (file, like) for key, like in self._likes.items()})

    def keys(self) -> list[str]:
        """The names of its tensors."""
        return list(self._likes)

    def metadata(self) -> object:
        """What the file says beside them."""
        return self._metadata

    def get_slice(self, key: str) -> Deferred:
        """A tensor, which is read later."""
        return defer_weight(key, self._likes[key])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """It is closed already."""
