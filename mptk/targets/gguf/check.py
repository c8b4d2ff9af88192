"""check: read a GGUF file back and compare each field and each tensor with the folder that it was made from.

Every field of the file is on one of three lists: the fields that follow from the folder (``expected``), the fields of
the dense model's file, and the fields that only describe. A field on none of them is refused, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, LlamaFileType, ReaderField, ReaderTensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mptk.config.choices import GgufType
from mptk.errors import ProofError, take_first_line
from mptk.io.untrusted import check_gguf
from mptk.ir.weights import Weights
from mptk.reading import make_damage_error, shorten_text
from mptk.targets.beside import MISSING
from mptk.targets.gguf.architectures import Architecture
from mptk.targets.gguf.expected import (
    WRITE_AGAIN,
    GgufFields,
    check_splitting,
    derive_settings,
    derive_vocabulary,
    derive_widths,
)

DESCRIBE = (
    *("general.name", "general.author", "general.version", "general.organization", "general.finetune"),
    *("general.basename", "general.description", "general.quantized_by", "general.size_label", "general.license"),
    *("general.url", "general.doi", "general.uuid", "general.repo_url", "general.source.", "general.base_model."),
    *("general.dataset.", "general.tags", "general.languages"),
)
"""Starts of the names of fields that no program computes with."""
READER = "GGUF."
"""Start of the names of fields that the reader makes of the file's head."""
FORMAT_FIELD = "GGUF.version"
PRE = "tokenizer.ggml.pre"
"""llama.cpp's name for how the tokenizer splits text."""
SCALAR_TYPES = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}
ITEM_TYPES = {**SCALAR_TYPES, int: GGUFValueType.INT32}
"""The types in which llama.cpp reads a value, and the items of a list."""
ROUNDING: Mapping[Kind, tuple[float, float, bool]] = {
    Kind.Q8_0: (127, 0.6, False),
    Kind.Q5_1: (31, 0.6, True),
    Kind.Q5_0: (16, 1.1, False),
    Kind.Q4_1: (15, 0.6, True),
    Kind.Q4_0: (8, 1.1, False),
}
"""How finely a type rounds: steps of a block's largest number (or of its range, if it has an offset), the largest error
in steps (a half, and what its scale of half precision adds; a whole step where the range has no room for one end), and
whether it has an offset."""
BLOCK_LENGTH = 32
"""Numbers in a block of any of these types."""
GIVEN_LIKE = f"if it was written with --like, give the same file as --model; else {WRITE_AGAIN}"
FLOAT_ERRORS: Mapping[Kind, tuple[float, float]] = {
    Kind.F32: (0.0, 0.0),
    Kind.F16: (2.0**-11, 2.0**-25),
    Kind.BF16: (2.0**-8, 2.0**-133),
}
"""The largest error of a number in a float type: as its share, and of the smallest ones."""


class GgufFile:
    """A GGUF file that was read back.

    Raises:
        MptkError: it is damaged.
    """

    def __init__(self, file: Path) -> None:
        # Bounds first: the reader trusts the sizes that a file says.
        check_gguf(file)
        self.file = file
        try:
            reader = GGUFReader(file)
            self.fields = {name: field for name, field in reader.fields.items() if not name.startswith(READER)}
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
            self.values = {name: field.contents() for name, field in self.fields.items()}
            self.shapes = {name: tuple(map(int, reversed(each.shape))) for name, each in self.tensors.items()}
            version = int(reader.fields[FORMAT_FIELD].contents())
            end = max((int(each.data_offset + each.n_bytes) for each in reader.tensors), default=0)
            whole = end + -end % reader.alignment
        except Exception as error:  # the reader checks little of what it reads: any error may come
            raise make_damage_error(file)(take_first_line(error)) from error
        if version != gguf.GGUF_VERSION:
            raise make_damage_error(file)(
                f"it is of version {version} of the format, and mptk writes {gguf.GGUF_VERSION}"
            )
        # Bytes behind the last tensor could be anything.
        if file.stat().st_size != whole:
            raise make_damage_error(file)(f"it has {file.stat().st_size} bytes, and its tensors end at {whole}")

    @property
    def kinds(self) -> dict[str, Kind]:
        """The type of each tensor."""
        return {name: tensor.tensor_type for name, tensor in self.tensors.items()}

    @property
    def common(self) -> Kind:
        """The type of most numbers in the layers' matrices, which names the file's."""
        counts: Counter[Kind] = Counter()
        for name, tensor in self.tensors.items():
            if name.startswith("blk.") and len(tensor.shape) > 1:
                counts[tensor.tensor_type] += int(tensor.n_elements)
        return max(counts, key=lambda kind: (counts[kind], kind)) if counts else Kind.F32

    @property
    def type(self) -> GgufType:
        """The type with which mptk writes such matrices."""
        name = self.common.name.lower()
        return next((kind for kind in get_args(GgufType) if kind == name), "auto")

    def fail(self, field: str, has: object, wanted: object) -> ProofError:
        """The error that a field has another value than the folder gives."""
        found, expected = _shorten_value(has), _shorten_value(wanted)
        said = f"the proof fails: {field} in {self.file.name} is {found}, but {expected} in the folder"
        return ProofError(f"{said}; {GIVEN_LIKE if has is MISSING else WRITE_AGAIN}")


