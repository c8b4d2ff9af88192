"""check: read a GGUF file back and compare each field and each tensor with the folder that it was made from.

Every field of the file is on one of three lists: the fields that follow from the folder (``derive_…``), the fields of
the dense model's file, and the fields that only describe. A field on none of them is refused, too.

What follows is derived from the config and the tokenizer as transformers reads them, and from the shapes of the file's
own tensors. It is written apart from the code that writes the fields (``architectures``, ``tokenizer``, ``weights``): a
mistake there must not be expected here, too. Shared are only the facts on llama.cpp in ``ARCHITECTURES``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, LlamaFileType, ReaderField, ReaderTensor, TokenType
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mptk.errors import ProofError, take_first_line
from mptk.features.gguf import GgufType
from mptk.features.gguf.architectures import ARCHITECTURES, Architecture
from mptk.features.gguf.loader import GGUF
from mptk.ir import Weights
from mptk.reading import make_damage_error, shorten_text
from mptk.targets.beside import MISSING

DESCRIBE = (
    *("general.name", "general.author", "general.version", "general.organization", "general.finetune"),
    *("general.basename", "general.description", "general.quantized_by", "general.size_label", "general.license"),
    *("general.url", "general.doi", "general.uuid", "general.repo_url", "general.source.", "general.base_model."),
    *("general.dataset.", "general.tags", "general.languages"),
)
"""Starts of the names of fields that no program computes with."""
READER_PREFIX = "GGUF."
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
GgufFields = dict[str, object]
TensorShapes = Mapping[str, tuple[int, ...]]
WRITE_AGAIN = "do not use it, and write it again"
GIVEN_LIKE = f"if it was written with --like, give the same file as --model; else {WRITE_AGAIN}"
FLOAT_ERRORS: Mapping[Kind, tuple[float, float]] = {
    Kind.F32: (0.0, 0.0),
    Kind.F16: (2.0**-11, 2.0**-25),
    Kind.BF16: (2.0**-8, 2.0**-133),
}
"""The largest error of a number in a float type: as its share, and of the smallest ones."""


class GgufFile:
    """What a GGUF file holds.

    Raises:
        MptkError: it is damaged.
    """

    def __init__(self, file: Path) -> None:
        # Bounds first: the reader trusts the sizes that a file says.
        GGUF.check_file(file)
        self.file = file
        try:
            reader = GGUFReader(file)
            self.fields = {name: field for name, field in reader.fields.items() if not name.startswith(READER_PREFIX)}
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
            self.values = {name: field.contents() for name, field in self.fields.items()}
            self.shapes = {name: tuple(map(int, reversed(each.shape))) for name, each in self.tensors.items()}
            self.version = int(reader.fields[FORMAT_FIELD].contents())
            end = max((int(each.data_offset + each.n_bytes) for each in reader.tensors), default=0)
            self.bytes = end + -end % reader.alignment
        except Exception as error:  # the reader checks little of what it reads: any error may come
            raise make_damage_error(file)(take_first_line(error)) from error

    def check_format(self) -> None:
        """Raise MptkError unless the file is of mptk's version of the format, and ends with its last tensor."""
        damaged, size = make_damage_error(self.file), self.file.stat().st_size
        if self.version != gguf.GGUF_VERSION:
            raise damaged(f"it is of version {self.version} of the format, and mptk writes {gguf.GGUF_VERSION}")
        # Bytes behind the last tensor could be anything.
        if size != self.bytes:
            raise damaged(f"it has {size} bytes, and its tensors end at {self.bytes}")

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
        return ProofError(f"{said}; {GIVEN_LIKE if has is MISSING else WRITE_AGAIN}", name=field)


