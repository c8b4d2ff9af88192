"""formats: a quantised transformers checkpoint, written as a float one, matrix by matrix.

``FORMATS`` lists the formats, by ``quant_method`` of config.json's ``quantization_config``. Only one matrix is in
memory at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mptk.errors import FileError, ModelError, PackageError
from mptk.files import format_json
from mptk.io.checkpoint import SMALL_FILES
from mptk.io.loaders import CONFIG
from mptk.io.resident import Resident, open_stored_weight
from mptk.io.tensors import read_likes, write_weights
from mptk.io.untrusted import QUANTIZATION, read_object
from mptk.ir import Lazy, Weights
from mptk.reading import Json, shorten_text

# Bits of the whole numbers in which GPTQ and AWQ pack smaller ones.
WORD = 32
# Column k of eight is the ``AWQ_ORDER[k]``-th number of its word (AutoAWQ, version "gemm").
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# The widths that GPTQ writes. A number of 3 bits may lie in two words (``unpack_words``).
GPTQ_BITS = (2, 3, 4, 8)
# Files of a quantised checkpoint that are left out or written anew.
QUANTIZED_ONLY = (CONFIG, "quantize_config.json", "quant_config.json")
# Types that no float checkpoint has: a tensor of these that no format takes lacks its scale.
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
# LLM.int8 stores q = 127 · w / max |w| for each row.
INT8_LARGEST = 127
# Blocks of one scale, if an fp8 checkpoint does not say: DeepSeek-V3's, as in transformers.
FP8_BLOCK = (128, 128)

# The ``quantization_config`` of a config.json.
Quantization = Mapping[str, Any]


@dataclass(frozen=True)
class Parts(Mapping[str, Tensor]):
    """The tensors that hold one matrix: ending of the name → tensor, read when it is asked for.

    ``name``: the beginning of all their names. ``folder``: their checkpoint.
    """

    name: str
    entries: Mapping[str, Lazy]
    folder: Path

    def __getitem__(self, ending: str) -> Tensor:
        return self.entries[ending].make()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, ending: str) -> torch.Size:
        """The shape of a tensor that need not be read."""
        return self.entries[ending].like.shape


@dataclass(frozen=True)
class Format:
    """How one kind of quantised matrix is stored.

    ``marker``: the ending of a tensor's name that only such a matrix has. ``others``: endings of its other tensors, if
    it has them. ``shape``: of the matrix. ``make``: the matrix, in float32 or the type of its scales. ``result``: the
    ending of its name.
    """

    marker: str
    others: tuple[str, ...]
    shape: Callable[[Parts, Quantization], Sequence[int]]
    make: Callable[[Parts, Quantization], Tensor]
    result: str = ".weight"


def unpack_words(words: Tensor, bits: int, dim: int) -> Tensor:
    """The whole numbers of ``bits`` bits in int32 ``words``, packed along ``dim`` from each word's lowest bit on."""
    row = words.movedim(dim, -1).long() & (2**WORD - 1)  # as unsigned numbers, so that shifts bring in zeros
    # Where number i begins: its word, and its first bit in it.
    first = torch.arange(row.shape[-1] * WORD // bits) * bits
    word, shift = first // WORD, first % WORD
    # A number of 3 bits may begin in one word and end in the next. The last word has no next, and none ends beyond it.
    low, high = row[..., word] >> shift, row[..., (word + 1).clamp_max(row.shape[-1] - 1)] << (WORD - shift)
    numbers: Tensor = ((low | high) & (2**bits - 1)).movedim(-1, dim)
    return numbers


def _number_groups(inputs: int, settings: Quantization) -> Tensor:
    """The group of each input, int64 [inputs]. All inputs are one group if the size is missing or −1."""
    size = settings.get("group_size", settings.get("q_group_size", -1))
    return torch.arange(inputs) // (inputs if size in (None, -1) else size)


# ---- GPTQ ----


def _find_gptq_shape(parts: Parts, settings: Quantization) -> tuple[int, int]:
    rows, outputs = parts.shape(".qweight")
    return outputs, rows * WORD // _read_gptq_bits(settings)


def _dequantize_gptq(parts: Parts, settings: Quantization) -> Tensor:
    """scale · (q − zero), packed along the inputs of [inputs, outputs], zeros along the outputs."""
    bits = _read_gptq_bits(settings)
    q, zeros, scales = (
        unpack_words(parts[".qweight"], bits, 0),
        unpack_words(parts[".qzeros"], bits, 1),
        parts[".scales"],
    )
    # Version 1 of the format stores zeros less 1.
    if settings.get("checkpoint_format") != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)
    group = parts[".g_idx"].long() if ".g_idx" in parts else _number_groups(len(q), settings)
    matrix: Tensor = ((q - zeros[group, : q.shape[1]]) * scales.float()[group]).T
    return matrix


