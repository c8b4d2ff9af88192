"""Model folders and GGUF files that are damaged, or meant to do harm."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from mptk.errors import ChangedError, FileError, InputError, ModelError
from mptk.features.gguf.prove import open_folder
from mptk.io import Resident, models
from tests.bad_inputs.table import BODIES, Prepare, Read, Row, changed, fifo, folder, link, refuse, remove, write


def build_skeleton(path: Path) -> object:
    """What ``analyze`` reads: the config, and no weights."""
    return models.build_skeleton(str(path))


def open_weights(path: Path) -> object:
    """What ``prune`` reads: the weights only when they are asked for."""
    loaded = models.open_weights(str(path), Resident(1 << 30))
    return loaded, loaded.load_all()


LOAD = Read(open_weights, "model")
ANALYZE = Read(build_skeleton, "model")
AS_GGUF = Read(lambda folder: open_folder(folder, folder.with_name("toy.gguf")), "pruned")
WEIGHTS, CONFIG, INDEX = "model/model.safetensors", "model/config.json", "model/model.safetensors.index.json"
OF_WEIGHTS, OF_CONFIG = f"{{{WEIGHTS}}}", f"{{{CONFIG}}}"


def with_header(header: bytes) -> Callable[[Path], bytes]:
    """A safetensors file with another header, before the file's own numbers."""
    return lambda path: struct.pack("<Q", len(header)) + header + path.read_bytes()[8 + read_size(path) :]


def read_size(path: Path) -> int:
    """How long the header of a safetensors file is."""
    return struct.unpack("<Q", path.read_bytes()[:8])[0]


def edited_header(edit: Callable[[dict], object]) -> Callable[[Path], bytes]:
    def made(path: Path) -> bytes:
        header = json.loads(path.read_bytes()[8 : 8 + read_size(path)])
        edit(header)
        return with_header(json.dumps(header).encode())(path)

    return made


def each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], bytes]:
    """The file's tensors, changed."""
    return lambda path: save({n: change(t) for n, t in load_file(path).items()}, {"format": "pt"})


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


FIRST = "model.layers.0.mlp.up_proj.weight"
DAMAGED = {
    "truncated": lambda path: path.read_bytes()[:-100],
    "empty": b"",
    "bit-flipped header": flipped,
    "header deep": with_header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "dtype unknown": edited_header(lambda h: h[FIRST].update(dtype="F31")),
    "offsets past the end": edited_header(lambda h: h[FIRST].update(data_offsets=[0, 1 << 50])),
    "shape negative": edited_header(lambda h: h[FIRST].update(shape=[-1, 48])),
    "shape another": edited_header(lambda h: h[FIRST].update(shape=[48, 64])),
    "a pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",
}

