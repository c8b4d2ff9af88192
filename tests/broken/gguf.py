"""GGUF files, each with one wrong field, tensor or byte. ``mptk verify FILE.gguf --like DIR`` must refuse them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import mptk
from benchmarks import gguf_models as tiny
from mptk.features.gguf import api
from tests.broken import Broken, Published

Type = GGUFValueType
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
PLAIN, ROUNDED, SPACED, EXPERTS = "gguf", "gguf q8_0", "gguf sentencepiece", "gguf experts"


@dataclass
class Content:
    """What is in a file, to be changed: fields (value, type, type of items), tensors (numbers as stored, type)."""

    fields: dict[str, tuple[Any, Type, Type | None]]
    tensors: dict[str, tuple[np.ndarray, Kind]]

    def shape(self, name: str) -> list[int]:
        return list(self.tensors[name][0].shape)


def read(file: Path) -> Content:
    reader = GGUFReader(file)
    fields = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            items = field.types[-1] if field.types[0] is Type.ARRAY else None
            fields[name] = (field.contents(), field.types[0], items)
    return Content(fields, {each.name: (np.array(each.data), each.tensor_type) for each in reader.tensors})


def write(content: Content, file: Path) -> None:
    writer = GGUFWriter(file, content.fields["general.architecture"][0])
    for name, (value, kind, items) in content.fields.items():
        if name != "general.architecture":
            writer.add_key_value(name, value, kind, sub_type=items)
    for name, (numbers, kind) in content.tensors.items():
        writer.add_tensor(name, numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def edit(change: Callable[[Content], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = read(file)
        change(content)
        write(content, file)

    return damage


def key_of(content: Content, name: str) -> str:
    return (
        name if name.startswith(("general.", "tokenizer.")) else f"{content.fields['general.architecture'][0]}.{name}"
    )


def field(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A field with another value."""

    def changed(content: Content) -> None:
        value, kind, items = content.fields[key_of(content, name)]
        content.fields[key_of(content, name)] = (change(value), kind, items)

    return edit(changed)


def is_now(name: str, value: object) -> Callable[[Path], None]:
    return field(name, lambda _: value)


def times(name: str, factor: float) -> Callable[[Path], None]:
    return field(name, lambda value: type(value)(value * factor))


def item(name: str, at: int, value: object) -> Callable[[Path], None]:
    return field(name, lambda values: [*values[:at], value, *values[at + 1 :]])


def swap(name: str, one: int, other: int) -> Callable[[Path], None]:
    def change(values: list[Any]) -> list[Any]:
        values[one], values[other] = values[other], values[one]
        return values

    return field(name, change)


def add(name: str, value: object, kind: Type, items: Type | None = None) -> Callable[[Path], None]:
    return edit(lambda content: content.fields.update({key_of(content, name): (value, kind, items)}))


def drop(name: str) -> Callable[[Path], None]:
    return edit(lambda content: content.fields.pop(key_of(content, name)))


def retype(name: str, kind: Type) -> Callable[[Path], None]:
    def change(content: Content) -> None:
        key = key_of(content, name)
        content.fields[key] = (content.fields[key][0], kind, None)

    return edit(change)


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray], kind: Kind | None = None) -> Callable[[Path], None]:
    """A tensor with other numbers, as they are stored."""

    def changed(content: Content) -> None:
        numbers, old = content.tensors[name]
        content.tensors[name] = (np.ascontiguousarray(change(numbers)), kind or old)

    return edit(changed)


def exchange(one: str, other: str) -> Callable[[Path], None]:
    def change(content: Content) -> None:
        content.tensors[one], content.tensors[other] = content.tensors[other], content.tensors[one]

    return edit(change)