def _read_gptq_bits(settings: Quantization) -> int:
    bits = settings.get("bits")
    if bits not in GPTQ_BITS:
        raise ModelError(
            f"GPTQ with bits {bits!r} is not read, only {GPTQ_BITS}; give the float checkpoint", name="bits"
        )
    return int(bits)


# ---- AWQ ----


def _find_awq_shape(parts: Parts, settings: Quantization) -> tuple[int, int]:
    version, bits = settings.get("version", "gemm"), settings.get("bits", settings.get("w_bit", 4))
    if (version, bits) != ("gemm", 4):
        raise ModelError(
            f"AWQ of version {version!r} with {bits} bits is not read, only 'gemm' with 4; give the float checkpoint",
            name="bits",
        )
    inputs, words = parts.shape(".qweight")
    return words * len(AWQ_ORDER), inputs


def _dequantize_awq(parts: Parts, settings: Quantization) -> Tensor:
    """scale · (q − zero), packed along the outputs of [inputs, outputs]."""

    def unpack_codes(words: Tensor) -> Tensor:
        eights: Tensor = unpack_words(words, 4, 1).unflatten(1, (-1, len(AWQ_ORDER)))
        return eights[..., AWQ_ORDER].flatten(1)

    q, scales = unpack_codes(parts[".qweight"]), parts[".scales"].float()
    group = _number_groups(len(q), settings)
    # Without zeros the numbers are symmetric: 8 of 16 is the middle.
    zeros = unpack_codes(parts[".qzeros"]) if ".qzeros" in parts else torch.full(scales.shape, 8)
    matrix: Tensor = ((q - zeros[group]) * scales[group]).T
    return matrix


# ---- fp8, bitsandbytes, mxfp4, compressed-tensors ----


def _keep_shape(parts: Parts, settings: Quantization) -> torch.Size:
    return parts.shape(".weight")


def _dequantize_fp8(parts: Parts, settings: Quantization) -> Tensor:
    """weight · scale; a scale for the matrix, for each row, or for each block of ``weight_block_size``."""
    weight, scale = parts[".weight"].float(), parts[".weight_scale_inv"].float()  # despite its name it is multiplied
    if scale.ndim == weight.ndim:
        for dim, block in enumerate(settings.get("weight_block_size") or FP8_BLOCK):
            # A scale of one element broadcasts. The last block may be incomplete.
            if 1 < scale.shape[dim] < weight.shape[dim]:
                scale = scale.repeat_interleave(block, dim).narrow(dim, 0, weight.shape[dim])
    return weight * scale


def _dequantize_fbgemm(parts: Parts, settings: Quantization) -> Tensor:
    """weight · scale, a scale for each row."""
    return parts[".weight"].float() * parts[".weight_scale"].float()


def _dequantize_int8(parts: Parts, settings: Quantization) -> Tensor:
    """weight · SCB / 127: LLM.int8, a scale for each row."""
    return parts[".weight"].float() * (parts[".SCB"].float() / INT8_LARGEST)[:, None]


_STATES = tuple(f".weight.quant_state.bitsandbytes__{name}" for name in ("nf4", "fp4"))


def _read_bits4_state(parts: Parts) -> Json:
    found = next((parts[name] for name in _STATES if name in parts), None)
    if found is None:
        raise FileError(
            f"{parts.name}.weight in {parts.folder} has no quant_state; download the model again", name=parts.name
        )
    state: Json = json.loads(bytes(found.tolist()))
    return state


def _find_bits4_shape(parts: Parts, settings: Quantization) -> tuple[int, ...]:
    return tuple(_read_bits4_state(parts)["shape"])


