"""weights: a cut model's weights as a GGUF file.

If the layers of a LLaMA model differ in width, the file's architecture is ``deci``, which has LLaMA's block and lists
of widths. So llama.cpp runs models that no transformers class can hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType, GGUFWriter, LlamaFileType, ReaderField
from torch import Tensor

from mptk.errors import MptkError, TargetError
from mptk.features.gguf import GgufType
from mptk.features.gguf.architectures import Architecture, shift_scale
from mptk.ir import Weights

EQUAL, RAGGED = "llama", "deci"
"""llama.cpp's architectures of LLaMA's block: with one width for all layers, and with lists of widths."""
HELD = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
"""Type of a stored weight → the file's, if none is asked for. A weight of another type is refused."""
ARCHITECTURE = "general.architecture"
TABLE, HEAD = "token_embd.weight", "output.weight"
"""The embedding table and the output matrix."""
FULL = re.compile(r"position_embd|ffn_gate_inp")
"""Matrices that llama.cpp takes only in float32."""
BUFFER = "inv_freq"
"""Suffix of a tensor that a graph holds among its weights and that llama.cpp computes."""
GATE_UP = {".experts.gate_up_proj": ".experts.", ".shared_mlp.input_linear.weight": ".mlp.shared_expert."}
"""Ends of names of weights […, 2 · ffn, hidden] that a file has as two tensors → where gguf's names have both."""
RENAMED = {
    ".block_sparse_moe.router.": ".mlp.gate.",
    ".block_sparse_moe.": ".mlp.",
    ".shared_mlp.output_linear.": ".mlp.shared_expert.down_proj.",
    ".mlp.gate.moe_statics.": ".mlp.moe_statics.",
    ".e_score_correction_bias": ".e_score_correction.bias",
}
"""Parts of names that transformers' classes have → as gguf's table of names has them. In this order: the first one also
has the second in it."""


@dataclass(frozen=True)
class LayerWidths:
    """The widths of a layer: query heads, KV heads, feed-forward channels of each expert, experts."""

    heads: int
    groups: int
    ffn: int
    experts: int = 0


def arrange_weights(weights: Weights, architecture: Architecture, head_dim: int, *, tied: bool) -> Weights:
    """The weights under the file's names and in its form. ``tied``: the embedding table is the output matrix, too."""
    # gguf's own table of names, long enough for the largest number in any name: a layer's, or an expert's.
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    counted = [int(number) for weight in weights for number in re.findall(r"\.(\d{1,5})\.", weight)]
    known = gguf.get_tensor_name_map(arch, max(counted, default=-1) + 1)
    sources: dict[str, str] = {}
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    scales: dict[str, Callable[[Tensor], Tensor]] = {}
    for weight, part, half in _split_parts(weights):
        # 1. Its name in the file.
        name = known.get_name(part, try_suffixes=(".weight", ".bias"))
        if name is None and part.removesuffix(".weight") in gguf.TensorNameMap.mappings_cfg[gguf.MODEL_TENSOR.OUTPUT]:
            name = HEAD  # of a model that has one weight for both
        if name is None:
            raise _make_weight_error(architecture, weight)
        name = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        # 2. How it differs from the weight. A shift computes; all other changes only move numbers (``moves``).
        sources[name] = weight
        if half is not None:
            changes[name] = partial(_take_half, half)
        for pattern, change in architecture.changes.items():
            if re.search(pattern, name):
                (scales if change is shift_scale else changes)[name] = partial(_with, change, head_dim)
    # 3. One weight for table and output matrix, under one name or the other. llama.cpp takes the table for both.
    if HEAD in sources and (tied or TABLE not in sources):
        sources.setdefault(TABLE, sources.pop(HEAD))
    if HEAD in sources and gguf.MODEL_TENSOR.OUTPUT not in gguf.MODEL_TENSORS[arch]:
        raise _make_weight_error(architecture, sources[HEAD])
    return weights.select_names(sources).with_edits(changes, moves=True).with_edits(scales)


def _make_weight_error(architecture: Architecture, weight: str) -> MptkError:
    return TargetError(
        f"a GGUF file of a {architecture.name} model cannot hold {weight}; use the folder in another program",
        name=weight,
    )


def _split_parts(weights: Weights) -> Iterator[tuple[str, str, int | None]]:
    """Each weight, the name for gguf of a part of it, and which half the part is (None: the whole)."""
    for weight in weights:
        name = weight
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        end = next((end for end in GATE_UP if name.endswith(end)), None)
        if end is not None:
            suffix = ".weight" if end.endswith(".weight") else ""
            for half, part in enumerate(("gate_proj", "up_proj")):
                yield weight, f"{name.removesuffix(end)}{GATE_UP[end]}{part}{suffix}", half
        elif not weight.endswith(BUFFER):
            yield weight, name, None


