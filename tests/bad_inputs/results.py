"""Published folders, unfinished runs and recipes that are damaged, or meant to do harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from mptk.io.manifest import write_manifest
from tests.bad_inputs.shared import SHORT
from tests.bad_inputs.table import Place, Prepare, Row, fifo, folder, link, remove, write

REPORT = "report {pruned}"
HTML = "report {pruned} --html {page.html}"
VERIFY = "verify {pruned}"
RECOVER = "recover {pruned} --data {text.raw} --steps 2 --out {out}"
RERUN = "rerun {pruned} --out {out}"
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
LESS_DEEP = '{"a":' * 900 + "1" + "}" * 900


def changed(name: str, edit: Callable[[dict], object]) -> Prepare:
    """A JSON file whose content ``edit`` changes."""

    def made(path: Path) -> str:
        content = json.loads(path.read_text())
        edit(content)
        return json.dumps(content)

    return write(name, made)


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


BODIES = {
    "empty": "",
    "a list": "[]",
    "null": "null",
    "a number": "7",
    "no JSON": "{",
    "not UTF-8": b'{"format": "\xff"}',
    "deep": DEEP,
    "deep and short": LESS_DEEP,
    "of 5000 digits": '{"format": ' + "9" * 5000 + "}",
    "of NaN": '{"format": NaN}',
    "of 80 MB": lambda path: b" " * (80 << 20),
}

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
    Row(
        "report.json another format",
        REPORT,
        ("mptk-report/1",),
        (changed("pruned/report.json", put("mptk-report/9", "format")),),
    ),
    Row("report.json notes deep", REPORT, ("nested too deep",), (changed("pruned/report.json", deep),)),
    *(
        Row(
            f"report.json without {'.'.join(names)}",
            REPORT,
            ("report.json", names[-1]),
            (changed("pruned/report.json", without(*names)),),
        )
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
            (changed("pruned/report.json", put(value, *names)),),
        )
        for names, value in (
            (("families",), []),
            (("families",), {"ffn": 7}),
            (("families", "ffn", "of"), 0),
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
    Row(
        "report.json keys missing, as a page", HTML, ("report.json",), (changed("pruned/report.json", without("cost")),)
    ),
    Row("report.json as a list, verified", VERIFY, ("report.json",), (write("pruned/report.json", "[]"),)),
    Row("report.json as a list, recovered", RECOVER, ("report.json",), (write("pruned/report.json", "[]"),)),
    Row("report.json as a list, repeated", RERUN, ("report.json",), (write("pruned/report.json", "[]"),)),
    Row("report of no folder", "report {nowhere}", ("holds no report.json",)),
    Row("report of a file", "report {text.raw}", ("holds no report.json",)),
    Row("report of a model", "report {model}", ("holds no report.json",)),
]

BENCHES = [
    *(Row(f"bench.json {n}", REPORT, ("bench.json",), (write("pruned/bench.json", c),)) for n, c in BODIES.items()),
    Row(
        "bench.json of a string for a number",
        REPORT,
        ("bench.json",),
        (
            write(
                "pruned/bench.json",
                '{"graphs": [{"name": 7}], "onnxruntime": "1", "rounds": 2, "peaks": {}, "rows": []}',
            ),
        ),
    ),
    Row(
        "bench.json without rows",
        REPORT,
        ("bench.json",),
        (write("pruned/bench.json", '{"graphs": [], "onnxruntime": "1", "rounds": 2, "peaks": {}, "rows": []}'),),
    ),
    Row(
        "bench.json of threads no number",
        REPORT,
        ("bench.json",),
        (
            write(
                "pruned/bench.json", '{"graphs": [], "onnxruntime": "1", "rounds": 2, "peaks": {"x": {}}, "rows": []}'
            ),
        ),
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

PLAN = "prune {model} --data {text.raw} --out {out} --plan {plan.json}"
SHOW = "show {model} --after rewrite --plan {plan.json}"


def plan(**ffn: object) -> str:
    keep = dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp"), "0-31")
    return json.dumps({"format": "mptk-plan/1", "families": {"ffn": {"width": 32, "of": 64, "keep": keep, **ffn}}})


PLANS = [
    *(Row(f"plan {n}", PLAN, ("plan.json",), (write("plan.json", c),)) for n, c in BODIES.items()),
    Row("plan missing", PLAN, ("plan.json", "cannot read plan")),
    Row("plan a folder", PLAN, ("plan.json",), (folder("plan.json"),)),
    Row("plan a fifo", PLAN, ("no regular file",), (fifo("plan.json"),)),
    Row("plan of /dev/zero", PLAN.replace("{plan.json}", "/dev/zero"), ("no regular file",)),
    Row(
        "plan of 10^10 units",
        PLAN,
        ("no family of a model has so many units",),
        (write("plan.json", plan(of=10**10, width=10**10, keep={"model.layers.0.mlp": "0-9999999999"})),),
    ),
    Row(
        "plan of 2^24 units in many layers",
        PLAN,
        (["more", "units", "than", "a", "model", "has"][0],),
        (write("plan.json", plan(of=1 << 24, width=1 << 24, keep={str(i): f"0-{(1 << 24) - 1}" for i in range(50)})),),
    ),
    Row("plan of 10^4000", PLAN, ("of",), (write("plan.json", plan(of=10**4000, width=10**4000)),)),
    Row(
        "plan of ranges that repeat",
        PLAN,
        ("more units are kept than width",),
        (write("plan.json", plan(of=1 << 24, width=32, keep={"model.layers.0.mlp": ",".join(["0-16777215"] * 9)})),),
    ),
    Row("plan of a range backwards", PLAN, ("keep",), (write("plan.json", plan(keep={"model.layers.0.mlp": "31-0"})),)),
    Row(
        "plan of superscript",
        PLAN,
        ("is not a unit or a range",),
        (write("plan.json", plan(keep={"model.layers.0.mlp": "²-3"})),),
    ),
    Row("plan of half a unit", PLAN, ("keep",), (write("plan.json", plan(keep={"model.layers.0.mlp": [0.5] * 32})),)),
    Row("plan of negative units", PLAN, ("keep",), (write("plan.json", plan(keep={"model.layers.0.mlp": [-1] * 32})),)),
    Row("plan without a layer", PLAN, ("keep",), (write("plan.json", plan(keep={})),)),
    Row("plan of width zero", PLAN, ("width",), (write("plan.json", plan(width=0)),)),
    Row("plan of true", PLAN, ("width",), (write("plan.json", plan(width=True)),)),
    Row("plan of another model", SHOW, ("ffn has 64 units in this model, not 65",), (write("plan.json", plan(of=65)),)),
    Row("plan of another family", SHOW, ("plan", "wings"), (write("plan.json", plan().replace('"ffn"', '"wings"')),)),
]

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
    Row(
        "proof tokens negative",
        VERIFY,
        ("proof/inputs.safetensors", "do not use"),
        (write("pruned/proof/inputs.safetensors", save({"input_ids": torch.full((2, 16), -5)})), sealed),
    ),
    Row(
        "proof failed",
        VERIFY,
        ("proof", "do not use"),
        (changed("pruned/report.json", put(False, "proof", 0, "ok")), sealed),
    ),
    Row("config of the result no JSON", VERIFY, ("config.json",), (write("pruned/config.json", "{"), sealed)),
    Row("config of the result a list", VERIFY, ("config.json",), (write("pruned/config.json", "[]"), sealed)),
    Row("weights of the result truncated", VERIFY, ("",), (write("pruned/model.safetensors", b"12345678"), sealed)),
    Row("the dense model is gone", "verify {pruned} --model {nowhere}", ("nowhere",)),
    Row("the dense model is another", "verify {pruned} --model {gpt2-dense}", ("is not the dense model",)),
    Row("no folder to verify", "verify {nowhere}", ("holds no plan.json",)),
    Row("no folder to push", "push {nowhere} me/name", ("no mptk.json",)),
    Row("run.yaml missing", RERUN, ("run.yaml",), (remove("pruned/run.yaml"), sealed)),
    Row(
        "graph truncated, run",
        "generate {gpt2} hello",
        ("ONNX Runtime cannot load",),
        (write("gpt2/onnx/model.onnx", lambda path: path.read_bytes()[:-500]),),
    ),
    Row(
        "graph empty, run",
        "generate {gpt2} hello",
        ("ONNX Runtime cannot load",),
        (write("gpt2/onnx/model.onnx", b""),),
    ),
    Row(
        "graph no graph, timed",
        "bench {gpt2} --lengths 8",
        ("ONNX Runtime cannot load",),
        (write("gpt2/onnx/model.onnx", b"\x00\x01" * 400),),
    ),
    Row("graph missing", "generate {gpt2} hello", ("there is no", "mptk export"), (remove("gpt2/onnx/model.onnx"),)),
    Row(
        "graph without a tokenizer",
        "generate {gpt2} hello",
        ("no tokenizer",),
        (remove("gpt2/tokenizer.json"), remove("gpt2/tokenizer_config.json")),
    ),
    Row("graph without a config", "generate {gpt2} hello", ("no config.json",), (remove("gpt2/config.json"),)),
    Row(
        "weights of the graph missing",
        "generate {gpt2} hello",
        ("ONNX Runtime cannot load",),
        (remove("gpt2/onnx/model.onnx.data"),),
    ),
    Row(
        "weights of the graph outside",
        "generate {gpt2} hello",
        ("ONNX Runtime cannot load",),
        (write("outside.data", b"x" * 100), link("gpt2/onnx/model.onnx.data", "outside.data")),
    ),
]

TRAIN = f"prune {{model}} --data {{text.raw}} --out {{out}} {SHORT}"


def unfinished(settings: str | bytes, **files: str | bytes) -> tuple[Prepare, ...]:
    names = {name.replace("__", "."): content for name, content in files.items()}
    return (
        write("out.run/settings.json", settings),
        *(write(f"out.run/{name}", content) for name, content in names.items()),
    )


SAMPLES = save({"training.inputs.input_ids": torch.ones(2, 16, dtype=torch.int64)})
RESUMED = [
    *(
        Row(f"settings.json {n}", f"{TRAIN} --resume", ("settings.json",), unfinished(c, samples__safetensors=SAMPLES))
        for n, c in BODIES.items()
        if not callable(c)
    ),
    Row(
        "settings.json no JSON, without resume",
        TRAIN,
        ("settings.json",),
        unfinished("{", samples__safetensors=SAMPLES),
    ),
    Row(
        "settings.json missing",
        TRAIN,
        ("holds an unfinished run", "--resume"),
        (write("out.run/samples.safetensors", SAMPLES),),
    ),
    Row(
        "another method resumes",
        f"{TRAIN} --resume",
        ("was started with other settings", "method"),
        unfinished('{"method": "maskprune"}', samples__safetensors=SAMPLES),
    ),
]

RECIPE = "prune --config {run.yaml} --out {out}"
RECIPES = [
    *(
        Row(f"recipe {name}", RECIPE, ("run.yaml",), (write("run.yaml", content),))
        for name, content in {
            "empty": "",
            "a list": "- 1\n- 2\n",
            "a number": "7",
            "no YAML": "{:",
            "not UTF-8": b"model: \xff\n",
            "binary": bytes(range(256)),
            "of tabs": "\tmodel: x\n",
            "a date that is none": "model: 2001-99-99\n",
            "deep": "[" * 5000 + "]" * 5000,
            "a bomb": "a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: [*b,*b]\n",
            "an object": "!!python/object/apply:os.system ['true']\n",
            "a key that is a list": "? [1]\n: 2\n",
            "of 2 MB": lambda path: "# " + "x" * (2 << 20),
            "an unknown option": "model: m\nwings: 2\n",
            "trust": "model: m\ntrust_remote_cod: true\n",
        }.items()
    ),
    *(
        Row(f"recipe {name}", RECIPE, says, (write("run.yaml", f"model: m\n{content}\n"),), code=2)
        for name, content, says in (
            ("of a word for a number", "samples: many", ("--samples",)),
            ("of a number that is none", "sparsity: .nan", ("--sparsity",)),
            ("of infinity", "sparsity: .inf", ("--sparsity",)),
            ("of a mapping for a number", "samples: {a: 1}", ("--samples",)),
            ("of a list for a number", "samples: [1, 2]", ("--samples",)),
            ("of 5000 digits", "seed: " + "9" * 4000, ("--seed",)),
            ("of markup", "method: '[/x]'", ("[/x]",)),
            ("of an escape", 'method: "\\e]8;;x\\a"', ("\\x1b]8;;x",)),
        )
    ),
    Row("recipe of a width that is none", RECIPE, ("--width",), (write("run.yaml", "model: m\nwidth: {ffn: x}\n"),)),
    Row("recipe missing", RECIPE, ("run.yaml", "check its name")),
    Row("recipe a folder", RECIPE, ("run.yaml",), (folder("run.yaml"),)),
    Row("recipe a fifo", RECIPE, ("no regular file",), (fifo("run.yaml"),)),
]

ROWS = [*REPORTS, *BENCHES, *PLANS, *FOLDERS, *RESUMED, *RECIPES]