def check_fields(
    found: GgufFile,
    config: PreTrainedConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    pattern: Mapping[str, object],
    base: Architecture,
    head_dim: int,
    name: str,
) -> None:
    """Compare the fields of a file with a folder's, also their types. Raises ProofError.

    Args:
        config: the folder's; None: it has none.
        tokenizer: the folder's; None: the vocabulary is the pattern's.
        pattern: the fields of the dense model's file, without the architecture's name; empty: there is none.
        base: what llama.cpp expects of the model.
        head_dim: the size of a head.
        name: what the file must call the model.
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
                f"the folder; {WRITE_AGAIN}",
                name=key,
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
            f"the proof fails: {key} in {found.file.name} is of a type that llama.cpp does not read; {WRITE_AGAIN}",
            name=key,
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
            f"file; {WRITE_AGAIN}",
            name=key,
        )
    raise ProofError(
        f"the proof fails: {key} in {found.file.name} does not follow from the folder; {GIVEN_LIKE}", name=key
    )


def check_tensors(found: GgufFile, tensors: Weights, kinds: Sequence[Mapping[str, Kind]]) -> float:
    """Raise ProofError if a tensor is missing, was added, or differs from the weight by more than its type rounds.

    Returns the largest error of a number, as a share of the largest number of its tensor. ``tensors``: the weights as
    the file must have them (``arrange_weights``). ``kinds``: the types that all tensors together may have.
    """
    # Names, then types, then shape and numbers of one tensor at a time.
    more = sorted(found.tensors.keys() ^ set(tensors))
    if more:
        where = "is not a tensor of the folder" if more[0] in found.tensors else "is missing"
        raise ProofError(f"the proof fails: {more[0]} in {found.file.name} {where}; {WRITE_AGAIN}", name=more[0])
    if found.kinds not in kinds:
        odd = next(name for name, kind in found.kinds.items() if kind is not kinds[0][name])
        raise found.fail(f"the type of {odd}", found.kinds[odd].name, kinds[0][odd].name)
    worst = 0.0
    for name, tensor in found.tensors.items():
        if found.shapes[name] != tuple(tensors.find_like(name).shape):
            raise found.fail(f"the shape of {name}", list(found.shapes[name]), list(tensors.find_like(name).shape))
        weight = tensors[name].float().contiguous().numpy()
        worst = max(worst, _check_tensor(found, tensor, weight))
    return worst


def _check_tensor(found: GgufFile, tensor: ReaderTensor, weight: npt.NDArray[np.float32]) -> float:
    """Bit by bit against the weight rounded again; and number by number, as rounding may itself be wrong."""
    kind, said = tensor.tensor_type, f"the proof fails: {tensor.name} in {found.file.name} is not the folder's"
    if tensor.data.tobytes() != gguf.quantize(weight, kind).tobytes():
        raise ProofError(f"{said}; {WRITE_AGAIN}", name=tensor.name)
    read = gguf.dequantize(tensor.data, kind).reshape(weight.shape)
    error = np.abs(read - weight)
    if not (error <= _compute_allowed(weight, kind)).all():
        raise ProofError(
            f"{said}: it differs by {float(error.max()):.2g}, more than {kind.name} rounds; {WRITE_AGAIN}",
            name=tensor.name,
        )
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


# ---- the fields that follow from the config and from the tensors ----

COUNTS: Mapping[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "expert_used_count": ("num_experts_per_tok", "moe_k"),
    "interleave_moe_layer_step": ("moe_layer_interval",),
}
REAL: Mapping[str, tuple[str, ...]] = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.scale": ("attention_multiplier",),
    "attention.clamp_kqv": ("clip_qkv",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_weights_scale": ("routed_scaling_factor",),
}
TRUTH: Mapping[str, tuple[str, ...]] = {
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_weights_norm": ("norm_topk_prob",),
}
"""Field → its names in a config, for numbers, real numbers and yes or no."""
YARN_FIELDS = {
    "rope.scaling.yarn_ext_factor": "extrapolation_factor",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
    "attention.temperature_scale": "llama_4_scaling_beta",
}
BUILT_IN = {"layer_norm_eps": "attention.layer_norm_epsilon", "expert_gating_func": "expert_gating_func"}
"""What a class of transformers has built in (``Architecture.written``), by the names of fields."""


def derive_settings(config: PreTrainedConfig) -> GgufFields:
    """The fields of a model's numbers, without the architecture's name before them."""
    # Heads and their size; then what the config says by its own names, in the type that the field has.
    base = ARCHITECTURES[config.model_type]
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    found: GgufFields = {
        "attention.head_count_kv": groups,
        "attention.key_length": size,
        "attention.value_length": size,
    }
    for table, kind in ((COUNTS, int), (REAL, float), (TRUTH, bool)):
        for key, names in table.items():
            value = next((each for name in names if (each := getattr(config, name, None)) is not None), None)
            if value is not None:
                found[key] = kind(value)
    # Rotary embeddings, what transformers' class has built in, windows.
    found |= dict(_derive_rope(config, size))
    for name, value in base.written.items():
        found[BUILT_IN[name]] = float(value) if name.endswith("eps") else int(value)
    if base.period:
        found |= {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": base.period}
    return found


def _derive_rope(config: PreTrainedConfig, size: int) -> Iterator[tuple[str, object]]:
    # With layers that have a window, the settings of both kinds are under their names.
    given: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    rope = given.get("full_attention", given)
    yield "rope.dimension_count", int(size * rope.get("partial_rotary_factor", 1.0))
    if not rope:
        return
    yield "rope.freq_base", float(rope["rope_theta"])
    if "sliding_attention" in given:
        yield "rope.freq_base_swa", float(given["sliding_attention"]["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn", "longrope"):
        yield "rope.scaling.type", kind
    if kind in ("linear", "yarn"):
        yield "rope.scaling.factor", float(rope["factor"])
    if kind == "yarn":
        yield from ((key, float(rope[name])) for key, name in YARN_FIELDS.items() if rope.get(name) is not None)
    if kind == "longrope":
        yield "rope.scaling.attn_factor", float(ROPE_INIT_FUNCTIONS["longrope"](config)[1])
    if kind in ("yarn", "longrope") and (length := rope.get("original_max_position_embeddings")):
        yield "rope.scaling.original_context_length", int(length)


def derive_widths(shapes: TensorShapes, size: int, *, lists: bool) -> GgufFields:
    """The fields of the widths that a file's tensors have. ``size``: of a head; ``lists``: each layer has its own."""
    layers = range(1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blk.")), default=-1))

    def shape(layer: int, *parts: str) -> tuple[int, ...]:
        names = [f"blk.{layer}.{part}.weight" for part in parts]
        return next((shapes[name] for name in names if name in shapes), (0, 0))

    # Query, key and value may be one tensor. Its rows after the queries are keys and as many values.
    queries = [shape(i, "attn_output")[1] for i in layers]
    keys = [shape(i, "attn_k")[0] or (shape(i, "attn_qkv")[0] - queries[i]) // 2 for i in layers]
    channels = [shape(i, "ffn_down_exps", "ffn_down")[-1] for i in layers]
    # One number for all layers, or a list.
    each = {
        "attention.head_count": [rows // size for rows in queries],
        "attention.head_count_kv": [rows // size for rows in keys],
        "feed_forward_length": channels,
    }
    found: GgufFields = {key: values if lists else values[0] for key, values in each.items()}
    rows, hidden = shapes["token_embd.weight"]
    found |= {"block_count": len(layers), "embedding_length": hidden, "vocab_size": rows}
    found |= {"attention.key_length": size, "attention.value_length": size}
    # Experts, whose widths the first layer with any says.
    sparse = next((i for i in layers if f"blk.{i}.ffn_down_exps.weight" in shapes), None)
    if sparse is not None:
        experts, _, width = shape(sparse, "ffn_down_exps")
        found |= {"expert_count": experts, "expert_feed_forward_length": width, "leading_dense_block_count": sparse}
        if shared := shape(sparse, "ffn_down_shexp")[1]:
            found |= {"expert_shared_feed_forward_length": shared, "expert_shared_count": shared // width}
    return found


# ---- the tokenizer ----

# Special token → its field.
SPECIAL_IDS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # so in the format
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
# The expressions that llama.cpp's code has under a name, which are not those of tokenizer.json.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = rf"{_ENDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+|"
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTING: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((GPT2,), False),
    "smollm": ((r"\p{N}", GPT2), False),
    "qwen2": ((_WORDS % r"\p{N}",), False),
    "llama-bpe": ((_WORDS % r"\p{N}{1,3}",), True),
    "dbrx": ((_WORDS % r"\p{N}{1,3}",), False),
    "tekken": ((_CASES,), True),
}
"""llama.cpp's name of a way to split text → its expressions, in order, and whether whole words come first."""
TEXTS = (
    "The quick brown fox's 12 jumps over 3,456 lazy dogs.",
    "We'VE  two   spaces,\n\nlines\r\nand\ttabs; it's 2026 - o'clock",
    "def f(x_1):\n    return x_1 ** 2  # 10000000 HTMLParser CamelCase/path",
    "naïve Ünïcode Straße 東京 123, Привет мир! 👍 ½ 一二三",
)
"""Texts of words, numbers, spaces, cases and scripts, on which ways to split text differ."""


def derive_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None, rows: int) -> GgufFields:
    """The fields of the tokenizer, by their whole names. ``rows``: of the embedding table."""
    # Bytes as a fallback mark SentencePiece's kind, which llama.cpp merges by scores; the others are merged by a list.
    spec = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    spaces = bool(spec.get("byte_fallback"))
    tokens, types = _derive_tokens(tokenizer, rows, bytes_too=spaces, unknown=spec.get("unk_token"))
    pairs = [each.split(" ") if isinstance(each, str) else each for each in spec["merges"]]
    before, after = _find_around(tokenizer)
    found: GgufFields = {
        "model": "llama" if spaces else "gpt2",
        "tokens": tokens,
        "token_type": types,
        "add_space_prefix": _has_space_prefix(tokenizer),
        "add_bos_token": before == [tokenizer.bos_token_id],
        "add_eos_token": after == [tokenizer.eos_token_id],
    }
    if spaces:
        # The same token may come of several merges: the first one counts.
        order: dict[str, int] = {}
        for rank, pair in enumerate(pairs):
            order.setdefault("".join(pair), rank)
        found |= {"pre": "default", "scores": [-float(order.get(token, len(pairs))) for token in tokens]}
    elif pairs:
        # Byte-level vocabularies write a space as Ġ (256 higher), and a merge has a space between its parts.
        found["merges"] = [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in pairs]
    for name, key in SPECIAL_IDS.items():
        number = getattr(tokenizer, f"{name}_token_id", None)
        number = getattr(config, f"{name}_token_id", None) if number is None else number
        if isinstance(number, int) and number < rows:
            found[key] = number
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()} | _derive_templates(tokenizer)


def _derive_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: int, *, bytes_too: bool, unknown: str | None
) -> tuple[list[str], list[int]]:
    # A table may have more rows than there are tokens, or fewer than the class adds.
    added, known = tokenizer.added_tokens_decoder, len(tokenizer)
    words = tokenizer.convert_ids_to_tokens([*range(min(rows, known))])
    names, types = list[str](), list[int]()
    for i in range(rows):
        word = words[i] if i < len(words) else None
        own = added.get(i)
        kind, name = TokenType.NORMAL, word
        if word is None:
            kind, name = TokenType.UNUSED, f"[PAD{i}]"
        elif own is not None and own.special:
            kind = TokenType.CONTROL
        elif own is not None:
            kind, name = TokenType.USER_DEFINED, word.replace("▁", " ")
        elif bytes_too and len(word) == 6 and word.startswith("<0x"):
            kind = TokenType.BYTE
        if word is not None and word == unknown:
            kind = TokenType.UNKNOWN
        names.append(str(name))
        types.append(int(kind))
    return names, types


def _find_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    plain = tokenizer("one two", add_special_tokens=False).input_ids
    whole = tokenizer("one two").input_ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]


