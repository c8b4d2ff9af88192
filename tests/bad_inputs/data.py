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
from tests.bad_inputs.table import Prepare, Read, Row, fifo, folder, link, refuse, write


@cache
def share_tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


def measure_on(text: object, more: str = "") -> torch.Tensor:
    """The windows of a text that models are measured on. ``more``: what stands behind its name."""
    return load_evaluation_windows(share_tokenizer(), f"{text}{more}", 16, 2)


FILES: dict[str, dict[str, str | bytes | tuple[str | bytes, type[Exception]]]] = {
    "text.raw": {"empty": ("", DataError), "blank": (" \n" * 50, DataError), "not UTF-8": b"caf\xe9 " * 500},
    "t.jsonl": {
        "empty": ("", DataError),
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
    "t.json": {"deep": "[" * 50_000},
    "t.csv": {"of one line": ("a\n", DataError), "ragged": 'text\n"a,b\n1,2,3,4\n'},
    "t.parquet": {"empty": (b"", DataError), "no parquet": b"PAR1xxxxPAR1"},
    "t.jsonl.gz": {"truncated": gzip.compress(b'{"text": "a few words"}\n' * 900)[:15]},
}
"""Name → content, by what it is; with the error's class, if it is no FileError."""


def read_files() -> list[Row]:
    found = []
    for name, contents in FILES.items():
        for kind, each in contents.items():
            content, error = each if isinstance(each, tuple) else (each, FileError)
            found.append(
                refuse(f"{name} {kind}", Read(measure_on, name), f"{{{name}}}", write(name, content), kind=error)
            )
    return found


def refuse_name(name: str, text: str, kind: type[Exception] = FileError, about: str | None = None) -> Row:
    return refuse(name, Read(lambda _: measure_on(text), "."), text if about is None else about, kind=kind)


def refuse_file(name: str, file: str, kind: type[Exception], *prepare: Prepare, more: str = "", about: str = "") -> Row:
    return refuse(name, Read(partial(measure_on, more=more), file), about or f"{{{file}}}", *prepare, kind=kind)


SOURCES = [
    refuse_file("text of three words", "t.txt", DataError, write("t.txt", "a few words"), about="data"),
    refuse_file("text that is not there", "none.raw", FileError),
    refuse_name("text in the home of nobody", "~nobody-here/text"),
    refuse_name("text of 300 characters", "n" * 300),
    refuse_name("text without a name", "", InputError, "data"),
    refuse_name("text named with a null", "a\0b"),
    refuse_name("text of /dev/zero", "/dev/zero"),
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


def fit(prompt: str, tokens: int, folder: Path) -> None:
    """Generate text after a prompt."""
    runner = TextGenerator(folder)
    list(runner.stream(encode_prompts(runner.tokenizer, [prompt], chat=False), limit=tokens))


READ = "prune {model} --method magnitude --no-onnx --out {pruned} --length 16 --samples 2 --overwrite"
NOTES = write("pruned/notes.txt", "some words " * 400)
REPLACED = [
    refuse(f"{name} in the folder that is replaced", f"{READ} {ends}", "{pruned}", NOTES, kind=OutputError)
    for name, ends in {
        "text": "--data {pruned/notes.txt}",
        "text to measure on": "--data {text.raw} --eval-data {pruned/notes.txt}=2",
    }.items()
]
TOO_LONG = "16 tokens (and one more after a cache) of {gpt2}"
POSITIONS = [
    refuse(name, Read(read, "gpt2"), about, kind=InputError)
    for name, read, about in (
        ("prompt longer than the positions", partial(fit, "x" * 40, 8), "prompts"),
        ("answer longer than the positions", partial(fit, "hi", 64), "max_new_tokens"),
        ("empty prompt", partial(fit, "", 8), "prompts"),
        ("prompt of a chat", lambda _: encode_prompts(share_tokenizer(), ["hi"], chat=True), "chat"),
        ("cache longer than the positions", lambda folder: mptk.bench([folder], lengths=(16,)), TOO_LONG),
    )
]
INPUTS = [
    refuse(f"inputs that are {name}", Read(read_inputs, file), f"{{{file}}}")
    for name, file in {"not there": "no.safetensors", "text": "text.raw"}.items()
]

ROWS = [*INPUTS, *read_files(), *SOURCES, *REPLACED, *POSITIONS]
