"""gguf: write the weights of a cut LLaMA model as a GGUF file, with the dense model's GGUF file as pattern.

The vocabulary, the rotary settings and all else that a cut does not change come from the pattern, widths from the
weights. If layers differ in width, the file's architecture is ``deci``, which has LLaMA's block and lists of widths. So
llama.cpp runs models that no transformers class can hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, GGUFWriter, ReaderField
from torch import Tensor

from mptk.errors import MptkError, ProofError, first_line
from mptk.io.untrusted import check_gguf, damaged
from mptk.ir.plan import Plan
from mptk.ir.weights import Weights

EQUAL, RAGGED = "llama", "deci"
TENSOR_KINDS = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
FILE_TYPES = {Kind.F32: 0, Kind.F16: 1, Kind.BF16: 32}
"""Type of the matrices → ``general.file_type``."""
DROPPED = (
    "GGUF.",
    "general.architecture",
    "general.file_type",
    "general.quantization",
    "general.size_label",
    "quantize.",
)
"""Prefixes of fields that describe the pattern's own weights."""
WIDTHS = (
    *("block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.value_length", "rope.dimension_count"),
)
"""Fields of the architecture that depend on the cut."""
HELD = ("q_heads", "kv_groups", "heads", "ffn", "layers")
"""The families of LLaMA that a GGUF file can hold cut."""
TABLE, HEAD = "token_embd.weight", "output.weight"
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")
BUFFER = "inv_freq"
"""Suffix of a tensor that a graph holds among its weights and that llama.cpp computes."""
FREQUENCIES = "rope_freqs.weight"
"""Rotary frequencies that the converter computed from the config; not a weight of the model."""


@dataclass(frozen=True)
class LayerWidths:
    """The widths of a layer: query heads, KV heads, feed-forward channels."""

    heads: int
    groups: int
    ffn: int


@dataclass(frozen=True)
class GgufField:
    """A field of a file: value, type and, for a list, the type of its items."""

    value: Any
    type: GGUFValueType
    items: GGUFValueType | None


def _field(field: ReaderField) -> GgufField:
    items = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
    return GgufField(field.contents(), field.types[0], items)


class Pattern:
    """The dense model's GGUF file: its fields, its tensors' shapes.

    Raises:
        MptkError: it cannot be read, or its architecture is not LLaMA.
    """

    def __init__(self, file: Path) -> None:
        check_gguf(file)
        self.file = file
        try:
            self.reader = GGUFReader(file)
            self.fields = {field.name: _field(field) for field in self.reader.fields.values()}
            architecture = self._value("general.architecture")
            if architecture != EQUAL:
                raise MptkError(f"{file} holds a {architecture} model; mptk writes GGUF only for {EQUAL} models")
            hidden, heads = (int(self._value(f"{EQUAL}.{n}")) for n in ("embedding_length", "attention.head_count"))
            length = self.fields.get(f"{EQUAL}.attention.key_length")
            self.head_dim = hidden // heads if length is None else int(length.value)
            self.shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in self.reader.tensors}
        except MptkError:
            raise
        except Exception as error:  # the reader checks little of what it reads: any error may come
            raise damaged(file)(first_line(error)) from error

    def _value(self, name: str) -> Any:
        if name not in self.fields:
            raise MptkError(
                f"{self.file} has no {name}, so it is not a language model; give the GGUF file of the dense model"
            )
        return self.fields[name].value

    def kept(self) -> Iterator[tuple[str, GgufField]]:
        """The fields that also hold for the cut model, by name."""
        for name, field in self.fields.items():
            if not name.startswith(DROPPED) and name.removeprefix(f"{EQUAL}.") not in WIDTHS:
                yield name, field

    def frequencies(self) -> npt.NDArray[Any] | None:
        """The tensor ``FREQUENCIES``, if the file has it."""
        found = [tensor.data for tensor in self.reader.tensors if tensor.name == FREQUENCIES]
        return np.asarray(found[0]) if found else None