def _has_space_prefix(tokenizer: PreTrainedTokenizerBase) -> bool:
    # By what the tokenizer does to a word, not by the names of its steps, which the writer goes by.
    backend, text = tokenizer.backend_tokenizer, "one"
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is not None:
        text = backend.pre_tokenizer.pre_tokenize_str(text)[0][0]
    return text[:1] in (" ", "▁", "Ġ")


def _derive_templates(tokenizer: PreTrainedTokenizerBase) -> GgufFields:
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return {"tokenizer.chat_template": template} if template else {}
    others = {name: text for name, text in template.items() if name != "default"}
    found: GgufFields = {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    if others:
        found["tokenizer.chat_templates"] = sorted(others)
    return found | ({"tokenizer.chat_template": template["default"]} if "default" in template else {})


def check_splitting(name: object, tokenizer: PreTrainedTokenizerBase, said: str) -> None:
    """Raise ProofError unless the tokenizer splits text in llama.cpp's way ``name``. ``said``: the error's start."""
    if name not in SPLITTING:
        raise ProofError(f"{said} is {name!r}, which mptk cannot compare with the folder's; {WRITE_AGAIN}", name=PRE)
    # Expressions that look different may split alike, so what they do to texts is compared.
    patterns, whole_words = SPLITTING[str(name)]
    backend = tokenizer.backend_tokenizer
    own = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(each), "isolated") for each in patterns])
    if bool(json.loads(backend.to_str())["model"].get("ignore_merges")) != whole_words:
        taken = "first" if whole_words else "not first"
        raise ProofError(
            f"{said} is {name!r}, which takes whole words {taken}, unlike the folder's; {WRITE_AGAIN}", name=PRE
        )
    for text in TEXTS:
        one, other = _split_places(own, text), _split_places(backend.pre_tokenizer, text)
        if one != other:
            at = next((b for a, b in zip(one, other, strict=False) if a != b), other[-1])
            what = repr(text[slice(*at)])
            raise ProofError(
                f"{said} is {name!r}, which splits at {what} otherwise than the folder's; {WRITE_AGAIN}", name=PRE
            )


def _split_places(splitter: pre_tokenizers.PreTokenizer | None, text: str) -> Sequence[tuple[int, int]]:
    return [(0, len(text))] if splitter is None else [place for _, place in splitter.pre_tokenize_str(text)]
