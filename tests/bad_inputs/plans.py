"""Plans, unfinished runs and recipes that are damaged, or meant to do harm."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save

from mptk.protocols.run_folder import make_run_folder
from tests.bad_inputs.shared import SHORT
from tests.bad_inputs.table import BODIES, Prepare, Row, at, fifo, folder, write

PLAN = "prune {model} --data {text.raw} --out {out} --plan {plan.json}"
SHOW = "show {model} --after rewrite --plan {plan.json}"


def plan(**ffn: object) -> str:
    keep = dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp"), "0-31")
    return json.dumps({"format": "mptk-plan/1", "families": {"ffn": {"width": 32, "of": 64, "keep": keep, **ffn}}})


PLANS = [
    *(Row(f"plan {n}", PLAN, ("plan.json",), (write("plan.json", c),)) for n, c in BODIES.items()),
    Row("plan missing", PLAN, ("plan.json", "cannot read plan")),
    Row("plan a folder", PLAN, ("plan.json",), (folder("plan.json"),)),
    Row("plan a fifo", PLAN, ("not a regular file",), (fifo("plan.json"),)),
    Row("plan of /dev/zero", PLAN.replace("{plan.json}", "/dev/zero"), ("not a regular file",)),
    Row(
        "plan of 10^10 units",
        PLAN,
        ("no family of a model is as large",),
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
    Row("plan of another model", SHOW, ("ffn has 64 units in this model, not 65",), (write("plan.json", plan(of=65)),)),
]


TRAIN = f"prune {{model}} --data {{text.raw}} --out {{out}} {SHORT}"


def unfinished(settings: str | bytes, **files: str | bytes) -> tuple[Prepare, ...]:
    names = {name.replace("__", "."): content for name, content in files.items()}
    return (
        lambda place: make_run_folder(at(place, "out.run")),
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
        (
            lambda place: make_run_folder(at(place, "out.run")),
            write("out.run/samples.safetensors", SAMPLES),
        ),
    ),
    Row(
        "an unfinished run of an earlier version",
        TRAIN,
        ("out.run is not an unfinished run of this version", "rename or remove it"),
        (write("out.run/settings.json", "{}"), write("out.run/samples.safetensors", SAMPLES)),
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
            "not YAML": "{:",
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
    Row("recipe a fifo", RECIPE, ("not a regular file",), (fifo("run.yaml"),)),
]

ROWS = [*PLANS, *RESUMED, *RECIPES]