class GgufWeights:
    """A cut model's weights as a GGUF file. ``layers``: the widths of each layer.

    Args:
        weights: the weights in the cut model's folder.
        plan: the plan of the cut.

    Raises:
        MptkError: the pattern is of another model, or a file of its architecture cannot hold the cut.
    """

    def __init__(self, weights: Weights, plan: Plan, pattern: Pattern) -> None:
        cut = {name for name, choice in plan.families.items() if choice.width < choice.of}
        if odd := {name for name in cut if name.partition(".")[0] not in HELD}:
            raise MptkError(f"{min(odd)} was cut, which a GGUF file cannot hold; cut only {', '.join(HELD)}")
        self.weights, self.pattern = weights, pattern
        self.names = self._names()
        self.kinds = {name: self._kind(weight) for name, weight in self.names.items()}
        self.layers = self._layers()

    def write(self, out: Path) -> None:
        """Write the file and read it back.

        Matrices keep their type, float32, float16 or bfloat16; vectors are float32. Rows of queries and keys are put in
        llama.cpp's order, in which the two numbers that are rotated together stand side by side.

        Raises:
            ProofError: a tensor that was read back differs.
        """
        writer = GGUFWriter(out, self.architecture)
        self._describe(writer)
        for name, weight in self.names.items():
            like = self.weights.like(weight)
            size = like.numel() * (4 if self.kinds[name] is Kind.F32 else 2)
            writer.add_tensor_info(name, like.shape, np.dtype(np.float32), size, raw_dtype=self.kinds[name])
        frequencies = self.pattern.frequencies()
        if frequencies is not None:
            writer.add_tensor_info(FREQUENCIES, frequencies.shape, frequencies.dtype, frequencies.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in self.names:
            writer.write_tensor_data(self._numbers(name))
        if frequencies is not None:
            writer.write_tensor_data(frequencies)
        writer.close()
        self._check(out)

    @property
    def architecture(self) -> str:
        return EQUAL if len(set(self.layers)) == 1 else RAGGED

    def _names(self) -> dict[str, str]:
        """Name in the file → name of the weight."""
        counted = [int(number) for weight in self.weights for number in re.findall(r"\.(\d{1,5})\.", weight)]
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, max(counted, default=-1) + 1)
        names: dict[str, str] = {}
        for weight in self.weights:
            if weight.endswith(BUFFER):
                continue
            name = known.get_name(weight, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise MptkError(f"a GGUF file of a {EQUAL} model cannot hold {weight}; use llama.cpp's converter")
            names[name] = weight
        if TABLE not in names and HEAD in names:  # one weight for both is stored under the one name or the other
            names[TABLE] = names.pop(HEAD)
        there, file = self.pattern.shapes, self.pattern.file
        if TABLE not in names or tuple(self.weights.like(names[TABLE]).shape) != there.get(TABLE):
            raise MptkError(
                f"{file} has another vocabulary or hidden size than the folder; give the GGUF file of its dense model, "
                "or use llama.cpp's converter"
            )
        count = sum(name.endswith(".ffn_down.weight") for name in names)
        wanted = {name for name in there if not re.match(r"blk\.\d+\.", name) or int(name.split(".")[1]) < count}
        if apart := (wanted ^ names.keys()) - {FREQUENCIES, HEAD}:
            raise MptkError(
                f"{min(apart)} is only in one of the folder and {file}, so they belong to different models; give the "
                "GGUF file of the folder's dense model"
            )
        return names

    def _layers(self) -> list[LayerWidths]:
        layers, size = [], self.pattern.head_dim
        for i in range(sum(name.endswith(".ffn_down.weight") for name in self.names)):
            try:
                parts = [self.weights.like(self.names[f"blk.{i}.{name}.weight"]).shape for name in PARTS]
            except KeyError as error:
                raise MptkError(f"the folder has no {error.args[0]}; its layers are not LLaMA's") from error
            q, k, v, out, ffn = parts
            if q[0] % size or k[0] % size or v[0] != k[0] or out[1] != q[0]:
                raise MptkError(f"layer {i} has heads of another size than {size}; cut whole heads, ffn or layers")
            layers.append(LayerWidths(heads=q[0] // size, groups=k[0] // size, ffn=ffn[1]))
        return layers

    def _kind(self, weight: str) -> Kind:
        held = self.weights.narrow(weight)
        if held.dtype not in TENSOR_KINDS:
            raise MptkError(f"{weight} is of {held.dtype}, which no GGUF file has; prune with --dtype float32")
        return TENSOR_KINDS[held.dtype] if held.ndim == 2 else Kind.F32

    def _describe(self, writer: GGUFWriter) -> None:
        """Write the pattern's fields under the name of the architecture, then the widths."""
        for name, field in self.pattern.kept():
            own = re.sub(f"^{EQUAL}\\.", f"{self.architecture}.", name)
            writer.add_key_value(own, field.value, field.type, sub_type=field.items)
        for add, values in (
            (writer.add_head_count, [layer.heads for layer in self.layers]),
            (writer.add_head_count_kv, [layer.groups for layer in self.layers]),
            (writer.add_feed_forward_length, [layer.ffn for layer in self.layers]),
        ):
            add(values[0] if self.architecture == EQUAL else values)
        writer.add_block_count(len(self.layers))
        for add_size in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
            add_size(self.pattern.head_dim)
        writer.add_file_type(FILE_TYPES[self.kinds[TABLE]])

    def _numbers(self, name: str) -> npt.NDArray[Any]:
        """The tensor ``name`` as the file has it."""
        weight, kind = self.weights.narrow(self.names[name]), self.kinds[name]
        if re.search(r"\.attn_[qk]\.", name):
            weight = paired(weight, self.pattern.head_dim)
        if kind is Kind.BF16:
            return np.asarray(weight.contiguous().view(torch.uint16).numpy())
        return np.asarray(weight.contiguous().to(torch.float16 if kind is Kind.F16 else torch.float32).numpy())

    def _check(self, out: Path) -> None:
        written = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
        for name in self.names:
            if name not in written or written[name].data.tobytes() != self._numbers(name).tobytes():
                raise ProofError(f"the proof fails: {name} in {out.name} is not the folder's; write it again")


def paired(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows [heads · head_dim, …]: rotated pairs are i and i + head_dim/2 before, and neighbours after."""
    rest = weight.shape[1:]
    return weight.view(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(weight.shape)
