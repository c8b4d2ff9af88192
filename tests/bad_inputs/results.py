"""Published folders that are damaged, or meant to do harm."""

from __future__ import annotations

import json
from collections.abc import Callable

import onnx
import torch
from safetensors.torch import save

import mptk
from mptk import Report
from mptk.errors import ChangedError, FileError
from mptk.features.hub.push import push_files
from mptk.ort.generation import TextGenerator
from mptk.publish.manifest import read_manifest, write_manifest
from mptk.report.runs import read_run
from tests.bad_inputs.table import BODIES, Place, Prepare, Read, Row, changed, fifo, folder, link, remove, write

REPORT = Read(Report.read, "pruned")
RUN = Read(lambda folder: read_run(folder, "run"), "pruned")
VERIFY = Read(mptk.verify, "pruned")
FILE = "{pruned/report.json}"
GRAPH = Read(TextGenerator, "gpt2")


def reported(edit: Callable[[dict], object]) -> Prepare:
    """A report whose content ``edit`` changes."""
    return changed("pruned/report.json", edit)


def sealed(place: Place) -> None:
    """A manifest that fits, as whoever sends a folder can write it."""
    (place["pruned"] / "mptk.json").unlink()
    write_manifest(place["pruned"])


def deep(content: dict) -> None:
    content["notes"] = json.loads("[" * 500 + "]" * 500)


def without(*names: str) -> Callable[[dict], object]:
    def edit(content: dict) -> None:
        inner = content
        for name in names[:-1]:
            inner = inner[name]
        del inner[names[-1]]

    return edit


def put(value: object, *names: str | int) -> Callable[[dict], object]:
    def edit(content: dict) -> None:
        inner = content
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value

    return edit


REPORTS = [
    *(Row(f"report.json {n}", REPORT, FileError, FILE, (write("pruned/report.json", c),)) for n, c in BODIES.items()),
    Row(
        "report.json a fifo",
        REPORT,
        FileError,
        "{pruned}",
        (remove("pruned/report.json"), fifo("pruned/report.json")),
    ),
    Row(
        "report.json a folder",
        REPORT,
        FileError,
        "{pruned}",
        (remove("pruned/report.json"), folder("pruned/report.json")),
    ),
    Row("report.json missing", REPORT, FileError, "{pruned}", (remove("pruned/report.json"),)),
    Row("report.json another format", REPORT, FileError, FILE, (reported(put("mptk-report/9", "format")),)),
    Row("report.json notes deep", REPORT, FileError, FILE, (reported(deep),)),
    *(
        Row(f"report.json without {'.'.join(names)}", REPORT, FileError, "report.json", (reported(without(*names)),))
        for names in (
            ("settings",),
            ("settings", "learning"),
            ("settings", "learning", "training"),
            ("settings", "learning", "training", "losses"),
            ("settings", "learning", "rates"),
            ("families",),
            ("families", "ffn", "of"),
            ("families", "ffn", "width"),
            ("cost",),
            ("cost", "dense"),
            ("cost", "dense", "block"),
            ("cost", "pruned", "flops"),
            ("proof",),
            ("quality",),
            ("stages",),
            ("files",),
            ("model",),
            ("weights_sha256",),
        )
    ),
    *(
        Row(
            f"report.json {'.'.join(map(str, names))} {str(value)[:16]}",
            REPORT,
            FileError,
            "report.json",
            (reported(put(value, *names)),),
        )
        for names, value in (
            (("families",), []),
            (("families",), {"ffn": 7}),
            (("families", "ffn", "of"), 0),
            (("rows", "vocabulary"), {"kept": 9}),
            (("rows", "kv_heads"), {"kept": 9}),
            (("families", "ffn", "width"), "wide"),
            (("families", "ffn", "of"), -3),
            (("cost", "dense", "block"), 0),
            (("cost", "dense", "bytes"), "many"),
            (("cost", "pruned"), None),
            (("proof",), 7),
            (("proof", 0, "relative"), "far"),
            (("proof", 0, "stage"), None),
            (("proof", 0, "ok"), "yes"),
            (("quality", "dense"), []),
            (("quality", "pruned"), "good"),
            (("settings",), []),
            (("settings", "samples"), "many"),
            (("settings", "samples"), -5),
            (("settings", "sparsity"), 10**400),
            (("settings", "method"), 7),
            (("settings", "families"), "ffn"),
            (("settings", "learning"), None),
            (("settings", "learning", "teacher"), "dead"),
            (("sparsity",), "half"),
            (("model",), None),
            (("notes",), "note"),
            (("files",), [7]),
            (("stages", 0, "seconds"), "long"),
            (("quantized",), {"int8": 7}),
            (("legal", "ffn", "widths"), 7),
            (("data",), {"training": 7}),
            (("versions",), [1]),
        )
    ),
    Row("report of no folder", Read(Report.read, "nowhere"), FileError, "{nowhere}"),
    Row("report of a file", Read(Report.read, "text.raw"), FileError, "{text.raw}"),
    Row("report of a model", Read(Report.read, "model"), FileError, "{model}"),
]

