"""Plans, unfinished runs and recipes that are damaged, or meant to do harm."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save

import mptk
from mptk.config import read_recipe
from mptk.errors import FileError, InputError, OutputError, PlanError
from mptk.protocols import check_unfinished, make_run_folder
from tests.bad_inputs.table import BODIES, USAGE, Prepare, Read, Row, at, fifo, folder, write

READ = Read(mptk.Plan.load, "plan.json")
FILE = "{plan.json}"


def plan(**ffn: object) -> str:
    keep = dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp"), "0-31")
    return json.dumps({"format": "mptk-plan/1", "families": {"ffn": {"width": 32, "of": 64, "keep": keep, **ffn}}})


PLANS = [
    *(Row(f"plan {n}", READ, PlanError, FILE, (write("plan.json", c),)) for n, c in BODIES.items()),
    Row("plan missing", READ, PlanError, FILE),
    Row("plan a folder", READ, PlanError, FILE, (folder("plan.json"),)),
    Row("plan a fifo", READ, PlanError, FILE, (fifo("plan.json"),)),
    Row("plan of /dev/zero", Read(lambda _: mptk.Plan.load("/dev/zero"), "plan.json"), PlanError, "/dev/zero"),
    *(
        Row(f"plan of {name}", READ, PlanError, f"{{plan.json}}: families.ffn{within}", (write("plan.json", content),))
        for name, content, within in (
            ("10^10 units", plan(of=10**10, width=10**10, keep={"model.layers.0.mlp": "0-9999999999"}), ""),
            (
                "2^24 units in many layers",
                plan(of=1 << 24, width=1 << 24, keep={str(i): f"0-{(1 << 24) - 1}" for i in range(50)}),
                "",
            ),
            ("10^4000", plan(of=10**4000, width=10**4000), ""),
            (
                "ranges that repeat",
                plan(of=1 << 24, width=32, keep={"model.layers.0.mlp": ",".join(["0-16777215"] * 9)}),
                ".keep.model.layers.0.mlp",
            ),
        )
    ),
]


def resume(method: str = "magnitude", *, goes_on: bool = True) -> Read:
    """What a run asks of an unfinished one beside its output folder, before it opens the model."""
    return Read(lambda out: check_unfinished(out, {"method": method}, goes_on), "out")


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
        Row(
            f"settings.json {n}",
            resume(),
            FileError,
            "{out.run/settings.json}",
            unfinished(c, samples__safetensors=SAMPLES),
        )
        for n, c in BODIES.items()
        if not callable(c)
    ),
    Row(
        "settings.json no JSON, without resume",
        resume(goes_on=False),
        FileError,
        "{out.run/settings.json}",
        unfinished("{", samples__safetensors=SAMPLES),
    ),
    Row(
        "settings.json missing",
        resume(goes_on=False),
        OutputError,
        "{out.run}",
        (
            lambda place: make_run_folder(at(place, "out.run")),
            write("out.run/samples.safetensors", SAMPLES),
        ),
    ),
    Row(
        "an unfinished run of an earlier version",
        resume(goes_on=False),
        OutputError,
        "{out.run}",
        (write("out.run/settings.json", "{}"), write("out.run/samples.safetensors", SAMPLES)),
    ),
    Row(
        "another method resumes",
        resume("wanda"),
        OutputError,
        "{out.run}",
        unfinished('{"method": "maskprune"}', samples__safetensors=SAMPLES),
    ),
]

RECIPE = "prune --config {run.yaml} --out {out}"
RECIPES = [
    *(
        Row(f"recipe {name}", Read(read_recipe, "run.yaml"), FileError, "{run.yaml}", (write("run.yaml", content),))
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
        }.items()
    ),
    *(
        Row(f"recipe {name}", Read(read_recipe, "run.yaml"), FileError, "{run.yaml}", steps)
        for name, steps in {"missing": (), "a folder": (folder("run.yaml"),), "a fifo": (fifo("run.yaml"),)}.items()
    ),
    *(
        Row(f"recipe {name}", RECIPE, kind, about, (write("run.yaml", f"model: m\n{content}\n"),))
        for name, content, kind, about in (
            ("of a word for a number", "samples: many", USAGE, "--samples"),
            ("of a number that is none", "sparsity: .nan", USAGE, "--sparsity"),
            ("of infinity", "sparsity: .inf", USAGE, "--sparsity"),
            ("of a mapping for a number", "samples: {a: 1}", USAGE, "--samples"),
            ("of a list for a number", "samples: [1, 2]", USAGE, "--samples"),
            ("of 5000 digits", "seed: " + "9" * 4000, USAGE, "--seed"),
            ("of markup", "method: '[/x]'", USAGE, "--method"),
            ("of a width that is none", "width: {ffn: x}", InputError, "width"),
            ("of an unknown option", "wings: 2", InputError, "wings"),
            ("of a misspelt option", "trust_remote_cod: true", InputError, "trust_remote_cod"),
        )
    ),
]

ROWS = [*PLANS, *RESUMED, *RECIPES]
