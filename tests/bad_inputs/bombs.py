"""Small files that stand for huge ones: counts, sizes and nestings that a reader must not believe; templates that reach out."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from mptk.errors import DataError, ModelError
from mptk.io.data import load_evaluation_windows
from tests.bad_inputs.data import measure_on
from tests.bad_inputs.models import LOAD, OF_WEIGHTS, READ_GGUF, gguf
from tests.bad_inputs.table import Prepare, Read, refuse, write

# ---- GGUF ----


def header(fields: bytes, count: int = 1, tensors: int = 0) -> bytes:
    """A GGUF file of version 3 with these fields."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + fields


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


ARRAY, STRING, UINT8 = 9, 8, 0
LLAMA = text("general.architecture") + struct.pack("<I", STRING) + text("llama") + text("w")
"""The field that every file has, and the name of a tensor."""
GGUFS = {
    "an array of 2^60 bytes": header(text("a") + struct.pack("<IIQ", ARRAY, UINT8, 1 << 60)),
    "an array of 2^40 empty words": header(text("a") + struct.pack("<IIQ", ARRAY, STRING, 1 << 40) + bytes(4096)),
    "arrays in arrays, 100,000 deep": header(
        text("a") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 100_000
    ),
    "a string of 2^61 bytes": header(text("a") + struct.pack("<IQ", STRING, 1 << 61)),
    "a tensor of 2^60 numbers": header(LLAMA + struct.pack("<IQQIQ", 2, 1 << 30, 1 << 30, 0, 0), tensors=1),
    "a tensor of 2^32 dimensions": header(LLAMA + struct.pack("<I", 0xFFFFFFFF), tensors=1),
    "a tensor that starts beyond the file": header(LLAMA + struct.pack("<IQIQ", 1, 32, 0, 1 << 50), tensors=1),
    "a key that stands twice": header((text("a") + struct.pack("<IB", UINT8, 1)) * 2, count=2),
    "an alignment of 0": header(text("general.alignment") + struct.pack("<II", 4, 0)),
}

# ---- safetensors ----


def weights(entries: dict[str, object], size: int | None = None, data: bytes = b"") -> Prepare:
    made = json.dumps(entries).encode()
    return write("model/model.safetensors", struct.pack("<Q", len(made) if size is None else size) + made + data)


def entry(shape: list[int], end: int, dtype: str = "F32", start: int = 0) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "a header of 2^63 bytes": weights({}, size=1 << 63),
    "a header of 100 GB": weights({}, size=100 << 30),
    "2^60 numbers": weights({"w": entry([1 << 30, 1 << 30], 1 << 62)}),
    "sizes whose product overflows": weights({"w": entry([1 << 33, 1 << 33], 16)}, data=bytes(16)),
    "weights that share bytes": weights({"a": entry([4], 16), "b": entry([4], 16)}, data=bytes(16)),
    "a hole between weights": weights({"a": entry([1], 4), "b": entry([1], 12, start=8)}, data=bytes(12)),
    "a negative size": weights({"w": entry([-1], 4)}, data=bytes(4)),
    "a type that there is not": weights({"w": entry([1], 4, "F7")}, data=bytes(4)),
}

# ---- archives ----


def zipped(lines: bytes, times: int) -> Callable[[Path], bytes]:
    """``lines`` so many times, as gzip: 1 MB stands for about 1 GB."""

    def made(_: Path) -> bytes:
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        return b"".join(packer.compress(lines) for _ in range(times)) + packer.flush()

    return made


# ---- chat templates ----

# Others: tests/io/test_chat_templates.py
ESCAPES = {
    "reads a file": "{{ cycler.__init__.__globals__.os.popen('touch {place}').read() }}",
    "changes the messages": "{% for n in range(3) %}{{ messages.append(1) }}{% endfor %}",
    "reads config of a function": "{{ raise_exception.__globals__ }}",
}


def read_chats(model: Path) -> None:
    """Chats in the template of a model, for it to be measured on."""
    load_evaluation_windows(AutoTokenizer.from_pretrained(model), str(model.with_name("t.jsonl")), 16, 2)


CHAT = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n' * 40

ROWS = [
    *(
        refuse(f"gguf with {name}", READ_GGUF, "{toy.gguf}", gguf(made), kind=ModelError)
        for name, made in GGUFS.items()
    ),
    *(refuse(f"weights with {name}", LOAD, OF_WEIGHTS, made) for name, made in HEADERS.items()),
    *(
        refuse(
            f"chat template that {name}",
            Read(read_chats, "model"),
            "{t.jsonl}" if "raise" in said else "a chat of {t.jsonl}",
            write("model/chat_template.jinja", said),
            write("t.jsonl", CHAT),
            kind=DataError,
        )
        for name, said in ESCAPES.items()
    ),
    *(
        refuse(f"gzip of 256 MB, {name}", Read(measure_on, name), f"{{{name}}}", write(name, zipped(start, 256)))
        for name, start in {"t.txt.gz": b"x" * (1 << 20), "t.jsonl.gz": b'{"text": "' + b"x" * (1 << 20)}.items()
    ),
]