BENCH = {"graphs": [], "onnxruntime": "1", "rounds": 2, "peaks": {}, "rows": []}
BENCHES = [
    Row(f"bench.json {name}", RUN, FileError, "{pruned/bench.json}", (write("pruned/bench.json", content),))
    for name, content in {
        **BODIES,
        "of a string for a number": json.dumps({**BENCH, "graphs": [{"name": 7}]}),
        "of threads no number": json.dumps({**BENCH, "peaks": {"x": {}}}),
    }.items()
]
METRICS = [
    Row(f"metrics.jsonl {name}", RUN, FileError, "{pruned/metrics.jsonl}", (write("pruned/metrics.jsonl", content),))
    for name, content in {"no JSON": "{", "a list": "[]\n", "without a step": '{"phase": "masks"}\n'}.items()
]


def external(location: str) -> Prepare:
    """A graph whose weights lie in another file: one that is not there, or a copy of their own outside of the folder."""

    def prepare(place: Place) -> None:
        file = place["gpt2"] / "onnx/model.onnx"
        graph = onnx.load(file, load_external_data=False)
        for weight in graph.graph.initializer:
            for entry in weight.external_data:
                if entry.key == "location":
                    if location.startswith(".."):
                        (file.parent / location).write_bytes((file.parent / entry.value).read_bytes())
                    entry.value = location
        file.unlink()
        file.write_bytes(graph.SerializeToString())

    return prepare


FOLDERS = [
    Row("a missing file", VERIFY, ChangedError, "README.md", (remove("pruned/README.md"),)),
    Row("a new file", VERIFY, ChangedError, "new.txt", (write("pruned/new.txt", "x"),)),
    Row("a link", VERIFY, ChangedError, "README.md", (link("pruned/README.md", "/etc/hostname"), sealed)),
    Row("sparsity of 400 digits", VERIFY, FileError, "report.json", (reported(put(10**400, "sparsity")), sealed)),
    Row("another task", VERIFY, FileError, "task", (reported(put("evil", "task")), sealed)),
    Row("no manifest", VERIFY, FileError, "{pruned}", (remove("pruned/mptk.json"),)),
    *(
        Row(f"mptk.json {n}", Read(read_manifest, "pruned"), FileError, "{pruned}", (write("pruned/mptk.json", c),))
        for n, c in BODIES.items()
    ),
    Row(
        "mptk.json that leads out",
        VERIFY,
        ChangedError,
        "../../etc/passwd",
        (changed("pruned/mptk.json", put("0" * 64, "files", "../../etc/passwd")),),
    ),
    *(
        Row(
            f"proof {name}",
            VERIFY,
            FileError,
            "proof/inputs.safetensors",
            (write("pruned/proof/inputs.safetensors", content), sealed),
        )
        for name, content in {
            "inputs truncated": b"123",
            "tokens out of the vocabulary": save({"input_ids": torch.full((2, 16), 10**6)}),
        }.items()
    ),
    *(
        Row(
            f"config of the result {name}",
            VERIFY,
            FileError,
            "{pruned/config.json}",
            (write("pruned/config.json", content), sealed),
        )
        for name, content in {"no JSON": "{", "a list": "[]"}.items()
    ),
    Row(
        "weights of the result truncated",
        VERIFY,
        ChangedError,
        "report.json",
        (write("pruned/model.safetensors", b"12345678"), sealed),
    ),
    Row(
        "the dense model is gone",
        Read(lambda folder: mptk.verify(folder, model="nowhere"), "pruned"),
        FileError,
        "nowhere",
    ),
    Row("no folder to verify", Read(mptk.verify, "nowhere"), FileError, "{nowhere}"),
    Row("no folder to push", Read(lambda folder: push_files(folder, "me/name"), "nowhere"), FileError, "{nowhere}"),
    Row(
        "a size of a folder that has one", Read(lambda folder: mptk.rung(folder, 0.3), "pruned"), FileError, "{pruned}"
    ),
    *(
        Row(f"graph {name}", GRAPH, FileError, "{gpt2/onnx/model.onnx}", (write("gpt2/onnx/model.onnx", content),))
        for name, content in {
            "truncated": lambda path: path.read_bytes()[:-500],
            "empty": b"",
            "no graph": b"\x00\x01" * 400,
        }.items()
    ),
    Row("graph missing", GRAPH, FileError, "{gpt2/model.onnx}", (remove("gpt2/onnx/model.onnx"),)),
    Row(
        "graph without a tokenizer",
        GRAPH,
        FileError,
        "{gpt2}",
        (remove("gpt2/tokenizer.json"), remove("gpt2/tokenizer_config.json")),
    ),
    Row("graph without a config", GRAPH, FileError, "{gpt2}", (remove("gpt2/config.json"),)),
    Row("weights of the graph missing", GRAPH, FileError, "{gpt2/onnx/model.onnx}", (external("none.data"),)),
    Row("weights of the graph outside", GRAPH, FileError, "{gpt2/onnx/model.onnx}", (external("../../x"),)),
]

ROWS = [*REPORTS, *BENCHES, *METRICS, *FOLDERS]
