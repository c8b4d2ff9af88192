"""Plans, unfinished runs and recipes that are damaged, or meant to do harm."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save

import mptk
from mptk.config import read_recipe
from mptk.errors import InputError, OutputError, PlanError
from mptk.protocols import check_unfinished_run, make_run_folder
from tests.bad_inputs.table import BODIES, USAGE, Prepare, Read, at, fifo, folder, refuse, write

READ = Read(mptk.Plan.load, "plan.json")
FILE = "{plan.json}"


def plan(**ffn: object) -> str:
    keep = dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp"), "0-31")
    return json.dumps({"format": "mptk-plan/1", "families": {"ffn": {"width": 32, "of": 64, "keep": keep, **ffn}}})


PLANS = [
    *(refuse(f"plan {n}", READ, FILE, write("plan.json", c), kind=PlanError) for n, c in BODIES.items()),
    refuse("plan missing", READ, FILE, kind=PlanError),
    refuse("plan a folder", READ, FILE, folder("plan.json"), kind=PlanError),
    refuse("plan a fifo", READ, FILE, fifo("plan.json"), kind=PlanError),
    refuse("plan of /dev/zero", Read(lambda _: mptk.Plan.load("/dev/zero"), "plan.json"), "/dev/zero", kind=PlanError),
    *(
        refuse(f"plan of {name}", READ, f"{FILE}: families.ffn{within}", write("plan.json", content), kind=PlanError)
        for name, content, within in (
            ("10^10 units", plan(of=10**10, width=10**10, keep={"model.layers.0.mlp": "0-9999999999"}), ""),
            ("many layers", plan(of=2**24, width=2**24, keep={str(i): "0-16777215" for i in range(50)}), ""),
            ("ranges that repeat", plan(of=2**24, keep={"a": ",".join(["0-16777215"] * 9)}), ".keep.a"),
        )
    ),
]


def resume(method: str = "magnitude", *, goes_on: bool = True) -> Read:
    """What a run asks of an unfinished one beside its output folder, before it opens the model."""
    return Read(lambda out: check_unfinished_run(out, {"method": method}, goes_on), "out")


def unfinished(settings: str | bytes | None) -> tuple[Prepare, ...]:
    """A folder of an unfinished run, with samples. ``settings``: what its settings.json holds, if there is one."""
    written = () if settings is None else (write("out.run/settings.json", settings),)
    return (lambda place: make_run_folder(at(place, "out.run")), *written, SAMPLES)


IDS = torch.ones(2, 16, dtype=torch.int64)
SAMPLES = write("out.run/samples.safetensors", save({"training.inputs.input_ids": IDS}))
FRESH, OF_SETTINGS = resume(goes_on=False), "{out.run/settings.json}"
RESUMED = [
    *(
        refuse(f"settings.json {n}", resume(), OF_SETTINGS, *unfinished(c))
        for n, c in BODIES.items()
        if not callable(c)
    ),
    refuse("settings.json no JSON, without resume", FRESH, OF_SETTINGS, *unfinished("{")),
    *(
        refuse(name, read, "{out.run}", *steps, kind=OutputError)
        for name, read, steps in (
            ("settings.json missing", FRESH, unfinished(None)),
            ("an unfinished run of an earlier version", FRESH, (write("out.run/settings.json", "{}"), SAMPLES)),
            ("another method resumes", resume("wanda"), unfinished('{"method": "maskprune"}')),
        )
    ),
]

RECIPE = "prune --config {run.yaml} --out {out}"
RECIPES = [
    *(
        refuse(f"recipe {name}", Read(read_recipe, "run.yaml"), "{run.yaml}", write("run.yaml", content))
        for name, content in {
            "empty": "",
            "a list": "- 1\n- 2\n",
            "a number": "7",
            "not YAML": "{:",
            "not UTF-8": b"model: \xff\n",
            "of tabs": "\tmodel: x\n",
            "deep": "[" * 5000 + "]" * 5000,
            "a bomb": "a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: [*b,*b]\n",
            "an object": "!!python/object/apply:os.system ['true']\n",
            "of 2 MB": lambda path: "# " + "x" * (2 << 20),
        }.items()
    ),
    *(
        refuse(f"recipe {name}", Read(read_recipe, "run.yaml"), "{run.yaml}", *steps)
        for name, steps in {"missing": (), "a folder": (folder("run.yaml"),), "a fifo": (fifo("run.yaml"),)}.items()
    ),
    *(
        refuse(f"recipe {name}", RECIPE, about, write("run.yaml", f"model: m\n{content}\n"), kind=kind)
        for name, content, kind, about in (
            ("of a word for a number", "samples: many", USAGE, "--samples"),
            ("of a number that is none", "sparsity: .nan", USAGE, "--sparsity"),
            ("of a mapping for a number", "samples: {a: 1}", USAGE, "--samples"),
            ("of a list for a number", "samples: [1, 2]", USAGE, "--samples"),
            ("of 5000 digits", "seed: " + "9" * 4000, USAGE, "--seed"),
            ("of markup", "method: '[/x]'", USAGE, "--method"),
            ("of a width that is none", "width: {ffn: x}", InputError, "width"),
            ("of an unknown option", "wings: 2", InputError, "wings"),
        )
    ),
]

ROWS = [*PLANS, *RESUMED, *RECIPES]