def _take_half(half: int, weight: Tensor) -> Tensor:
    return weight.chunk(2, dim=-2)[half]


def _with(change: Callable[[Tensor, int], Tensor], head_dim: int, weight: Tensor) -> Tensor:
    return change(weight, head_dim)


class GgufWeights:
    """The tensors of a GGUF file. ``layers``: the widths of each layer; ``leading``: how many of them come before the
    first with experts; ``notes``: what a user should know.

    Args:
        tensors: the weights as the file has them (``arrange_weights``).
        architecture: what llama.cpp expects.
        head_dim: the size of a head.
        kind: the type of the matrices; auto: the type in which each is stored.

    Raises:
        MptkError: the file cannot hold the widths.
    """

    def __init__(self, tensors: Weights, architecture: Architecture, head_dim: int, kind: GgufType) -> None:
        self.tensors, self.base, self.head_dim, self.type = tensors, architecture, head_dim, kind
        self.kinds = self.choose_kinds(kind)
        self.layers = self._measure_layers()
        self.leading = next((i for i, layer in enumerate(self.layers) if layer.experts), len(self.layers))
        self._check_widths()

    @property
    def architecture(self) -> str:
        """The name of the file's architecture."""
        # Layers with experts may have other widths than the leading ones without: these are two numbers in any file.
        blocks = {(layer.ffn, layer.experts) for layer in self.layers}
        heads = {(layer.heads, layer.groups) for layer in self.layers}
        ragged = len(heads) > 1 or len(blocks) > len({experts > 0 for _, experts in blocks})
        return RAGGED if ragged else self.base.name

    @property
    def table(self) -> tuple[int, int]:
        """Tokens and hidden size."""
        rows, hidden = self.tensors.find_like(TABLE).shape
        return rows, hidden

    @property
    def notes(self) -> list[str]:
        kept = sum(kind is Kind.F16 for kind in self.kinds.values()) if self.type.startswith("q") else 0
        return [f"{kept} matrices are float16, as 32 does not divide their rows"] if kept else []

    def write(self, out: Path, describe: Callable[[GGUFWriter], None]) -> None:
        """Write the file. ``describe`` writes the fields that the widths do not determine."""
        writer = GGUFWriter(out, self.architecture)
        self._describe(writer)
        describe(writer)
        _write_tensors(writer, self.tensors, self.kinds)

    def choose_kinds(self, kind: GgufType) -> dict[str, Kind]:
        """The type of each tensor if the matrices are of type ``kind``."""
        return {name: self._choose_kind(name, kind) for name in self.tensors}

    def _choose_kind(self, name: str, asked: GgufType) -> Kind:
        # Vectors, and some matrices, are float32 whatever was asked for. A row that the type's blocks do not fill is
        # float16. 4 or 5 bits are too coarse for the table and the output matrix.
        like, held = self.tensors.find_like(name), self.tensors.read_narrow(name).dtype
        if held not in HELD:
            raise TargetError(f"{name} is of {held}, which no GGUF file has; prune with --dtype float32", name=name)
        if like.ndim == 1 or FULL.search(name):
            return Kind.F32
        kind = HELD[held] if asked == "auto" else Kind[asked.upper()]
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if like.shape[-1] % block:
            return Kind.F16
        return Kind.Q8_0 if block > 1 and name in (TABLE, HEAD) else kind

    def _measure_layers(self) -> list[LayerWidths]:
        blocks = {int(name.split(".")[1]) for name in self.tensors if name.startswith("blk.")}
        try:
            return [self._measure_layer(i) for i in range(max(blocks, default=-1) + 1)]
        except KeyError as error:
            raise TargetError(
                f"the folder has no {error.args[0]}, which a {self.base.name} model has; use it in another program",
                name=error.args[0],
            ) from error

    def _measure_layer(self, i: int) -> LayerWidths:
        def shape(name: str) -> torch.Size:
            return self.tensors.find_like(f"blk.{i}.{name}.weight").shape

        # The input of the attention's output is the queries' width, also if query, key and value are one tensor.
        size, queries = self.head_dim, shape("attn_output")[1]
        fused, experts = f"blk.{i}.attn_qkv.weight" in self.tensors, f"blk.{i}.ffn_down_exps.weight" in self.tensors
        keys = (shape("attn_qkv")[0] - queries) // 2 if fused else shape("attn_k")[0]
        if queries % size or keys % size or not (fused or shape("attn_v")[0] == keys):
            raise TargetError(
                f"layer {i} has heads of another size than {size}; cut whole heads, ffn or layers", name=f"blk.{i}"
            )
        ffn = shape("ffn_down_exps" if experts else "ffn_down")[-1]
        return LayerWidths(queries // size, keys // size, ffn, shape("ffn_down_exps")[0] if experts else 0)

    def _count_shared(self) -> int:
        """Channels of the experts that all tokens use; 0 if there are none."""
        name = f"blk.{self.leading}.ffn_down_shexp.weight"
        return self.tensors.find_like(name).shape[1] if name in self.tensors else 0

    def _check_widths(self) -> None:
        # What llama.cpp's code for the architecture takes for granted.
        first, hidden, sparse = self.layers[0], self.table[1], self.layers[self.leading :]
        if self.architecture == RAGGED and (self.base.name != EQUAL or sparse):
            raise TargetError(
                f"the layers differ in width, which llama.cpp reads only in {EQUAL} models without experts; cut all "
                "layers to one width",
                name=self.base.name,
            )
        if not all(layer.experts for layer in sparse):
            raise TargetError(
                "llama.cpp has layers without experts only before the others; use the folder elsewhere",
                name=self.base.name,
            )
        if sparse and self.base.counted and self._count_shared() % sparse[0].ffn:
            raise TargetError(
                f"{self._count_shared()} shared channels are no multiple of an expert's {sparse[0].ffn}, as llama.cpp "
                f"expects of {self.base.name} models; cut both by the same share",
                name=self.base.name,
            )
        if self.base.square and first.heads * self.head_dim != hidden:
            raise TargetError(
                f"{first.heads} heads of {self.head_dim} are not the hidden size {hidden}, as llama.cpp expects of "
                f"{self.base.name} models; prune without --no-portable",
                name="portable",
            )

    def _describe(self, writer: GGUFWriter) -> None:
        """Write the widths."""
        rows, hidden = self.table
        for add, values in (
            (writer.add_head_count, [layer.heads for layer in self.layers]),
            (writer.add_head_count_kv, [layer.groups for layer in self.layers]),
            (writer.add_feed_forward_length, [layer.ffn for layer in self.layers]),
        ):
            add(values if self.architecture == RAGGED else values[0])
        writer.add_block_count(len(self.layers))
        writer.add_embedding_length(hidden)
        writer.add_vocab_size(rows)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        # Experts: the first layer with any speaks for all.
        for sparse in self.layers[self.leading : self.leading + 1]:
            writer.add_expert_count(sparse.experts)
            writer.add_expert_feed_forward_length(sparse.ffn)
            writer.add_leading_dense_block_count(self.leading)
            if shared := self._count_shared():
                writer.add_expert_shared_feed_forward_length(shared)
                writer.add_expert_shared_count(shared // sparse.ffn)
        # The file is called after the type of most numbers in the layers' matrices.
        sizes = dict.fromkeys(self.kinds.values(), 0)
        for name, kind in self.kinds.items():
            like = self.tensors.find_like(name)
            sizes[kind] += like.numel() if name.startswith("blk.") and like.ndim > 1 else 0
        kind = max(sizes, key=lambda kind: (sizes[kind], kind))
        writer.add_file_type(LlamaFileType["ALL_F32" if kind is Kind.F32 else f"MOSTLY_{kind.name}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def write_floats(out: Path, weights: GgufWeights, like: Mapping[str, ReaderField]) -> None:
    """Write the tensors in float32, with the fields of another file of the same model."""
    writer = GGUFWriter(out, str(like[ARCHITECTURE].contents()))
    for name, field in like.items():
        copy_field(writer, name, field)
    _write_tensors(writer, weights.tensors, weights.choose_kinds("f32"))


def copy_field(writer: GGUFWriter, name: str, field: ReaderField) -> None:
    """Write a field of another file, unless the writer has one of that name."""
    if name not in writer.kv_data[0]:
        items = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=items)


def _write_tensors(writer: GGUFWriter, tensors: Weights, kinds: Mapping[str, Kind]) -> None:
    """Write the tensors behind the writer's fields, and close the file. One tensor is in memory at a time."""
    # The format has all names, shapes and types before the first number. gguf's own ``add_tensor`` would hold all
    # numbers.
    for name, kind in kinds.items():
        shape = tensors.find_like(name).shape
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), shape.numel() // block * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind in kinds.items():
        writer.write_tensor_data(gguf.quantize(tensors[name].float().contiguous().numpy(), kind))
    writer.close()
