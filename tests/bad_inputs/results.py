"""Published folders that are damaged, or meant to do harm."""

from __future__ import annotations

import json
from collections.abc import Callable

import onnx
import torch
from safetensors.torch import save

from mptk.publish.manifest import write_manifest
from tests.bad_inputs.table import BODIES, Place, Prepare, Row, changed, fifo, folder, link, remove, write

REPORT = "report {pruned}"
HTML = "report {pruned} --html {page.html}"
VERIFY = "verify {pruned}"
RECOVER = "recover {pruned} --data {text.raw} --steps 2 --out {out}"
UNREADABLE = "ONNX Runtime cannot load"
GENERATE = "generate {gpt2} hello"
RERUN = "rerun {pruned} --out {out}"


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
    *(Row(f"report.json {n}", REPORT, ("report.json",), (write("pruned/report.json", c),)) for n, c in BODIES.items()),
    Row(
        "report.json a fifo",
        REPORT,
        ("holds no report.json",),
        (remove("pruned/report.json"), fifo("pruned/report.json")),
    ),
    Row("report.json a folder", REPORT, ("report.json",), (remove("pruned/report.json"), folder("pruned/report.json"))),
    Row("report.json missing", REPORT, ("holds no report.json",), (remove("pruned/report.json"),)),
    Row("report.json another format", REPORT, ("mptk-report/2",), (reported(put("mptk-report/9", "format")),)),
    Row("report.json notes deep", REPORT, ("nested too deep",), (reported(deep),)),
    *(
        Row(f"report.json without {'.'.join(names)}", REPORT, ("report.json", names[-1]), (reported(without(*names)),))
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
            ("report.json", str(names[-1])),
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
    Row("report.json keys missing, as a page", HTML, ("report.json",), (reported(without("cost")),)),
    Row("report.json as a list, verified", VERIFY, ("report.json",), (write("pruned/report.json", "[]"),)),
    Row("report.json as a list, recovered", RECOVER, ("report.json",), (write("pruned/report.json", "[]"),)),
    Row("report.json as a list, repeated", RERUN, ("report.json",), (write("pruned/report.json", "[]"),)),
    Row("report of no folder", "report {nowhere}", ("holds no report.json",)),
    Row("report of a file", "report {text.raw}", ("holds no report.json",)),
    Row("report of a model", "report {model}", ("holds no report.json",)),
]

BENCH = {"graphs": [], "onnxruntime": "1", "rounds": 2, "peaks": {}, "rows": []}
BENCHES = [
    *(Row(f"bench.json {n}", REPORT, ("bench.json",), (write("pruned/bench.json", c),)) for n, c in BODIES.items()),
    *(
        Row(f"bench.json {name}", REPORT, ("bench.json",), (write("pruned/bench.json", json.dumps({**BENCH, **part})),))
        for name, part in {
            "of a string for a number": {"graphs": [{"name": 7}]},
            "without rows": {},
            "of threads no number": {"peaks": {"x": {}}},
        }.items()
    ),
    Row("metrics.jsonl no JSON", HTML, ("metrics.jsonl",), (write("pruned/metrics.jsonl", "{"),)),
    Row("metrics.jsonl a list", HTML, ("metrics.jsonl", "line 1"), (write("pruned/metrics.jsonl", "[]\n"),)),
    Row(
        "metrics.jsonl without a step",
        HTML,
        ("metrics.jsonl",),
        (write("pruned/metrics.jsonl", '{"phase": "masks"}\n'),),
    ),
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
    Row("a changed file", VERIFY, ("README.md", "was changed"), (write("pruned/README.md", "x"),)),
    Row("a missing file", VERIFY, ("README.md", "is missing"), (remove("pruned/README.md"),)),
    Row("a new file", VERIFY, ("new.txt was added",), (write("pruned/new.txt", "x"),)),
    Row("a link", VERIFY, ("README.md", "is a link"), (link("pruned/README.md", "/etc/hostname"), sealed)),
    Row(
        "a link, pushed",
        "push {pruned} me/name",
        ("README.md", "is a link"),
        (link("pruned/README.md", "/etc/hostname"), sealed),
    ),
    Row("sparsity of 400 digits", VERIFY, ("sparsity",), (reported(put(10**400, "sparsity")), sealed)),
    Row("another task", VERIFY, ("task", "evil"), (reported(put("evil", "task")), sealed)),
    Row("no manifest", VERIFY, ("no mptk.json",), (remove("pruned/mptk.json"),)),
    *(Row(f"mptk.json {n}", VERIFY, ("mptk.json",), (write("pruned/mptk.json", c),)) for n, c in BODIES.items()),
    Row(
        "mptk.json that leads out",
        VERIFY,
        ("../../etc/passwd is missing",),
        (changed("pruned/mptk.json", put("0" * 64, "files", "../../etc/passwd")),),
    ),
    Row(
        "proof inputs truncated",
        VERIFY,
        ("proof/inputs.safetensors",),
        (write("pruned/proof/inputs.safetensors", b"123"), sealed),
    ),
    Row(
        "proof tokens out of the vocabulary",
        VERIFY,
        ("proof/inputs.safetensors", "do not use"),
        (write("pruned/proof/inputs.safetensors", save({"input_ids": torch.full((2, 16), 10**6)})), sealed),
    ),
    Row("config of the result no JSON", VERIFY, ("config.json",), (write("pruned/config.json", "{"), sealed)),
    Row("config of the result a list", VERIFY, ("config.json",), (write("pruned/config.json", "[]"), sealed)),
    Row("weights of the result truncated", VERIFY, ("",), (write("pruned/model.safetensors", b"12345678"), sealed)),
    Row("the dense model is gone", "verify {pruned} --model {nowhere}", ("nowhere",)),
    Row("the dense model is another", "verify {pruned} --model {gpt2-dense}", ("is not the dense model",)),
    Row("no folder to verify", "verify {nowhere}", ("holds no plan.json",)),
    Row("no folder to push", "push {nowhere} me/name", ("no mptk.json",)),
    Row("a size of a folder that has one", "rung {pruned} 0.3 --out {out}", ("has one size", "--shared")),
    Row("a size that is no share", "rung {pruned} x --out {out}", ("SIZE", "write a share")),
    Row("run.yaml missing", RERUN, ("run.yaml",), (remove("pruned/run.yaml"), sealed)),
    Row(
        "graph truncated, run",
        GENERATE,
        (UNREADABLE,),
        (write("gpt2/onnx/model.onnx", lambda path: path.read_bytes()[:-500]),),
    ),
    Row("graph empty, run", GENERATE, (UNREADABLE,), (write("gpt2/onnx/model.onnx", b""),)),
    Row(
        "graph no graph, timed",
        "bench {gpt2} --lengths 8",
        (UNREADABLE,),
        (write("gpt2/onnx/model.onnx", b"\x00\x01" * 400),),
    ),
    Row("graph missing", GENERATE, ("there is no", "mptk export"), (remove("gpt2/onnx/model.onnx"),)),
    Row(
        "graph without a tokenizer",
        GENERATE,
        ("no tokenizer",),
        (remove("gpt2/tokenizer.json"), remove("gpt2/tokenizer_config.json")),
    ),
    Row("graph without a config", GENERATE, ("no config.json",), (remove("gpt2/config.json"),)),
    Row("weights of the graph missing", GENERATE, (UNREADABLE,), (external("none.data"),)),
    Row("weights of the graph outside", GENERATE, (UNREADABLE,), (external("../../x"),)),
]

ROWS = [*REPORTS, *BENCHES, *FOLDERS]