def _dequantize_bits4(parts: Parts, settings: Quantization) -> Tensor:
    """code[q] · absmax, one absmax a block of the flattened matrix (nf4 and fp4 of bitsandbytes)."""
    state = _read_bits4_state(parts)
    absmax = parts[".weight.absmax"]
    # Double quantisation: absmax itself is stored in 8 bits, as code[q] · absmax + offset.
    if ".weight.nested_absmax" in parts:
        codes = parts[".weight.nested_quant_map"].float()[absmax.long()]
        nested = parts[".weight.nested_absmax"].float().repeat_interleave(state["nested_blocksize"])
        absmax = codes * nested[: len(codes)] + state["nested_offset"]
    # Two numbers in a byte, the upper half first.
    packed = parts[".weight"].flatten().long()
    numbers = torch.stack([packed >> 4, packed & 15], -1).flatten()[: math.prod(state["shape"])]
    values = parts[".weight.quant_map"].float()[numbers]
    return (values * absmax.float().repeat_interleave(state["blocksize"])[: len(values)]).reshape(state["shape"])


def _find_mxfp4_shape(parts: Parts, settings: Quantization) -> tuple[int, ...]:
    # Two numbers in a byte; transformers has the experts' matrices as [experts, inputs, outputs].
    experts, rows, groups, packed = parts.shape("_blocks")
    return experts, groups * packed * 2, rows


def _dequantize_mxfp4(parts: Parts, settings: Quantization) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made: Tensor = convert_moe_packed_tensors(parts["_blocks"], parts["_scales"], dtype=torch.float32)
    return made