def check_fields(
    found: GgufFile,
    config: PreTrainedConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    pattern: Mapping[str, object],
    base: Architecture,
    head_dim: int,
    name: str,
) -> None:
    """Compare the fields of a file with a folder's.

    Args:
        config: the folder's; None: it has none.
        tokenizer: the folder's; None: the vocabulary is the pattern's.
        pattern: the fields of the dense model's file, without the architecture's name; empty: there is none.
        base: what llama.cpp expects of the model.
        head_dim: the size of a head.
        name: what the file must call the model.

    Raises:
        ProofError: a field is missing, differs, or is of another type than llama.cpp reads.
    """
    # 1. The architecture: the model's, or the one with a list of widths for the layers.
    own = found.values.get("general.architecture", MISSING)
    lists = own == "deci" and base.name == "llama"
    if own != base.name and not lists:
        raise found.fail("general.architecture", own, base.name)
    # 2. Fields that follow from the config, and from the shapes of the tensors. Both say some, and must agree.
    settings = {} if config is None else derive_settings(config)
    widths = derive_widths(found.shapes, head_dim, lists=lists)
    for key in settings.keys() & widths.keys():
        if not lists and settings[key] != widths[key]:
            raise ProofError(
                f"the proof fails: the tensors of {found.file.name} have {key} {widths[key]}, but {settings[key]} in "
                f"the folder; {WRITE_AGAIN}"
            )
    kind = found.common
    expected: GgufFields = {
        "general.architecture": own,
        "general.name": name,
        "general.file_type": int(LlamaFileType["ALL_F32" if kind is Kind.F32 else f"MOSTLY_{kind.name}"]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{own}.{key}": value for key, value in (settings | widths).items()},
    }
    # 3. Fields that follow from the tokenizer. How it splits text is compared by what it does.
    if tokenizer is not None:
        expected |= derive_vocabulary(tokenizer, config, found.shapes["token_embd.weight"][0])
    for key, value in expected.items():
        _check_field(found, key, value)
    if tokenizer is not None and PRE not in expected:
        said = f"the proof fails: {PRE} in {found.file.name}"
        check_splitting(found.values.get(PRE), tokenizer, said)
    # 4. All others must only describe, or be the dense model's; and none of the dense model's may be lost.
    for key in sorted(found.values.keys() - expected.keys() - ({PRE} if tokenizer is not None else set())):
        _check_given(found, key, pattern.get(key.removeprefix(f"{own}."), MISSING))
    own_names = {key.removeprefix(f"{own}.") for key in found.values}
    if config is None and (lost := sorted(pattern.keys() - own_names)):
        raise found.fail(lost[0], MISSING, pattern[lost[0]])


def _check_field(found: GgufFile, key: str, expected: object) -> None:
    # The file has float32. The order of templates is not kept.
    value = found.values.get(key, MISSING)
    if isinstance(expected, float) and isinstance(value, float):
        same = np.float32(expected) == np.float32(value)
    elif key == "tokenizer.chat_templates" and isinstance(value, list):
        same = sorted(value) == expected
    else:
        same = type(value) is type(expected) and value == expected
    # A vocabulary would not fit into a message: name the first entry that differs.
    if isinstance(expected, list) and isinstance(value, list) and not same:
        at = next((i for i, (a, b) in enumerate(zip(value, expected, strict=False)) if a != b), None)
        if at is None:
            raise found.fail(f"the length of {key}", len(value), len(expected))
        raise found.fail(f"{key}[{at}]", value[at], expected[at])
    if not same:
        raise found.fail(key, value, expected)
    if not _has_type(found.fields[key], expected):
        raise ProofError(
            f"the proof fails: {key} in {found.file.name} is of a type that llama.cpp does not read; {WRITE_AGAIN}"
        )


def _has_type(field: ReaderField, expected: object) -> bool:
    if isinstance(expected, list):
        return not expected or field.types[-1] is ITEM_TYPES[type(expected[0])]
    return field.types[0] is SCALAR_TYPES[type(expected)]


def _check_given(found: GgufFile, key: str, given: object) -> None:
    """A field that does not follow from the folder: it only describes, or is in the dense model's file, too."""
    value = found.values[key]
    if key.startswith(DESCRIBE) or value == given or (key == "general.type" and value == "model"):
        return
    if given is not MISSING:
        raise ProofError(
            f"the proof fails: {key} in {found.file.name} is {_shorten_value(value)}, but {_shorten_value(given)} in "
            "the dense model's "
            f"file; {WRITE_AGAIN}"
        )
    raise ProofError(f"the proof fails: {key} in {found.file.name} does not follow from the folder; {GIVEN_LIKE}")


def check_tensors(found: GgufFile, tensors: Weights, kinds: Sequence[Mapping[str, Kind]]) -> float:
    """Compare the tensors of a file with a folder's weights; returns the largest error of a number, as a share of the
    largest number of its tensor.

    Args:
        tensors: the weights as the file must have them (``arranged``).
        kinds: the types that the tensors may have, all together one of these.

    Raises:
        ProofError: a tensor is missing, was added, or differs by more than its type rounds.
    """
    # Names, then types, then shape and numbers of one tensor at a time.
    more = sorted(found.tensors.keys() ^ set(tensors))
    if more:
        where = "is not a tensor of the folder" if more[0] in found.tensors else "is missing"
        raise ProofError(f"the proof fails: {more[0]} in {found.file.name} {where}; {WRITE_AGAIN}")
    if found.kinds not in kinds:
        odd = next(name for name, kind in found.kinds.items() if kind is not kinds[0][name])
        raise found.fail(f"the type of {odd}", found.kinds[odd].name, kinds[0][odd].name)
    worst = 0.0
    for name, tensor in found.tensors.items():
        if found.shapes[name] != tuple(tensors.like(name).shape):
            raise found.fail(f"the shape of {name}", list(found.shapes[name]), list(tensors.like(name).shape))
        weight = tensors[name].float().contiguous().numpy()
        worst = max(worst, _check_tensor(found, tensor, weight))
    return worst


def _check_tensor(found: GgufFile, tensor: ReaderTensor, weight: npt.NDArray[np.float32]) -> float:
    """Bit by bit against the weight rounded again; and number by number, as rounding may itself be wrong."""
    kind, said = tensor.tensor_type, f"the proof fails: {tensor.name} in {found.file.name} is not the folder's"
    if tensor.data.tobytes() != gguf.quantize(weight, kind).tobytes():
        raise ProofError(f"{said}; {WRITE_AGAIN}")
    read = gguf.dequantize(tensor.data, kind).reshape(weight.shape)
    error = np.abs(read - weight)
    if not (error <= _compute_allowed(weight, kind)).all():
        raise ProofError(f"{said}: it differs by {float(error.max()):.2g}, more than {kind.name} rounds; {WRITE_AGAIN}")
    largest = float(np.abs(weight).max()) if weight.size else 0.0
    return float(error.max()) / largest if largest else 0.0


def _compute_allowed(weight: npt.NDArray[np.float32], kind: Kind) -> npt.NDArray[np.float32]:
    """The largest error that a type may make of each number."""
    if kind in FLOAT_ERRORS:
        share, least = FLOAT_ERRORS[kind]
        return np.abs(weight) * np.float32(share) + np.float32(least)
    count, most, offset = ROUNDING[kind]
    blocks = weight.reshape(-1, BLOCK_LENGTH)
    span = blocks.max(1) - blocks.min(1) if offset else np.abs(blocks).max(1)
    # An offset is rounded to half precision, too; and so small a step that half precision has no digits for it.
    slack = np.abs(blocks).max(1) * np.float32(2.0**-11 if offset else 0) + np.float32(2.0**-24 * count)
    allowed: npt.NDArray[np.float32] = np.repeat(span / count * most + slack, BLOCK_LENGTH).reshape(weight.shape)
    return allowed


def _shorten_value(value: object) -> str:
    return "missing" if value is MISSING else shorten_text(repr(value))