OTHER = {"shape another": FIRST}
LIKE = write("toy.gguf", Path.read_bytes)
"""A GGUF file as it should be."""
FILES = [
    *(
        refuse(f"weights {name}", LOAD, OTHER.get(name, OF_WEIGHTS), write(WEIGHTS, content))
        for name, content in DAMAGED.items()
    ),
    refuse("weights missing", LOAD, "{model}", remove(WEIGHTS)),
    refuse("weights a folder", LOAD, OF_WEIGHTS, remove(WEIGHTS), folder(WEIGHTS)),
    refuse("weights a fifo", LOAD, OF_WEIGHTS, remove(WEIGHTS), fifo(WEIGHTS)),
    refuse("only a pickle for weights", LOAD, "{model}", remove(WEIGHTS), write("model/pytorch_model.bin", b"\x80")),
    refuse(
        "weights of another width", LOAD, "model.layers.0.mlp.down_proj.weight", fields(CONFIG, intermediate_size=72)
    ),
    refuse(
        "weights lacking",
        LOAD,
        "{model}",
        write(WEIGHTS, lambda p: save({n: t for n, t in load_file(p).items() if "up_proj" not in n}, {"format": "pt"})),
    ),
    refuse(
        "weights of whole numbers", LOAD, "model.embed_tokens.weight", write(WEIGHTS, each(lambda t: t.to(torch.int32)))
    ),
    *(
        refuse(f"weights {name}, as GGUF", AS_GGUF, "model.safetensors", step, LIKE, kind=ChangedError)
        for name, step in {
            "truncated": write("pruned/model.safetensors", DAMAGED["truncated"]),
            "missing": remove("pruned/model.safetensors"),
        }.items()
    ),
    *(
        refuse(f"dense file {name}", AS_GGUF, "{toy.gguf}", write("toy.gguf", content))
        for name, content in {
            "truncated": lambda path: path.read_bytes()[:400],
            "of other bytes": b"GGUF" + b"\xff" * 400,
            "whose name is no text": lambda path: path.read_bytes().replace(b"Toy Of The Tests", b"\xff" * 16),
            "of another architecture": lambda path: path.read_bytes().replace(b"llama", b"lamas"),
        }.items()
    ),
    refuse("dense file is a folder", Read(lambda folder: open_folder(folder, folder), "pruned"), "{pruned}"),
    refuse("dense file missing", Read(lambda folder: open_folder(folder, "no.gguf"), "pruned"), "no.gguf"),
    refuse(
        "no tokenizer",
        Read(lambda folder: models.load_tokenizer(str(folder)), "model"),
        "{model}",
        *(remove(f"model/tokenizer{end}.json") for end in ("", "_config")),
    ),
    refuse(
        "config of a million labels", ANALYZE, OF_CONFIG, fields(CONFIG, id2label={str(i): "a" for i in range(10**6)})
    ),
    refuse("a model that is a text file", Read(build_skeleton, "text.raw"), "{text.raw}"),
    refuse("a model that is an empty folder", Read(build_skeleton, "empty"), "{empty}", folder("empty")),
    refuse("a model that is a fifo", Read(build_skeleton, "pipe"), "{pipe}", fifo("pipe")),
    refuse("a model that is not there", Read(build_skeleton, "nowhere"), "{nowhere}"),
    *(
        refuse(f"model {name[:20]!r}", Read(lambda _, name=name: models.build_skeleton(name), "."), name, kind=kind)
        for kind, names in {InputError: ("", "n" * 300, "a\0b"), FileError: ("~nobody-here/model", "-")}.items()
        for name in names
    ),
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


TOO_LARGE = {
    "hidden_size": 10**12,
    "num_hidden_layers": 10**7,
    "intermediate_size": 10**15,
    "vocab_size": 10**13,
    "rms_norm_eps": 1e400,
}
"""Numbers of a config that its reader refuses."""
TOO_SMALL = {
    "hidden_size": (0,),
    "num_attention_heads": (-6,),
    "num_hidden_layers": (-1,),
    "intermediate_size": (0, -64),
    "vocab_size": (0, -1),
    "max_position_embeddings": (0, -5),
}
"""Numbers that an error names by their field."""


def of_config(name: str, value: object) -> Row:
    kind, about = ModelError, "{model}"
    if name in ("architectures", "torch_dtype") or (name in TOO_LARGE and value == TOO_LARGE[name]):
        kind, about = FileError, OF_CONFIG
    elif value in TOO_SMALL.get(name, ()):
        about = name
    elif name == "transformers_weights":
        kind = FileError
    reader = LOAD if name in WEIGHED else ANALYZE
    step = fields(CONFIG, **{name: value})
    return refuse(f"config {name} {json.dumps(value)[:24]}", reader, about, step, kind=kind)


WEIGHED = ("quantization_config", "transformers_weights", "torch_dtype", "tie_word_embeddings")
CONFIGS = [
    *(of_config(name, value) for name, values in NUMBERS.items() for value in values),
    *(
        refuse(f"config {name}", ANALYZE, OF_CONFIG, write(CONFIG, content))
        for name, content in BODIES.items()
        if name != "of NaN"  # which a config may have
    ),
    refuse("config of more layers than weights", ANALYZE, OF_CONFIG, fields(CONFIG, num_hidden_layers=9999)),
    refuse("config a folder", ANALYZE, "{model}", remove(CONFIG), folder(CONFIG)),
    refuse("config a fifo", ANALYZE, OF_CONFIG, remove(CONFIG), fifo(CONFIG)),
    refuse("config missing", ANALYZE, "{model}", remove(CONFIG)),
    refuse(
        "generation config no JSON", LOAD, "{model/generation_config.json}", write("model/generation_config.json", "{")
    ),
    *(
        refuse(f"adapter {name}", reader, "{model}", write("model/adapter_config.json", content), kind=ModelError)
        for name, reader, content in (
            ("of a base", LOAD, '{"peft_type": "LORA", "base_model_name_or_path": "x"}'),
            ("of none", LOAD, '{"peft_type": "LORA"}'),
            ("analysed", ANALYZE, "{}"),
        )
    ),
]


TOKENIZERS = [
    refuse(f"tokenizer {name}", LOAD, "{model}", step, kind=ModelError)
    for name, step in {
        "no JSON": write("model/tokenizer.json", "{"),
        "of a magic model": changed("model/tokenizer.json", lambda c: c["model"].update(type="Magic")),
        "config null": write("model/tokenizer_config.json", "null"),
    }.items()
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

    return (write(INDEX, made), moved)


SHARDS = [
    *(
        refuse(f"shards {name}", LOAD, f"{{{INDEX}}}", *index(names))
        for name, names in {
            "outside": "../outside.safetensors",
            "absolute": "/etc/passwd",
            "in a folder below": "a/../../outside.safetensors",
            "that are not there": "none.safetensors",
            "of a name of 300 characters": "n" * 300,
            "of a list": [1],
        }.items()
    ),
    refuse("shards index no JSON", LOAD, f"{{{INDEX}}}", write(INDEX, "{")),
    refuse("weights a link outside", LOAD, OF_WEIGHTS, write("other/weights", b"x"), link(WEIGHTS, "other/weights")),
    refuse(
        "config a link outside", ANALYZE, OF_CONFIG, write("other/config.json", "{}"), link(CONFIG, "other/config.json")
    ),
    refuse("licence a link outside", LOAD, "{model/LICENSE}", link("model/LICENSE", "/etc/hostname")),
    refuse("card a link outside", ANALYZE, "{model/README.md}", link("model/README.md", "/etc/hostname")),
    refuse("folder a link outside", ANALYZE, "{model/1_Pooling}", link("model/1_Pooling", "/etc")),
    refuse("a link in a circle", ANALYZE, OF_CONFIG, link(CONFIG, CONFIG)),
]


def gguf(content: bytes | Callable[[bytes], bytes]) -> Prepare:
    return write("toy.gguf", lambda path: content(path.read_bytes()) if callable(content) else content)


def poked(offset: int, kind: str, value: int) -> Callable[[bytes], bytes]:
    return lambda old: old[:offset] + struct.pack(kind, value) + old[offset + struct.calcsize(kind) :]


READ_GGUF = Read(lambda file: models.load_config(str(file)), "toy.gguf")
GGUF = [
    *(
        refuse(f"gguf {name}", READ_GGUF, "{toy.gguf}", gguf(content), kind=kind)
        for kind, contents in {
            FileError: {
                "of four bytes": b"GGUF",
                "of 2^60 tensors": poked(8, "<Q", 1 << 60),
                "of 2^60 fields": poked(16, "<Q", 1 << 60),
            },
            ModelError: {
                "of another version": poked(4, "<I", 99),
                "truncated in the tokens": lambda old: old[:1500],
                "truncated in the weights": lambda old: old[:-5000],
            },
        }.items()
        for name, content in contents.items()
    ),
    *(
        refuse(f"gguf {name}", replace(READ_GGUF, path="x.gguf"), "{x.gguf}", *steps)
        for name, steps in {"a folder": (folder("x.gguf"),), "a fifo": (fifo("x.gguf"),), "missing": ()}.items()
    ),
]

ROWS = [*FILES, *CONFIGS, *TOKENIZERS, *SHARDS, *GGUF]