_COMPRESSED = tuple(
    f".{name}"
    for name in (
        *("weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
        *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
    )
)


def _find_compressed_shape(parts: Parts, settings: Quantization) -> tuple[int, ...]:
    if ".weight_shape" in parts:
        return tuple(parts[".weight_shape"].tolist())
    if ".weight" in parts:
        return tuple(parts.shape(".weight"))
    rows, packed = parts.shape(".weight_packed")  # two numbers of 4 bits in a byte
    return rows, 2 * packed


def _dequantize_compressed(parts: Parts, settings: Quantization) -> Tensor:
    """The matrix, by the library of the format, which has many kinds."""
    try:
        from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer
    except ImportError as error:
        raise PackageError(
            "the checkpoint is in the compressed-tensors format; pip install 'compressed-tensors>=0.20'",
            name="compressed-tensors",
        ) from error
    tensors = {f"{parts.name}{ending}": parts[ending] for ending in parts}
    found: Mapping[str, Tensor] = CompressedTensorsDequantizer(parts.folder, dtype=torch.float32).process(tensors)
    return found[f"{parts.name}.weight"]


_INPUT_SCALES = (".input_scale", ".activation_scale")

FORMATS: Mapping[str, tuple[Format, ...]] = {
    "gptq": (Format(".qweight", (".qzeros", ".scales", ".g_idx"), _find_gptq_shape, _dequantize_gptq),),
    "awq": (Format(".qweight", (".qzeros", ".scales"), _find_awq_shape, _dequantize_awq),),
    "fp8": (Format(".weight_scale_inv", (".weight", *_INPUT_SCALES), _keep_shape, _dequantize_fp8),),
    "fbgemm_fp8": (Format(".weight_scale", (".weight", ".input_scale_ub"), _keep_shape, _dequantize_fbgemm),),
    "bitsandbytes": (
        Format(".SCB", (".weight", ".weight_format"), _keep_shape, _dequantize_int8),
        Format(
            ".weight.absmax",
            (".weight", *(f".weight.{n}" for n in ("quant_map", "nested_absmax", "nested_quant_map")), *_STATES),
            _find_bits4_shape,
            _dequantize_bits4,
        ),
    ),
    "mxfp4": (Format("_blocks", ("_scales",), _find_mxfp4_shape, _dequantize_mxfp4, result=""),),
    "compressed-tensors": (Format(".weight_scale", _COMPRESSED, _find_compressed_shape, _dequantize_compressed),),
}
"""``quant_method`` → how its matrices are stored."""


def read_quantization(folder: Path) -> dict[str, object]:
    """The ``quantization_config`` of a checkpoint.

    Raises:
        MptkError: its method is not one of ``FORMATS``.
    """
    found = read_object(folder / CONFIG).get(QUANTIZATION)
    method = found.get("quant_method") if isinstance(found, dict) else found
    if not isinstance(found, dict) or not isinstance(method, str) or method not in FORMATS:
        raise ModelError(
            f"{folder} is quantised by {shorten_text(repr(method))}, and these can be read: {', '.join(FORMATS)}; "
            "give the float checkpoint that it was made of",
            name=folder,
            nearest=FORMATS,
        )
    return dict(found)


def write_float(folder: Path, settings: Quantization, target: Path) -> None:
    """Write the checkpoint in ``folder`` to ``target`` in its config's float type, without its quantisation.

    Raises:
        MptkError: a matrix is not as its format says, or has no scale.
    """
    # One file, whatever the checkpoint has: it is written matrix by matrix.
    config = read_object(folder / CONFIG)
    dtype = _find_float_type(config)
    weights = _dequantize_weights(folder, settings, dtype)
    target.mkdir(parents=True)
    write_weights(target / "model.safetensors", weights)
    # Its config, as a float model's: the type moves to the newer field's name.
    del config[QUANTIZATION]
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (target / CONFIG).write_text(format_json(config, indent=2), encoding="utf-8")
    # All else as it is, except for the index of shards that are no longer there.
    for small in {each for pattern in SMALL_FILES for each in folder.glob(pattern)}:
        if small.name not in QUANTIZED_ONLY and not small.name.endswith(".index.json"):
            shutil.copyfile(small, target / small.name)


def _find_float_type(config: Json) -> torch.dtype:
    """The type that the numbers had before; float16 if the config does not say."""
    # A config may give the stored type (int8, fp8) instead, which is none to dequantise to.
    text = config.get("text_config")
    said = [each.get(name) for each in (config, text or {}) for name in ("dtype", "torch_dtype")]
    known = [getattr(torch, str(name).removeprefix("torch.")) for name in said if name not in (None, "auto")]
    return next((dtype for dtype in known if dtype.is_floating_point and dtype.itemsize > 1), torch.float16)


def _dequantize_weights(folder: Path, settings: Quantization, dtype: torch.dtype) -> Weights:
    """All tensors of a checkpoint, its quantised matrices as floats of ``dtype``, each made when it is asked for."""
    # Nothing is kept in memory: each tensor is needed once.
    stored = {
        name: open_stored_weight(file, name, like, Resident(0))
        for file in sorted(folder.glob("*.safetensors"))
        for name, like in read_likes(file).items()
    }
    # Each tensor with a format's marker stands for a matrix, together with the others of the same beginning.
    made, used = dict[str, Lazy](), set[str]()
    for each in FORMATS[settings["quant_method"]]:
        for name in [name.removesuffix(each.marker) for name in stored if name.endswith(each.marker)]:
            endings = [ending for ending in (each.marker, *each.others) if name + ending in stored]
            parts = Parts(name, {ending: stored[name + ending] for ending in endings}, folder)
            like = torch.empty(tuple(each.shape(parts, settings)), dtype=dtype, device="meta")
            made[name + each.result] = Lazy(like, partial(_make_matrix, each, parts, settings, like))
            used |= {name + ending for ending in endings}
    # The rest are floats (norms, embeddings), and keep their type.
    others = {name: entry for name, entry in stored.items() if name not in used}
    if wrong := next((name for name, entry in others.items() if entry.like.dtype in NARROW), None):
        raise FileError(
            f"{wrong} in {folder} is {others[wrong].like.dtype} without a scale; give the float checkpoint", name=wrong
        )
    return Weights(others | made)


def _make_matrix(each: Format, parts: Parts, settings: Quantization, like: Tensor) -> Tensor:
    try:
        matrix = each.make(parts, settings).to(like.dtype)
    except (RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise FileError(
            f"{parts.name} in {parts.folder} is not as {settings['quant_method']} stores a matrix ({error}); download "
            "the model again",
            name=parts.name,
        ) from error
    if matrix.shape != like.shape:
        raise FileError(
            f"{parts.name} in {parts.folder} gives {list(matrix.shape)}, not {list(like.shape)}", name=parts.name
        )
    return matrix.contiguous()
