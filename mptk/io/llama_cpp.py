"""llama_cpp: the weights of a cut LLaMA model as a GGUF file, after the pattern of the dense model's own.

The vocabulary, the rotary settings and all else that a cut leaves alone are the pattern's. Widths are those of the
weights. If they differ from layer to layer, the file's architecture is ``deci``: its block is LLaMA's, and its widths
are lists. So llama.cpp runs layers that no class of transformers holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, GGUFWriter, ReaderField
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mptk.errors import MptkError, ProofError
from mptk.io.checkpoint import dtypes_in, shapes_in
from mptk.io.untrusted import check_gguf, check_weights, damaged

EQUAL, RAGGED = "llama", "deci"
KINDS = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
FILE_TYPES = {Kind.F32: 0, Kind.F16: 1, Kind.BF16: 32}
"""``general.file_type`` of a file whose matrices are of a kind."""
DROPPED = (
    "GGUF.",
    "general.architecture",
    "general.file_type",
    "general.quantization",
    "general.size_label",
    "quantize.",
)
"""What a field begins with that speaks of the pattern's own weights."""
WIDTHS = (
    *("block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.value_length", "rope.dimension_count"),
)
"""Fields of the architecture that are written anew."""
HELD = ("q_heads", "kv_groups", "heads", "ffn", "layers")
"""The families of LLaMA of which a file may have fewer units."""
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")
BUFFER = "inv_freq"
"""The end of the name of what a graph has among its weights, and llama.cpp computes."""
FREQUENCIES = "rope_freqs.weight"
"""Rotary frequencies that the converter computed from the config: no weight of the model."""


@dataclass(frozen=True)
class Layer:
    """The widths of a layer: query heads, KV heads, feed-forward channels."""

    heads: int
    groups: int
    ffn: int


@dataclass(frozen=True)
class Field:
    """A value of a file, its type and, if it is a list, that of its items."""

    value: Any
    type: GGUFValueType
    items: GGUFValueType | None


def _field(field: ReaderField) -> Field:
    items = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
    return Field(field.contents(), field.types[0], items)


