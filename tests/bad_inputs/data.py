"""Text that cannot be read, and text that is longer than a model's positions."""

from __future__ import annotations

import gzip
import json

from tests.bad_inputs.table import Row, fifo, folder, link, write

EVAL = "eval {model} --windows 2 --length 16 --data "
GENERATE = "generate {gpt2} "
ONCE = "prune {model} --method magnitude --out {out}"

FILES = {
    "text.raw": {
        "empty": ("", "too few|no text"),
        "blank": (" \n" * 50, "no text"),
        "of three words": ("a few words", "too few for a window"),
        "not UTF-8": (b"caf\xe9 " * 500, "not UTF-8"),
        "binary": (bytes(range(256)) * 50, "not UTF-8"),
        "UTF-16": ("some words " * 400).encode("utf-16"),
    },
    "t.jsonl": {
        "empty": ("", "no text"),
        "of one brace": ("{", "line 1: it is not JSON"),
        "of numbers": ("1\n2\n", "t.jsonl"),
        "of null": ("null\n", "t.jsonl"),
        "of empty rows": ("{}\n{}\n", "t.jsonl"),
        "without text": ('{"n": 1}\n', "no columns of strings"),
        "of two columns": ('{"a": "x", "b": "y"}\n', "2 columns of strings"),
        "of changing kinds": ('{"text": "x"}\n{"text": 7}\n{"text": [1]}\n', "t.jsonl"),
        "not UTF-8": (b'{"text": "\xff"}\n', "t.jsonl"),
        "binary": (bytes(range(256)) * 9, "t.jsonl"),
        "deep": ('{"text":' * 9000 + "1" + "}" * 9000, "t.jsonl"),
        "of chats": ('{"messages": [{"role": "user", "content": "hi"}]}\n', "no chat template"),
    },
    "t.json": {"empty": ("", "no text"), "null": ("null", "t.json"), "deep": ("[" * 50_000, "t.json")},
    "t.csv": {
        "empty": ("", "no text"),
        "of one line": ("a\n", "t.csv"),
        "ragged": ('text\n"a,b\n1,2,3,4\n', "t.csv"),
        "binary": (bytes(range(256)) * 9, "t.csv"),
    },
    "t.parquet": {
        "empty": (b"", "no text"),
        "no parquet": (b"PAR1xxxxPAR1", "t.parquet"),
        "text": ("x" * 99, "t.parquet"),
    },
    "t.jsonl.gz": {
        "no gzip": (b"xxxx", "t.jsonl.gz"),
        "truncated": (gzip.compress(b'{"text": "a few words"}\n' * 900)[:15], "t.jsonl.gz"),
    },
}


def rows() -> list[Row]:
    made = []
    for name, contents in FILES.items():
        for kind, found in contents.items():
            content, says = found if isinstance(found, tuple) else (found, "not UTF-8")
            said = () if "|" in says else (says,)
            made.append(Row(f"{name} {kind}", f"{EVAL}{{{name}}}", said, (write(name, content),)))
    return made


SOURCES = [
    Row("text that is not there", f"{EVAL}{{none.raw}}", ("not a file or folder",)),
    Row("text in the home of nobody", f"{EVAL}~nobody-here/text", ("~nobody-here/text",)),
    Row("text of 300 characters", f"{EVAL}{'n' * 300}", ("not a file or folder",)),
    Row("text without a name", f"{EVAL}", ("names no text",)),
    Row("text named with a null", f"{EVAL}a\0b", ("a\\x00b",)),
    Row("text a fifo", f"{EVAL}{{pipe}}", ("not an ordinary file",), (fifo("pipe"),)),
    Row("text of /dev/zero", f"{EVAL}/dev/zero", ("not an ordinary file",)),
    Row("text a fifo with a column", f"{EVAL}{{pipe}}:text", ("not an ordinary file",), (fifo("pipe"),)),
    Row("text an empty folder", f"{EVAL}{{d}}", ("has no text in it",), (folder("d"),)),
    Row("text a folder of binaries", f"{EVAL}{{d}}", ("has no text in it",), (write("d/a.bin", bytes(99)),)),
    Row("text a link in a circle", f"{EVAL}{{circle}}", ("circle",), (link("circle", "circle"),)),
    Row(
        "text of a column that is not there",
        f"{EVAL}{{t.jsonl}}:wings",
        ("no column 'wings'", "it has text"),
        (write("t.jsonl", '{"text": "x"}\n'),),
    ),
    Row("text of a column of a plain file", f"{EVAL}{{text.raw}}:wings", ("plain text and has no column",)),
    Row("text of weight zero", f"{EVAL}{{text.raw}}=0", ("weight above 0",)),
    Row("text of weight nan", f"{EVAL}{{text.raw}}=nan", ("weight above 0",)),
    Row("text of weight infinite", f"{EVAL}{{text.raw}}=inf", ("weight above 0",)),
    Row("text of negative weight", f"{EVAL}{{text.raw}}=-1", ("weight above 0",)),
    Row("text of too many colons", f"{EVAL}a:b:c:d:e:f", ("too many colons",)),
    Row("text of its own beside a file", f"{EVAL}self=0.5,a.txt", ("give only self",)),
    Row("text of a weight in words", f"{EVAL}{{text.raw}}=much", ("weight above 0",)),
    Row("text of markup", f"{EVAL}[/x]", ("[/x]",)),
    Row("text the model writes, to measure on", f"{EVAL}self", ("no model to write the text",)),
]

