"""Text that cannot be read, and text that is longer than a model's positions."""

from __future__ import annotations

import gzip
from functools import cache, partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

import mptk
from mptk.errors import DataError, FileError, InputError, OutputError
from mptk.io.data import load_evaluation_windows
from mptk.ort.generation import TextGenerator, encode_prompts
from mptk.tasks.module import read_inputs
from mptk.testing import make_tokenizer
from tests.bad_inputs.table import Prepare, Read, Row, fifo, folder, link, write


@cache
def share_tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


def measure_on(text: object, more: str = "") -> torch.Tensor:
    """The windows of a text that models are measured on. ``more``: what stands behind its name."""
    return load_evaluation_windows(share_tokenizer(), f"{text}{more}", 16, 2)


FILES: dict[str, dict[str, str | bytes | tuple[str | bytes, type[Exception]]]] = {
    "text.raw": {
        "empty": ("", DataError),
        "blank": (" \n" * 50, DataError),
        "not UTF-8": b"caf\xe9 " * 500,
        "binary": bytes(range(256)) * 50,
        "UTF-16": ("some words " * 400).encode("utf-16"),
    },
    "t.jsonl": {
        "empty": ("", DataError),
        "of one brace": "{",
        "of numbers": "1\n2\n",
        "of null": "null\n",
        "of empty rows": ("{}\n{}\n", DataError),
        "without text": ('{"n": 1}\n', DataError),
        "of two columns": ('{"a": "x", "b": "y"}\n', DataError),
        "of changing kinds": ('{"text": "x"}\n{"text": 7}\n{"text": [1]}\n', DataError),
        "not UTF-8": b'{"text": "\xff"}\n',
        "binary": bytes(range(256)) * 9,
        "deep": '{"text":' * 9000 + "1" + "}" * 9000,
        "of chats": ('{"messages": [{"role": "user", "content": "hi"}]}\n', DataError),
    },
    "t.json": {"empty": ("", DataError), "null": "null", "deep": "[" * 50_000},
    "t.csv": {
        "empty": ("", DataError),
        "of one line": ("a\n", DataError),
        "ragged": 'text\n"a,b\n1,2,3,4\n',
        "binary": bytes(range(256)) * 9,
    },
    "t.parquet": {"empty": (b"", DataError), "no parquet": b"PAR1xxxxPAR1", "text": "x" * 99},
    "t.jsonl.gz": {
        "no gzip": b"xxxx",
        "truncated": gzip.compress(b'{"text": "a few words"}\n' * 900)[:15],
    },
}
"""Name → content, by what it is; with the error's class, if it is no FileError."""


def read_files() -> list[Row]:
    found = []
    for name, contents in FILES.items():
        for kind, each in contents.items():
            content, error = each if isinstance(each, tuple) else (each, FileError)
            found.append(Row(f"{name} {kind}", Read(measure_on, name), error, f"{{{name}}}", (write(name, content),)))
    return found


def refuse_name(name: str, text: str, kind: type[Exception] = FileError, about: str | None = None) -> Row:
    return Row(name, Read(lambda _: measure_on(text), "."), kind, text if about is None else about)


def refuse_file(name: str, file: str, kind: type[Exception], *prepare: Prepare, more: str = "", about: str = "") -> Row:
    return Row(name, Read(partial(measure_on, more=more), file), kind, about or f"{{{file}}}", prepare)


SOURCES = [
    refuse_file("text of three words", "t.txt", DataError, write("t.txt", "a few words"), about="data"),
    refuse_file("text that is not there", "none.raw", FileError),
    refuse_name("text in the home of nobody", "~nobody-here/text"),
    refuse_name("text of 300 characters", "n" * 300),
    refuse_name("text without a name", "", InputError, "data"),
    refuse_name("text named with a null", "a\0b"),
    refuse_name("text of /dev/zero", "/dev/zero"),
    refuse_name("text of markup", "[/x]"),
    refuse_name("text of too many colons", "a:b:c:d:e:f", InputError, "data"),
    refuse_name("text of its own beside a file", "self=0.5,a.txt", InputError, "data"),
    refuse_name("text the model writes, to measure on", "self", InputError, "data"),
    refuse_file("text a fifo", "pipe", FileError, fifo("pipe")),
    refuse_file("text a fifo with a column", "pipe", FileError, fifo("pipe"), more=":text"),
    refuse_file("text an empty folder", "d", DataError, folder("d")),
    refuse_file("text a folder of binaries", "d", DataError, write("d/a.bin", bytes(99))),
    refuse_file("text a link in a circle", "circle", FileError, link("circle", "circle")),
    refuse_file(
        "text of a column that is not there", "t.jsonl", DataError, write("t.jsonl", '{"text": "x"}\n'), more=":wings"
    ),
    refuse_file("text of a column of a plain file", "text.raw", DataError, more=":wings"),
    *(
        refuse_file(f"text of weight {weight}", "text.raw", InputError, more=f"={weight}", about="data")
        for weight in ("0", "nan", "inf", "-1", "much")
    ),
]

READ = "prune {model} --method magnitude --no-onnx --out {pruned} --length 16 --samples 2 --overwrite"
NOTES = write("pruned/notes.txt", "some words " * 400)
REPLACED = [
    Row(
        "text in the folder that is replaced", f"{READ} --data {{pruned/notes.txt}}", OutputError, "{pruned}", (NOTES,)
    ),
    Row(
        "text to measure on in the folder that is replaced",
        f"{READ} --data {{text.raw}} --eval-data {{pruned/notes.txt}}=2",
        OutputError,
        "{pruned}",
        (NOTES,),
    ),
]

LINE = ("abcdefghijklmnop" * 64).encode() * 51_200
"""50 MB without a space or a line end."""

POSITIONS = [
    Row(
        "prompt longer than the positions",
        Read(lambda folder: fit(folder, "x" * 40, 8), "gpt2"),
        InputError,
        "prompts",
    ),
    Row(
        "answer longer than the positions",
        Read(lambda folder: fit(folder, "hi", 64), "gpt2"),
        InputError,
        "max_new_tokens",
    ),
    Row("empty prompt", Read(lambda folder: fit(folder, "", 8), "gpt2"), InputError, "prompts"),
    Row(
        "prompt of a chat",
        Read(lambda _: encode_prompts(share_tokenizer(), ["hi"], chat=True), "."),
        InputError,
        "chat",
    ),
    Row(
        "cache longer than the positions",
        Read(lambda folder: mptk.bench([folder], lengths=(16,)), "gpt2"),
        InputError,
        "16 tokens (and one more after a cache) of {gpt2}",
    ),
]

INPUTS = [
    Row(
        f"inputs that are {name}",
        Read(read_inputs, file),
        FileError,
        f"{{{file}}}",
    )
    for name, file in {"not there": "no.safetensors", "text": "text.raw"}.items()
]


def fit(folder: Path, prompt: str, tokens: int) -> None:
    """Generate text after a prompt."""
    runner = TextGenerator(folder)
    list(runner.stream(encode_prompts(runner.tokenizer, [prompt], chat=False), limit=tokens))


ROWS = [*INPUTS, *read_files(), *SOURCES, *REPLACED, *POSITIONS]
