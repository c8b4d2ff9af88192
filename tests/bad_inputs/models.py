"""Model folders and GGUF files that are damaged, or meant to do harm."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from tests.bad_inputs.shared import SHORT
from tests.bad_inputs.table import BODIES, Prepare, Row, changed, fifo, folder, link, remove, write

PRUNE = f"prune {{model}} --data {{text.raw}} --out {{out}} {SHORT}"
ANALYZE = "analyze {model}"
AS_GGUF = "gguf {pruned} --like {toy.gguf} --out {out.gguf}"
EXPORT = "export {model} --out {out}"
MEASURE = "eval {model} --data {text.raw} --windows 2 --length 16"
WEIGHTS = "model/model.safetensors"


def with_header(header: object | bytes, length: int | None = None) -> Callable[[Path], bytes]:
    """A safetensors file with another header, before the file's own numbers."""

    def made(path: Path) -> bytes:
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        new = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(new) if length is None else length) + new + content[8 + size :]

    return made


def header_of(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def edited_header(edit: Callable[[dict], object]) -> Callable[[Path], bytes]:
    def made(path: Path) -> bytes:
        header = header_of(path)
        edit(header)
        return with_header(header)(path)

    return made


def each(change: Callable[[torch.Tensor], torch.Tensor], only: str = "") -> Callable[[Path], bytes]:
    """The file's tensors, changed."""

    def made(path: Path) -> bytes:
        return save({n: change(t) if only in n else t for n, t in load_file(path).items()}, {"format": "pt"})

    return made


def flipped(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[20] ^= 0x40
    return bytes(content)


def fields(name: str, **values: object) -> Prepare:
    """Other values in a JSON file; None removes one."""

    def edit(content: dict) -> None:
        for key, value in values.items():
            content.pop(key, None) if value is None else content.update({key: value})

    return changed(name, edit)


def one_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[3] = value
        return changed

    return change


FIRST = "model.layers.0.mlp.up_proj.weight"
DAMAGED = {
    "truncated": lambda path: path.read_bytes()[:-100],
    "truncated in the header": lambda path: path.read_bytes()[:50],
    "empty": b"",
    "of seven bytes": b"1234567",
    "bit-flipped header": flipped,
    "header of 2^63": with_header({}, 1 << 63),
    "header of 2^64 - 1": with_header({}, (1 << 64) - 1),
    "header past the end": with_header({}, 1 << 40),
    "header no JSON": with_header(b"{" * 64),
    "header deep": with_header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "header a list": with_header([1, 2]),
    "dtype unknown": edited_header(lambda h: h[FIRST].update(dtype="F31")),
    "dtype mismatch": edited_header(lambda h: h[FIRST].update(dtype="F64")),
    "offsets past the end": edited_header(lambda h: h[FIRST].update(data_offsets=[0, 1 << 50])),
    "offsets reversed": edited_header(lambda h: h[FIRST].update(data_offsets=[64, 0])),
    "shape negative": edited_header(lambda h: h[FIRST].update(shape=[-1, 48])),
    "shape huge": edited_header(lambda h: h[FIRST].update(shape=[1 << 40, 1 << 40])),
    "shape another": edited_header(lambda h: h[FIRST].update(shape=[48, 64])),
    "a pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",
}

TRUNCATED = write(WEIGHTS, DAMAGED["truncated"])
FILES = [
    *(
        Row(f"weights {name}", PRUNE, ("model.safetensors",), (write(WEIGHTS, content),))
        for name, content in DAMAGED.items()
    ),
    Row("weights missing", PRUNE, ("no safetensors weights",), (remove(WEIGHTS),)),
    Row("weights a folder", PRUNE, ("model",), (remove(WEIGHTS), folder(WEIGHTS))),
    Row("weights a fifo", PRUNE, ("not an ordinary file",), (remove(WEIGHTS), fifo(WEIGHTS))),
    Row(
        "weights a pickle alone",
        PRUNE,
        ("a pickle, which can run code",),
        (remove(WEIGHTS), write("model/pytorch_model.bin", b"\x80")),
    ),
    Row("weights of another width", PRUNE, ("model",), (fields("model/config.json", intermediate_size=72),)),
    Row(
        "weights lacking",
        PRUNE,
        ("no weights for",),
        (
            write(
                WEIGHTS, lambda p: save({n: t for n, t in load_file(p).items() if "up_proj" not in n}, {"format": "pt"})
            ),
        ),
    ),
    Row("weights all zero", PRUNE, ("zero",), (write(WEIGHTS, each(torch.zeros_like)),)),
    Row("weights times 1e30", PRUNE, ("are all zero",), (write(WEIGHTS, each(lambda t: t * 1e30)),)),
    Row("weights with infinity", PRUNE, ("finite", FIRST), (write(WEIGHTS, each(one_value(float("inf")), FIRST)),)),
    Row(
        "weights with NaN, exported", EXPORT, ("finite", FIRST), (write(WEIGHTS, each(one_value(float("nan")), FIRST)),)
    ),
    Row("weights with NaN, measured", MEASURE, ("finite",), (write(WEIGHTS, each(one_value(float("nan")), FIRST)),)),
    Row("weights truncated, measured", MEASURE, ("model",), (TRUNCATED,)),
    Row("weights truncated, timed", "bench {model}", ("model",), (TRUNCATED,)),
    Row("weights truncated, exported", EXPORT, ("model",), (TRUNCATED,)),
    Row(
        "weights truncated, as GGUF",
        AS_GGUF,
        ("was changed since it was published",),
        (write("pruned/model.safetensors", DAMAGED["truncated"]),),
    ),
    Row("weights missing, as GGUF", AS_GGUF, ("model.safetensors is missing",), (remove("pruned/model.safetensors"),)),
    Row("dense file truncated", AS_GGUF, ("is damaged",), (write("toy.gguf", lambda path: path.read_bytes()[:400]),)),
    Row("dense file of other bytes", AS_GGUF, ("is damaged",), (write("toy.gguf", b"GGUF" + b"\xff" * 400),)),
    Row(
        "dense file whose name is no text",
        AS_GGUF,
        ("is damaged",),
        (write("toy.gguf", lambda path: path.read_bytes().replace(b"Toy Of The Tests", b"\xff" * 16)),),
    ),
    Row(
        "dense file of another architecture",
        AS_GGUF,
        ("holds a lamas model",),
        (write("toy.gguf", lambda path: path.read_bytes().replace(b"llama", b"lamas")),),
    ),
    Row("dense file is a folder", "gguf {pruned} --like {model} --out {out.gguf}", ("is not a GGUF file",)),
    Row("dense file missing", "gguf {pruned} --like {no.gguf} --out {out.gguf}", ("no.gguf",)),
    Row("output replaces the dense file", "gguf {pruned} --like {toy.gguf} --out {toy.gguf}", ("what is read",)),
    Row("output named otherwise", "gguf {pruned} --like {toy.gguf} --out {out.bin}", (".gguf",), code=2),
    Row("weights truncated, estimated", f"{PRUNE} --estimate", ("model",), (TRUNCATED,)),
    Row("weights of whole numbers", PRUNE, ("model",), (write(WEIGHTS, each(lambda t: t.to(torch.int32))),)),
    Row(
        "no tokenizer",
        PRUNE,
        ("no tokenizer",),
        tuple(remove(f"model/{n}") for n in ("tokenizer.json", "tokenizer_config.json")),
    ),
    Row(
        "config of a million labels",
        ANALYZE,
        ("config.json", "MB"),
        (fields("model/config.json", id2label={str(i): "a" for i in range(10**6)}),),
    ),
    Row("a model that is a text file", "analyze {text.raw}", ("neither a checkpoint folder",)),
    Row("a model that is an empty folder", "analyze {empty}", ("no config.json",), (folder("empty"),)),
    Row("a model that is a fifo", "analyze {pipe}", ("neither a checkpoint folder",), (fifo("pipe"),)),
    Row("a model that is not there", "analyze {nowhere}", ("nowhere", "check the name")),
    Row("a model without a name", "analyze ", ("''",)),
    Row("a model of 300 characters", f"analyze {'n' * 300}", ("nnn",)),
    Row("a model in the home of nobody", "analyze ~nobody-here/model", ("~nobody-here/model", "check the name")),
    Row("a model named dash", "analyze -", ("'-'",)),
    Row("a model named with a null", "analyze a\0b", ("cannot be a model's name",)),
]

NUMBERS = {
    "hidden_size": (0, -1, 10**12, 47, "48", [48], 1e300, None),
    "num_attention_heads": (0, -6, 5, 10**9, "six"),
    "num_key_value_heads": (0, -2),
    "num_hidden_layers": (-1, 10**7, "two", 1.5),
    "intermediate_size": (0, -64, 10**15),
    "vocab_size": (0, -1, 10**13),
    "max_position_embeddings": (0, -5, "many"),
    "rms_norm_eps": ("tiny", 1e400),
    "head_dim": (0, 15, -16),
    "hidden_act": ("magic", 7),
    "rope_parameters": ({"rope_type": "magic"}, [1], 7),
    "architectures": ("LlamaForCausalLM", [7]),
    "model_type": ("magic", 7, "[/x]", "", None),
    "torch_dtype": ("float99", 7),
    "quantization_config": ({"quant_method": "magic"}, {}, {"quant_method": "[/x]"}, 7, {"quant_method": 7}),
    "auto_map": (7,),
    "tie_word_embeddings": ("perhaps",),
    "transformers_weights": ("../other.safetensors", 7),
}


def of_config(name: str, value: object) -> Row:
    line = PRUNE if name in WEIGHED else ANALYZE
    return Row(
        f"config {name} {json.dumps(value)[:24]}", line, ("model",), (fields("model/config.json", **{name: value}),)
    )


def adapter(content: str) -> Prepare:
    return write("model/adapter_config.json", content)


WEIGHED = ("quantization_config", "transformers_weights", "torch_dtype", "tie_word_embeddings")
CONFIGS = [
    *(of_config(name, value) for name, values in NUMBERS.items() for value in values),
    *(
        Row(f"config {name}", ANALYZE, ("config.json",), (write("model/config.json", content),))
        for name, content in BODIES.items()
        if name != "of NaN"  # which a config may have
    ),
    Row(
        "config of more layers than weights",
        ANALYZE,
        ("num_hidden_layers is 9999, and there are",),
        (fields("model/config.json", num_hidden_layers=9999),),
    ),
    Row(
        "config whose class says why in a second line",
        ANALYZE,
        ("field 'num_attention_heads': TypeError: Field 'num_attention_heads' expected int, got str",),
        (fields("model/config.json", num_attention_heads="five"),),
    ),
    Row("config a folder", ANALYZE, ("no config.json",), (remove("model/config.json"), folder("model/config.json"))),
    Row("config a fifo", ANALYZE, ("config.json",), (remove("model/config.json"), fifo("model/config.json"))),
    Row("config missing", ANALYZE, ("no config.json",), (remove("model/config.json"),)),
    Row("generation config no JSON", PRUNE, ("generation_config.json",), (write("model/generation_config.json", "{"),)),
    Row(
        "adapter beside the model",
        PRUNE,
        ("adapter_config.json",),
        (adapter('{"peft_type": "LORA", "base_model_name_or_path": "x"}'),),
    ),
    Row("adapter beside the model, measured", MEASURE, ("adapter_config.json",), (adapter('{"peft_type": "LORA"}'),)),
    Row("adapter beside the model, analysed", ANALYZE, ("adapter_config.json",), (adapter("{}"),)),
]


def tokens(edit: Callable[[dict], object]) -> Prepare:
    return changed("model/tokenizer.json", edit)


def beyond(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    for token in vocabulary:
        if len(token) == 1:
            vocabulary[token] += 5000


TOKENIZERS = [
    Row("tokenizer ids beyond the vocabulary", PRUNE, ("vocabulary", "300"), (tokens(beyond),)),
    Row("tokenizer ids beyond the vocabulary, measured", MEASURE, ("vocabulary", "300"), (tokens(beyond),)),
    Row("tokenizer empty", PRUNE, ("model",), (write("model/tokenizer.json", ""),)),
    Row("tokenizer no JSON", PRUNE, ("model",), (write("model/tokenizer.json", "{"),)),
    Row("tokenizer a list", PRUNE, ("model",), (write("model/tokenizer.json", "[]"),)),
    Row("tokenizer without a model", PRUNE, ("model",), (tokens(lambda c: c.pop("model")),)),
    Row("tokenizer of a magic model", PRUNE, ("model",), (tokens(lambda c: c["model"].update(type="Magic")),)),
    Row("tokenizer deep", PRUNE, ("model",), (write("model/tokenizer.json", '{"a":' * 50_000),)),
    Row("tokenizer config no JSON", PRUNE, ("model",), (write("model/tokenizer_config.json", "{"),)),
    Row("tokenizer config null", PRUNE, ("model",), (write("model/tokenizer_config.json", "null"),)),
]


def index(names: object) -> tuple[Prepare, ...]:
    def made(path: Path) -> str:
        keys = load_file(path.with_name("model.safetensors"))
        weight_map = dict.fromkeys(keys, names) if isinstance(names, str) else names
        return json.dumps({"metadata": {}, "weight_map": weight_map})

    def moved(place: object) -> None:
        file = place["model"] / "model.safetensors"
        (place.root / "outside.safetensors").hardlink_to(file)
        file.rename(file.with_name("part.safetensors"))

    return (write("model/model.safetensors.index.json", made), moved)


SHARDS = [
    Row(
        "shards outside", PRUNE, ("../outside.safetensors", "is outside of its folder"), index("../outside.safetensors")
    ),
    Row("shards absolute", PRUNE, ("/etc/passwd", "is outside of its folder"), index("/etc/passwd")),
    Row("shards in a folder below", PRUNE, ("is outside of its folder",), index("a/../../outside.safetensors")),
    Row("shards that are not there", PRUNE, ("none.safetensors, which does not exist",), index("none.safetensors")),
    Row("shards of a name of 300 characters", PRUNE, ("which does not exist",), index("n" * 300)),
    Row("shards of a number", PRUNE, ("weight_map",), index({"a": 7})),
    Row("shards of a list", PRUNE, ("weight_map",), index([1])),
    Row("shards index no JSON", PRUNE, ("index.json", "not JSON"), (write("model/model.safetensors.index.json", "{"),)),
    Row(
        "weights a link outside",
        PRUNE,
        ("is a link to", "outside of its folder"),
        (write("other/model.safetensors", b"x"), link(WEIGHTS, "other/model.safetensors")),
    ),
    Row(
        "config a link outside",
        ANALYZE,
        ("is a link to",),
        (write("other/config.json", "{}"), link("model/config.json", "other/config.json")),
    ),
    Row(
        "licence a link outside",
        PRUNE,
        ("LICENSE is a link to /etc/hostname",),
        (link("model/LICENSE", "/etc/hostname"),),
    ),
    Row(
        "card a link outside",
        ANALYZE,
        ("README.md is a link to /etc/hostname",),
        (link("model/README.md", "/etc/hostname"),),
    ),
    Row("folder a link outside", ANALYZE, ("1_Pooling is a link to /etc",), (link("model/1_Pooling", "/etc"),)),
    Row(
        "a link in a circle", ANALYZE, ("config.json", "in a circle"), (link("model/config.json", "model/config.json"),)
    ),
]


def gguf(content: bytes | Callable[[bytes], bytes]) -> Prepare:
    return write("toy.gguf", lambda path: content(path.read_bytes()) if callable(content) else content)


def poked(offset: int, kind: str, value: int) -> Callable[[bytes], bytes]:
    return lambda old: old[:offset] + struct.pack(kind, value) + old[offset + struct.calcsize(kind) :]


GGUF = [
    *(
        Row(f"gguf {name}", "analyze {toy.gguf}", ("toy.gguf",), (gguf(content),))
        for name, content in {
            "empty": b"",
            "of four bytes": b"GGUF",
            "of another magic": poked(0, "<I", 7),
            "of another version": poked(4, "<I", 99),
            "of 2^60 tensors": poked(8, "<Q", 1 << 60),
            "of 2^60 fields": poked(16, "<Q", 1 << 60),
            "with a key of 2^62 bytes": poked(24, "<Q", 1 << 62),
            "truncated in the header": lambda old: old[:200],
            "truncated in the tokens": lambda old: old[:1500],
            "of zeros": lambda old: old[:24] + bytes(len(old) - 24),
            "no gguf at all": b"{}" * 500,
        }.items()
    ),
    Row(
        "gguf truncated in the weights",
        PRUNE.replace("{model}", "{toy.gguf}"),
        ("toy.gguf",),
        (gguf(lambda old: old[:-5000]),),
    ),
    Row("gguf a folder", "analyze {x.gguf}", ("there is no file",), (folder("x.gguf"),)),
    Row("gguf a fifo", "analyze {x.gguf}", ("there is no file",), (fifo("x.gguf"),)),
    Row("gguf missing", "analyze {x.gguf}", ("there is no file", "check the path")),
]

ROWS = [*FILES, *CONFIGS, *TOKENIZERS, *SHARDS, *GGUF]