READ = "prune {model} --method magnitude --no-onnx --out {pruned} --length 16 --samples 2"
REPLACED = [
    Row(
        "text in the folder that is replaced",
        f"{READ} --overwrite --data {{pruned/notes.txt}}",
        ("is what is read",),
        (write("pruned/notes.txt", "some words " * 400),),
    ),
    Row(
        "text to measure on in the folder that is replaced",
        f"{READ} --overwrite --data {{text.raw}} --eval-data {{pruned/notes.txt}}=2",
        ("is what is read",),
        (write("pruned/notes.txt", "some words " * 400),),
    ),
]

LONG = "word " * 400
LINE = ("abcdefghijklmnop" * 64).encode() * 51_200
"""50 MB without a space or a line end."""

BOUNDED = [
    Row("text of one line of 50 MB", f"{EVAL}{{big.txt}}", ("perplexity",), (write("big.txt", LINE),), done=True),
    Row(
        "row of 50 MB",
        f"{EVAL}{{big.jsonl}}",
        ("perplexity",),
        (write("big.jsonl", lambda _: json.dumps({"text": LINE.decode()})),),
        done=True,
    ),
]

POSITIONS = [
    Row("prompt longer than the positions", f"{GENERATE}{'x' * 40}", ("16 positions", "--cut")),
    Row("answer longer than the positions", f"{GENERATE}hi", ("16 positions", "--max-new-tokens")),
    Row(
        "windows longer than the positions of a LLaMA", "eval {model} --data {text.raw} --length 71", ("70 positions",)
    ),
    Row(
        "windows longer than the positions, in ONNX",
        "eval {gpt2} --runtime onnx --data {text.raw} --length 17",
        ("16 positions",),
    ),
    Row(
        "windows longer than the positions of a LLaMA, in ONNX",
        "eval {pruned} --runtime onnx --data {text.raw} --length 71",
        ("70 positions",),
    ),
    Row("cache longer than the positions", "bench {gpt2} --lengths 16", ("16 positions",)),
    Row("cache longer than the positions of a LLaMA", "bench {pruned} --lengths 70", ("70 positions",)),
    Row("lengths of bench left out", "bench {gpt2}", ("16 positions", "ask for shorter")),
    Row("answer of a LLaMA longer than the positions", "generate {pruned} hi --max-new-tokens 80", ("70 positions",)),
    Row(
        "windows to calibrate on longer than the positions",
        "prune {model} --data {text.raw} --method magnitude --out {out} --length 71",
        ("70 positions",),
    ),
    Row("prompt that begins as a home does", f"{GENERATE}~nobody --max-new-tokens 2", ("new tokens",), done=True),
    Row("prompt cut by choice", f"{GENERATE}{'x' * 40} --cut", ("8 prompt tokens",), done=True),
    Row("empty prompt", f"{GENERATE}", ("an empty prompt",)),
]

INPUTS = [
    Row("inputs that are not there", f"{ONCE} --inputs no.safetensors", ("cannot read inputs", "save_file")),
    Row("inputs that are text", f"{ONCE} --inputs {{text.raw}}", ("cannot read inputs", "save_file")),
    Row(
        "text beside inputs",
        "prune {model} --data {text.raw} --inputs i.safetensors --out {out}",
        ("--inputs", "leave it out"),
    ),
    Row("inputs of analyze that are not there", "analyze {model} --inputs no.safetensors", ("cannot read inputs",)),
]

ROWS = [*INPUTS, *rows(), *SOURCES, *REPLACED, *BOUNDED, *POSITIONS]
