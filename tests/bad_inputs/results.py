"""Published folders that are damaged, or meant to do harm."""

from __future__ import annotations

import json
from collections.abc import Callable

import onnx
import torch
from safetensors.torch import save

import mptk
from mptk import Report
from mptk.errors import ChangedError
from mptk.features.hub.push import push_files
from mptk.ort.generation import TextGenerator
from mptk.publish.manifest import read_manifest, write_manifest
from mptk.report.runs import read_run
from tests.bad_inputs.table import BODIES, Place, Prepare, Read, changed, fifo, folder, link, refuse, remove, write

REPORT = Read(Report.read, "pruned")
RUN = Read(lambda folder: read_run(folder, "run"), "pruned")
VERIFY = Read(mptk.verify, "pruned")
FILE, CONFIG, PROOF = "{pruned/report.json}", "{pruned/config.json}", "proof/inputs.safetensors"
GRAPH, OF_GRAPH = Read(TextGenerator, "gpt2"), "{gpt2/onnx/model.onnx}"


def reported(edit: Callable[[dict], object]) -> Prepare:
    """A report whose content ``edit`` changes."""
    return changed("pruned/report.json", edit)


def sealed(place: Place) -> None:
    """A manifest that fits, as whoever sends a folder can write it."""
    (place["pruned"] / "mptk.json").unlink()
    write_manifest(place["pruned"])


GONE = object()


def put(value: object, path: str) -> Callable[[dict], object]:
    """Another value inside an object, or none. ``path``: keys and positions, with spaces between."""

    def edit(content: dict) -> None:
        *names, last = (int(name) if name.isdigit() else name for name in path.split())
        for name in names:
            content = content[name]
        if value is GONE:
            del content[last]
        else:
            content[last] = value

    return edit


NEEDED = (
    *("settings", "settings learning", "settings learning training", "settings learning training losses"),
    *("settings learning rates", "families", "families ffn of", "families ffn width", "cost", "cost dense"),
    *("cost dense block", "cost pruned flops", "proof", "quality", "stages", "files", "model", "weights_sha256"),
)
WRONG = (
    *(("families", []), ("families", {"ffn": 7}), ("families ffn of", 0), ("families ffn of", -3)),
    *(("families ffn width", "wide"), ("rows vocabulary", {"kept": 9}), ("rows kv_heads", {"kept": 9})),
    *(("cost dense block", 0), ("cost dense bytes", "many"), ("cost pruned", None), ("proof", 7)),
    *(("proof 0 relative", "far"), ("proof 0 stage", None), ("proof 0 ok", "yes"), ("quality dense", [])),
    *(("quality pruned", "good"), ("settings", []), ("settings samples", "many"), ("settings samples", -5)),
    *(("settings sparsity", 10**400), ("settings method", 7), ("settings families", "ffn")),
    *(("settings learning", None), ("settings learning teacher", "dead"), ("sparsity", "half"), ("model", None)),
    *(("notes", "note"), ("files", [7]), ("stages 0 seconds", "long"), ("quantized", {"int8": 7})),
    *(("legal ffn widths", 7), ("data", {"training": 7}), ("versions", [1])),
)
"""Paths into a report, and values that are wrong there."""
REPORTS = [
    *(refuse(f"report.json {n}", REPORT, FILE, write("pruned/report.json", c)) for n, c in BODIES.items()),
    refuse("report.json a fifo", REPORT, "{pruned}", remove("pruned/report.json"), fifo("pruned/report.json")),
    refuse("report.json a folder", REPORT, "{pruned}", remove("pruned/report.json"), folder("pruned/report.json")),
    refuse("report.json missing", REPORT, "{pruned}", remove("pruned/report.json")),
    refuse("report.json another format", REPORT, FILE, reported(put("mptk-report/9", "format"))),
    refuse("report.json notes deep", REPORT, FILE, reported(put(json.loads("[" * 500 + "]" * 500), "notes"))),
    *(refuse(f"report.json without {p}", REPORT, "report.json", reported(put(GONE, p))) for p in NEEDED),
    *(
        refuse(f"report.json {path} {str(value)[:16]}", REPORT, "report.json", reported(put(value, path)))
        for path, value in WRONG
    ),
    refuse("report of no folder", Read(Report.read, "nowhere"), "{nowhere}"),
    refuse("report of a file", Read(Report.read, "text.raw"), "{text.raw}"),
    refuse("report of a model", Read(Report.read, "model"), "{model}"),
]