class Stored:
    """The weights of a folder's safetensors files, by name; one is in memory at a time."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise MptkError(f"{folder} has no model.safetensors; give an --out folder of prune or recover")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | None] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            check_weights(file)
            shapes = shapes_in(file)
            self.shapes |= shapes
            self.dtypes |= dtypes_in(file)
            self._files |= dict.fromkeys(shapes, file)

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        try:
            with safe_open(file, "pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise damaged(file)(str(error).strip().partition("\n")[0]) from error
        return tensor


class Pattern:
    """The dense model's GGUF file: its fields, its tensors' shapes.

    Raises:
        MptkError: it cannot be read, or is of another architecture than LLaMA.
    """

    def __init__(self, file: Path) -> None:
        check_gguf(file)
        self.file = file
        try:
            self.reader = GGUFReader(file)
            self.fields = {field.name: _field(field) for field in self.reader.fields.values()}
            architecture = self._value("general.architecture")
            if architecture != EQUAL:
                raise MptkError(f"{file} is of a {architecture} model; mptk writes GGUF of {EQUAL} models alone")
            hidden, heads = (int(self._value(f"{EQUAL}.{n}")) for n in ("embedding_length", "attention.head_count"))
            length = self.fields.get(f"{EQUAL}.attention.key_length")
            self.head_dim = hidden // heads if length is None else int(length.value)
            self.shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in self.reader.tensors}
        except MptkError:
            raise
        except Exception as error:  # the reader checks little of what it reads: any error may come
            raise damaged(file)(str(error).strip().partition("\n")[0] or type(error).__name__) from error

    def _value(self, name: str) -> Any:
        if name not in self.fields:
            raise MptkError(f"{self.file} has no {name}; it is no file of a language model")
        return self.fields[name].value

    def kept(self) -> Iterator[tuple[str, Field]]:
        """The fields that hold for the cut model, too, by name."""
        for name, field in self.fields.items():
            if not name.startswith(DROPPED) and name.removeprefix(f"{EQUAL}.") not in WIDTHS:
                yield name, field

    def frequencies(self) -> npt.NDArray[Any] | None:
        """The tensor ``FREQUENCIES``, if the file has it."""
        found = [tensor.data for tensor in self.reader.tensors if tensor.name == FREQUENCIES]
        return np.asarray(found[0]) if found else None


def write_like(folder: Path, pattern: Path, out: Path) -> list[Layer]:
    """Write the weights in ``folder`` to the GGUF file ``out``; returns the widths of each layer.

    Matrices keep their type, float32, float16 or bfloat16; vectors are float32. Rows of queries and keys are put in
    llama.cpp's order, in which the two numbers that are rotated together stand side by side.

    Raises:
        MptkError: the folder or the pattern cannot be read; or they are not of one LLaMA model.
        ProofError: what was written is not what the folder has.
    """
    stored, dense = Stored(folder), Pattern(pattern)
    names = _names(stored, dense)
    layers = _layers({name: stored.shapes[weight] for name, weight in names.items()}, dense)
    architecture = EQUAL if len(set(layers)) == 1 else RAGGED
    kinds = {name: _kind(stored, weight) for name, weight in names.items()}
    writer = GGUFWriter(out, architecture)
    _describe(writer, dense, architecture, layers, kinds[_TABLE])
    for name, weight in names.items():
        shape, kind = stored.shapes[weight], kinds[name]
        size = int(np.prod(shape)) * (4 if kind is Kind.F32 else 2)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    frequencies = dense.frequencies()
    if frequencies is not None:
        writer.add_tensor_info(FREQUENCIES, frequencies.shape, frequencies.dtype, frequencies.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, weight in names.items():
        writer.write_tensor_data(_bytes(stored[weight], name, kinds[name], dense.head_dim))
    if frequencies is not None:
        writer.write_tensor_data(frequencies)
    writer.close()
    _check(out, stored, names, dense.head_dim)
    return layers


_TABLE, _HEAD = "token_embd.weight", "output.weight"


def _names(stored: Stored, dense: Pattern) -> dict[str, str]:
    """Name in the file → name of the weight.

    Raises:
        MptkError: a weight has no place in the file, or the pattern has one that the folder lacks.
    """
    counted = [int(number) for weight in stored.shapes for number in re.findall(r"\.(\d{1,5})\.", weight)]
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, max(counted, default=-1) + 1)
    names: dict[str, str] = {}
    for weight in stored.shapes:
        if weight.endswith(BUFFER):
            continue
        name = known.get_name(weight, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise MptkError(f"{weight} has no place in a GGUF file of a {EQUAL} model; use llama.cpp's own converter")
        names[name] = weight
    if _TABLE not in names and _HEAD in names:  # one weight for both is stored under the one name or the other
        names[_TABLE] = names.pop(_HEAD)
    if _TABLE not in names or stored.shapes[names[_TABLE]] != dense.shapes.get(_TABLE):
        raise MptkError(
            f"{dense.file} has another vocabulary or hidden size than the folder; give the GGUF file of its dense "
            "model, or use llama.cpp's own converter"
        )
    count = sum(name.endswith(".ffn_down.weight") for name in names)
    wanted = {name for name in dense.shapes if not re.match(r"blk\.(\d+)\.", name) or int(name.split(".")[1]) < count}
    apart = (wanted ^ names.keys()) - {FREQUENCIES, _HEAD}
    if apart:
        raise MptkError(f"{min(apart)} is in the folder or in {dense.file} alone; they are of different models")
    return names


def _layers(shapes: Mapping[str, tuple[int, ...]], dense: Pattern) -> list[Layer]:
    """The widths of each layer of the file.

    Raises:
        MptkError: a layer is none of LLaMA's, or its heads are of another size than the pattern's.
    """
    layers, size = [], dense.head_dim
    for i in range(sum(name.endswith(".ffn_down.weight") for name in shapes)):
        try:
            q, k, v, out, ffn = (shapes[f"blk.{i}.{name}.weight"] for name in PARTS)
        except KeyError as error:
            raise MptkError(f"the folder has no {error.args[0]}; its layers are not LLaMA's") from error
        if q[0] % size or k[0] % size or v[0] != k[0] or out[1] != q[0]:
            raise MptkError(f"layer {i} has heads of another size than {size}; cut whole heads, ffn or layers alone")
        layers.append(Layer(heads=q[0] // size, groups=k[0] // size, ffn=ffn[1]))
    return layers


def _kind(stored: Stored, weight: str) -> Kind:
    dtype = stored.dtypes[weight]
    if dtype not in KINDS:
        raise MptkError(f"{weight} is not of floating-point numbers; give the float checkpoint")
    return KINDS[dtype] if len(stored.shapes[weight]) == 2 else Kind.F32


def _describe(writer: GGUFWriter, dense: Pattern, architecture: str, layers: list[Layer], kind: Kind) -> None:
    """The fields: those of the pattern, under the name of the architecture, then the widths."""
    for name, field in dense.kept():
        own = re.sub(f"^{EQUAL}\\.", f"{architecture}.", name)
        writer.add_key_value(own, field.value, field.type, sub_type=field.items)
    for add, values in (
        (writer.add_head_count, [layer.heads for layer in layers]),
        (writer.add_head_count_kv, [layer.groups for layer in layers]),
        (writer.add_feed_forward_length, [layer.ffn for layer in layers]),
    ):
        add(values[0] if architecture == EQUAL else values)
    writer.add_block_count(len(layers))
    writer.add_key_length(dense.head_dim)
    writer.add_value_length(dense.head_dim)
    writer.add_rope_dimension_count(dense.head_dim)
    writer.add_file_type(FILE_TYPES[kind])


def _bytes(weight: Tensor, name: str, kind: Kind, head_dim: int) -> npt.NDArray[Any]:
    """A weight as the file has it."""
    if re.search(r"\.attn_[qk]\.", name):
        weight = paired(weight, head_dim)
    if kind is Kind.BF16:
        return np.asarray(weight.contiguous().view(torch.uint16).numpy())
    return np.asarray(weight.contiguous().to(torch.float16 if kind is Kind.F16 else torch.float32).numpy())


def paired(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [heads · head_dim, …] of halves that are rotated together → of pairs that are, in each head."""
    rest = weight.shape[1:]
    return weight.view(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(weight.shape)


def _check(out: Path, stored: Stored, names: Mapping[str, str], head_dim: int) -> None:
    """Raise ProofError unless each tensor of the file, read again, is the folder's."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    for name, weight in names.items():
        tensor, expected = tensors.get(name), stored[weight]
        if tensor is None or tuple(reversed([int(n) for n in tensor.shape])) != tuple(expected.shape):
            raise ProofError(f"the proof fails: {name} is missing in {out.name} or of another shape; write it again")
        written = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1)
        if not np.array_equal(written, _bytes(expected, name, tensor.tensor_type, head_dim).view(np.uint8).reshape(-1)):
            raise ProofError(f"the proof fails: {name} in {out.name} is not the folder's; write it again")
