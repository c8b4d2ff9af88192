"""expected: the fields that a GGUF file of a folder must have, from its config and its tokenizer as transformers reads
them, and from the shapes of the file's own tensors.

It is written apart from the code that writes the fields (``architectures``, ``tokenizer``, ``weights``): a mistake
there must not be expected here, too. Shared are only the facts on llama.cpp in ``ARCHITECTURES``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gguf import TokenType
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mptk.errors import ProofError
from mptk.targets.gguf.architectures import ARCHITECTURES

WRITE_AGAIN = "do not use it, and write it again"
GgufFields = dict[str, object]
TensorShapes = Mapping[str, tuple[int, ...]]
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

    # Query, key and value may be one tensor. Grouped heads: the keys and the values are equally many rows.
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

SPECIAL_IDS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # so in the format
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
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
        raise ProofError(f"{said} is {name!r}, which mptk cannot compare with the folder's; {WRITE_AGAIN}")
    # Expressions that look different may split alike, so what they do to texts is compared.
    patterns, whole_words = SPLITTING[str(name)]
    backend = tokenizer.backend_tokenizer
    own = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(each), "isolated") for each in patterns])
    if bool(json.loads(backend.to_str())["model"].get("ignore_merges")) != whole_words:
        taken = "first" if whole_words else "not first"
        raise ProofError(f"{said} is {name!r}, which takes whole words {taken}, unlike the folder's; {WRITE_AGAIN}")
    for text in TEXTS:
        one, other = _split_places(own, text), _split_places(backend.pre_tokenizer, text)
        if one != other:
            at = next((b for a, b in zip(one, other, strict=False) if a != b), other[-1])
            what = repr(text[slice(*at)])
            raise ProofError(f"{said} is {name!r}, which splits at {what} otherwise than the folder's; {WRITE_AGAIN}")


def _split_places(splitter: pre_tokenizers.PreTokenizer | None, text: str) -> Sequence[tuple[int, int]]:
    return [(0, len(text))] if splitter is None else [place for _, place in splitter.pre_tokenize_str(text)]