BENCHES = [
    refuse(f"bench.json {name}", RUN, "{pruned/bench.json}", write("pruned/bench.json", content))
    for name, content in BODIES.items()
]
METRICS = [
    refuse(f"metrics.jsonl {name}", RUN, "{pruned/metrics.jsonl}", write("pruned/metrics.jsonl", content))
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
    refuse("a missing file", VERIFY, "README.md", remove("pruned/README.md"), kind=ChangedError),
    refuse("a new file", VERIFY, "new.txt", write("pruned/new.txt", "x"), kind=ChangedError),
    refuse("a link", VERIFY, "README.md", link("pruned/README.md", "/etc/hostname"), sealed, kind=ChangedError),
    refuse("sparsity of 400 digits", VERIFY, "report.json", reported(put(10**400, "sparsity")), sealed),
    refuse("another task", VERIFY, "task", reported(put("evil", "task")), sealed),
    refuse("no manifest", VERIFY, "{pruned}", remove("pruned/mptk.json")),
    *(
        refuse(f"mptk.json {n}", Read(read_manifest, "pruned"), "{pruned}", write("pruned/mptk.json", c))
        for n, c in BODIES.items()
    ),
    refuse(
        "mptk.json that leads out",
        VERIFY,
        "../../etc/passwd",
        changed("pruned/mptk.json", put("0" * 64, "files ../../etc/passwd")),
        kind=ChangedError,
    ),
    *(
        refuse(f"proof {name}", VERIFY, PROOF, write(f"pruned/{PROOF}", content), sealed)
        for name, content in {
            "inputs truncated": b"123",
            "tokens out of the vocabulary": save({"input_ids": torch.full((2, 16), 10**6)}),
        }.items()
    ),
    *(
        refuse(f"config of the result {content}", VERIFY, CONFIG, write(CONFIG.strip("{}"), content), sealed)
        for content in ("{", "[]")
    ),
    refuse(
        "weights cut off", VERIFY, "report.json", write("pruned/model.safetensors", b"12"), sealed, kind=ChangedError
    ),
    refuse("the dense model is gone", Read(lambda folder: mptk.verify(folder, model="nowhere"), "pruned"), "nowhere"),
    refuse("no folder to verify", Read(mptk.verify, "nowhere"), "{nowhere}"),
    refuse("no folder to push", Read(lambda folder: push_files(folder, "me/name"), "nowhere"), "{nowhere}"),
    refuse("a size of a folder that has one", Read(lambda folder: mptk.rung(folder, 0.3), "pruned"), "{pruned}"),
    refuse("graph truncated", GRAPH, OF_GRAPH, write("gpt2/onnx/model.onnx", lambda path: path.read_bytes()[:-500])),
    refuse("graph missing", GRAPH, "{gpt2/model.onnx}", remove("gpt2/onnx/model.onnx")),
    refuse("graph, no tokenizer", GRAPH, "{gpt2}", *(remove(f"gpt2/tokenizer{end}.json") for end in ("", "_config"))),
    refuse("graph without a config", GRAPH, "{gpt2}", remove("gpt2/config.json")),
    refuse("weights of the graph missing", GRAPH, OF_GRAPH, external("none.data")),
    refuse("weights of the graph outside", GRAPH, OF_GRAPH, external("../../x")),
]

ROWS = [*REPORTS, *BENCHES, *METRICS, *FOLDERS]