def at(index: tuple[int, ...], change: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    def changed(numbers: np.ndarray) -> np.ndarray:
        numbers[index] = change(numbers[index])
        return numbers

    return changed


def rounded(kind: Kind) -> Callable[[np.ndarray], np.ndarray]:
    return lambda numbers: quantize(numbers.astype(np.float32), kind)


def unpaired(numbers: np.ndarray) -> np.ndarray:
    """Rows of two heads' rotated pairs as transformers has them."""
    rows, columns = numbers.shape
    return numbers.reshape(-1, 16, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def scale_bits(by: int) -> Callable[[np.ndarray], np.ndarray]:
    """The half-precision scale of the first block of Q8_0, counted up by ``by`` steps."""

    def changed(stored: np.ndarray) -> np.ndarray:
        stored = stored.copy()
        stored[0, :2] = (stored[0, :2].copy().view(np.uint16) + np.uint16(by)).view(np.uint8)
        return stored

    return changed


def version(number: int) -> Callable[[Path], None]:
    return lambda file: (
        file.write_bytes(file.read_bytes()[:4] + struct.pack("<I", number) + file.read_bytes()[8:]) and None
    )


Q, K, V = (f"blk.0.attn_{each}.weight" for each in "qkv")
TOKENS, TYPES, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
PLAIN_ROWS: dict[str, Callable[[Path], None]] = {
    "rope base × 1.1": times("rope.freq_base", 1.1),
    "rope base missing": drop("rope.freq_base"),
    "rope base a little off": times("rope.freq_base", 1.00001),
    "epsilon 1e-2": is_now("attention.layer_norm_rms_epsilon", 1e-2),
    "epsilon missing": drop("attention.layer_norm_rms_epsilon"),
    "epsilon as a double": retype("attention.layer_norm_rms_epsilon", Type.FLOAT64),
    "rope dimension halved": times("rope.dimension_count", 0.5),
    "rope dimension missing": drop("rope.dimension_count"),
    "linear rope scaling": edit(
        lambda c: c.fields.update(
            {
                "llama.rope.scaling.type": ("linear", Type.STRING, None),
                "llama.rope.scaling.factor": (2.0, Type.FLOAT32, None),
            }
        )
    ),
    "only a rope scaling factor": add("rope.scaling.factor", 4.0, Type.FLOAT32),
    "heads": times("attention.head_count", 2),
    "KV heads": times("attention.head_count_kv", 2),
    "KV heads missing": drop("attention.head_count_kv"),
    "key length": times("attention.key_length", 0.5),
    "value length": times("attention.value_length", 0.5),
    "hidden size": times("embedding_length", 2),
    "feed-forward size": times("feed_forward_length", 2),
    "a layer less": field("block_count", lambda n: n - 1),
    "vocabulary size": field("vocab_size", lambda n: n + 1),
    "context length": times("context_length", 4),
    "context length as 64 bits": retype("context_length", Type.UINT64),
    "a window": add("attention.sliding_window", 8, Type.UINT32),
    "soft-capped logits": add("final_logit_softcapping", 30.0, Type.FLOAT32),
    "scaled logits": add("logit_scale", 0.5, Type.FLOAT32),
    "scaled attention": add("attention.scale", 0.5, Type.FLOAT32),
    "clamped queries": add("attention.clamp_kqv", 1.0, Type.FLOAT32),
    "attention to both sides": add("attention.causal", False, Type.BOOL),
    "experts": add("expert_count", 4, Type.UINT32),
    "another architecture": edit(
        lambda c: c.fields.update(
            {name.replace("llama.", "qwen2."): c.fields.pop(name) for name in [*c.fields] if name.startswith("llama.")}
            | {"general.architecture": ("qwen2", Type.STRING, None)}
        )
    ),
    "another name": is_now("general.name", "another"),
    "another file type": is_now("general.file_type", 7),
    "another quantisation version": is_now("general.quantization_version", 1),
    "settings for sampling": add("general.sampling.temp", 5.0, Type.FLOAT32),
    "two tokens swapped": swap(TOKENS, 200, 201),
    "a token renamed": item(TOKENS, 100, "another"),
    "the last token missing": field(TOKENS, lambda tokens: tokens[:-1]),
    "a token's type: control to normal": item(TYPES, 0, 1),
    "a token's type: normal to control": item(TYPES, 150, 3),
    "a token's type: the user's to normal": item(TYPES, 299, 1),
    "token types missing": drop(TYPES),
    "bos": is_now("tokenizer.ggml.bos_token_id", 5),
    "bos missing": drop("tokenizer.ggml.bos_token_id"),
    "eos": is_now("tokenizer.ggml.eos_token_id", 5),
    "eos missing": drop("tokenizer.ggml.eos_token_id"),
    "padding": is_now("tokenizer.ggml.padding_token_id", 5),
    "unknown": is_now("tokenizer.ggml.unknown_token_id", 5),
    "an end of turn": add("tokenizer.ggml.eot_token_id", 5, Type.UINT32),
    "bos is not put before text": is_now("tokenizer.ggml.add_bos_token", False),
    "eos is put after text": is_now("tokenizer.ggml.add_eos_token", True),
    "a space is put before text": is_now("tokenizer.ggml.add_space_prefix", True),
    "spaces are removed": add("tokenizer.ggml.remove_extra_whitespaces", True, Type.BOOL),
    "pre-tokenizer of LLaMA 3": is_now("tokenizer.ggml.pre", "llama-bpe"),
    "pre-tokenizer of SmolLM": is_now("tokenizer.ggml.pre", "smollm"),
    "pre-tokenizer of Qwen 2": is_now("tokenizer.ggml.pre", "qwen2"),
    "pre-tokenizer that mptk does not know": is_now("tokenizer.ggml.pre", "deepseek-llm"),
    "pre-tokenizer missing": drop("tokenizer.ggml.pre"),
    "another kind of vocabulary": is_now("tokenizer.ggml.model", "llama"),
    "two merges swapped": swap(MERGES, 0, 1),
    "a merge less": field(MERGES, lambda merges: merges[:-1]),
    "merges missing": drop(MERGES),
    "chat template changed": field("tokenizer.chat_template", lambda text: text.replace("role", "name")),
    "chat template missing": drop("tokenizer.chat_template"),
    "a second chat template": add("tokenizer.chat_template.tool_use", "{{ messages }}", Type.STRING),
    "scores": add("tokenizer.ggml.scores", [0.0] * tiny.VOCAB, Type.ARRAY, Type.FLOAT32),
    "a field that nobody knows": add("rope.freq_bases", 5.0, Type.FLOAT32),
    "one number off by 1e-5": tensor(Q, at((3, 5), lambda x: x + 1e-5)),
    "one number off by the last bit": tensor(Q, at((3, 5), lambda x: np.nextafter(x, np.float32(9)))),
    "not a number": tensor("blk.1.ffn_up.weight", at((0, 0), lambda _: np.float32("nan"))),
    "rows of two tokens swapped": tensor(
        "token_embd.weight", lambda w: w[[*range(250), 251, 250, *range(252, len(w))]]
    ),
    "queries of another layer": exchange(Q, "blk.1.attn_q.weight"),
    "keys for values": exchange(K, V),
    "gate for up": exchange("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"),
    "norms in each other's place": exchange("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"),
    "rotated pairs not reordered": tensor(Q, unpaired),
    "heads in another order": tensor(Q, lambda w: np.roll(w, 32, axis=0)),
    "a matrix of zeros": tensor("blk.2.ffn_down.weight", np.zeros_like),
    "a norm missing": edit(lambda c: c.tensors.pop("blk.1.ffn_norm.weight")),
    "a bias more": edit(lambda c: c.tensors.update({"blk.0.attn_q.bias": (np.zeros(64, np.float32), Kind.F32)})),
    "another output matrix": edit(lambda c: c.tensors.update({"output.weight": c.tensors["token_embd.weight"]})),
    "a tensor renamed": edit(lambda c: c.tensors.update({"output_norms.weight": c.tensors.pop("output_norm.weight")})),
    "a matrix in half precision": tensor(Q, lambda w: w.astype(np.float16), Kind.F16),
    "a matrix in 4 bits": tensor("blk.0.ffn_up.weight", rounded(Kind.Q4_0), Kind.Q4_0),
    "rope factors × 2": tensor("rope_freqs.weight", lambda w: w * 2),
    "rope factors missing": edit(lambda c: c.tensors.pop("rope_freqs.weight")),
    "a byte less": lambda file: file.write_bytes(file.read_bytes()[:-64]) and None,
    "bytes more": lambda file: file.write_bytes(file.read_bytes() + bytes(64)) and None,
    "another version of the format": version(2),
    "no magic": lambda file: file.write_bytes(b"GGML" + file.read_bytes()[4:]) and None,
}
ROUNDED_ROWS: dict[str, Callable[[Path], None]] = {
    "a scale's last bit": tensor(Q, scale_bits(1)),
    "a scale × 2": tensor(Q, scale_bits(1 << 10)),
    "one number a step higher": tensor(Q, at((0, 5), lambda x: x + np.uint8(1))),
    "blocks in each other's place": tensor(Q, lambda s: np.concatenate([s[:, 34:], s[:, :34]], axis=1)),
    "a matrix rounded again in 4 bits": tensor(Q, lambda s: quantize(dequantize(s, Kind.Q8_0), Kind.Q4_0), Kind.Q4_0),
    "a norm in half precision": tensor("blk.0.ffn_norm.weight", lambda w: w.astype(np.float16), Kind.F16),
    "keys for values": exchange(K, V),
    "another file type": is_now("general.file_type", 2),
    "rope base × 1.1": times("rope.freq_base", 1.1),
}
SPACED_ROWS: dict[str, Callable[[Path], None]] = {
    "two scores swapped": swap("tokenizer.ggml.scores", 288, 289),
    "a score off": item("tokenizer.ggml.scores", 288, -1.5),
    "scores missing": drop("tokenizer.ggml.scores"),
    "a byte's type": item(TYPES, 60, 1),
    "the unknown token's type": item(TYPES, 0, 1),
    "no space before text": is_now("tokenizer.ggml.add_space_prefix", False),
    "another kind of vocabulary": is_now("tokenizer.ggml.model", "gpt2"),
    "another pre-tokenizer": is_now("tokenizer.ggml.pre", "gpt-2"),
    "merges": add(MERGES, ["a b"], Type.ARRAY, Type.STRING),
}
EXPERT_ROWS: dict[str, Callable[[Path], None]] = {
    "experts": times("expert_count", 2),
    "experts of a token": times("expert_used_count", 0.5),
    "an expert's size": times("expert_feed_forward_length", 2),
    "layers before the experts": add("leading_dense_block_count", 1, Type.UINT32),
    "shared experts": add("expert_shared_count", 1, Type.UINT32),
    "two experts swapped": tensor("blk.0.ffn_up_exps.weight", lambda w: w[[1, 0, 2, 3]]),
    "router": tensor("blk.0.ffn_gate_inp.weight", lambda w: w[[1, 0, 2, 3]]),
    "attention scale": times("attention.scale", 1.1),
    "embedding scale": times("embedding_scale", 1.1),
    "residual scale": times("residual_scale", 1.1),
    "logit scale": times("logit_scale", 1.1),
    "logit scale missing": drop("logit_scale"),
    "yarn factor": times("rope.scaling.factor", 2),
    "yarn's first length": times("rope.scaling.original_context_length", 2),
    "linear for yarn": is_now("rope.scaling.type", "linear"),
    "no scaling of rope": drop("rope.scaling.type"),
    "yarn's fast border": add("rope.scaling.yarn_beta_fast", 16.0, Type.FLOAT32),
}
KINDS = {PLAIN: PLAIN_ROWS, ROUNDED: ROUNDED_ROWS, SPACED: SPACED_ROWS, EXPERTS: EXPERT_ROWS}
ROWS = [Broken(kind, name, damage) for kind, rows in KINDS.items() for name, damage in rows.items()]


def publish(kind: str, place: Path) -> Published:
    """A pruned folder and its GGUF file, which ``verify`` compares."""
    name = "granitemoe" if kind == EXPERTS else "llama"
    model, dense = tiny.model(name), place / "dense"
    if kind == EXPERTS:
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
        model.config.rope_parameters = rope
    elif kind != SPACED:
        rope = tiny.LLAMA3["rope_parameters"]
        model.config.rope_parameters = rope
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(dense)
    (spaced() if kind == SPACED else byte_level()).save_pretrained(dense)
    settings = mptk.Settings(
        method="magnitude", data="random", samples=1, length=24, eval_windows=1, align=32, tolerance=1.0, onnx=False
    )
    cut = {"sparsity": 0.25} if kind == EXPERTS else {"widths": {"kv_groups": 1, "ffn": 64}}
    mptk.prune(str(dense), place / "out", settings, **cut)
    file = place / "out.gguf"
    api.gguf(place / "out", file, type="q8_0" if kind == ROUNDED else "auto")
    return Published(file, partial(mptk.verify, like=place / "out"))


def byte_level() -> PreTrainedTokenizerFast:
    """With every special token, a token of the user's and a chat template."""
    backend = tiny.tokenizer().backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    spec = json.loads(words.backend_tokenizer.to_str())
    last = max(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    words.add_tokens([AddedToken(last, special=False, normalized=False)])
    words.add_special_tokens({"unk_token": "<pad>"})
    return words


def spaced() -> PreTrainedTokenizerFast:
    """Of SentencePiece's kind: spaces are letters, unknown letters are bytes."""
    letters = sorted({*tiny.TEXT.replace(" ", "▁").replace("\n", "")})
    merges = [("t", "h"), ("th", "e"), ("▁", "q"), ("z", "y"), ("▁", "the"), ("o", "x")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *map("".join, merges)]
    words = words[: tiny.VOCAB]
    kept = [pair for pair in merges if "".join(pair) in words]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, kept, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.ByteFallback()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
