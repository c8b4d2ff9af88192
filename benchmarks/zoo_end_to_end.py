"""The zoo through the front door: each type is saved as a checkpoint, pruned and verified by the command line.

A type that its stock class cannot hold is pruned to ``--target graph``. One that no task takes, since it reads more than
text, images or sound, gets its inputs as a file (``--inputs``). Data are random, models tiny and random, so this shows
that the commands work for the kind of model, not how good a pruned model is.
"""

from __future__ import annotations

import gc
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from typer.testing import CliRunner

from benchmarks.tiny_models import CannotBuild, example_inputs, tiny_model
from mptk.cli.main import app

STAGES = ("none", "built", "pruned", "verified")
OPTIONS = "--method wanda --samples 4 --length 12 --eval-windows 2 --eval-length 12 --no-onnx --memory 2GB"
"""What is asked of ``mptk prune``, beside the widths."""
SHARE = 0.6
"""Of a family's units that stay, about."""


def run_type(mapping: str, model_type: str) -> dict[str, Any]:
    """One row; ``stage`` is the last of ``STAGES`` that passed, ``reason`` why the next one did not."""
    row: dict[str, Any] = {"type": model_type, "mapping": mapping, "stage": "none", "reason": "", "target": ""}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            model: Any = tiny_model(mapping, model_type).model
            model.save_pretrained(folder / "dense")
            save_file(example_inputs(mapping, model, 0), folder / "inputs.safetensors")
        except CannotBuild as error:
            return {**row, "reason": str(error)}
        except Exception as error:
            return {**row, "reason": f"save_pretrained: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        row["stage"] = "built"
        for given, target in product(("", "--inputs"), ("stock", "graph")):
            row |= {"target": target, "reason": _pruned(folder, target, given)}
            if not row["reason"]:
                break
        else:
            return row
        report = json.loads((folder / target / "report.json").read_text())
        widths = {name: [f["width"], f["of"]] for name, f in report["families"].items() if f["width"] < f["of"]}
        row |= {"stage": "pruned", "task": report["task"], "widths": widths}
        row["reason"] = said("verify", folder / target, "--memory", "2GB")
        return row if row["reason"] else {**row, "stage": "verified"}


def _pruned(folder: Path, target: str, given: str) -> str:
    """Why ``prune`` fails, with all families near ``SHARE`` at once or with each of three by itself; "" if it works.

    ``given``: "--inputs" if the inputs are given as a file.
    """
    inputs = (given, folder / "inputs.safetensors") if given else ()
    to = ("--target", target, "--align", 1)
    if failure := said("analyze", folder / "dense", *inputs, *to, "--json", folder / "all"):
        return failure
    found = json.loads((folder / "all").read_text())["families"]
    widths = {
        f["name"]: min(f["legal_widths"], key=lambda w: abs(w - SHARE * f["width"]))
        for f in sorted(found, key=lambda f: -f["layers"])
        if len(f["legal_widths"]) > 1
    }
    if not widths:
        return "analyze: no family has another legal width"
    reasons, data = [], inputs or ("--data", "random")
    words = ("prune", folder / "dense", "--out", folder / target, *to, *data, *OPTIONS.split())
    single = [f["name"] for f in found if f["name"] in widths and not f["together"]]
    single = sorted(single or widths, key=list(widths).index)[:3]
    for chosen in (widths, *({name: widths[name]} for name in single)):
        given = [word for name, width in chosen.items() for word in ("--width", f"{name}={width}")]
        failure = said(*words, "--families", ",".join(chosen), *given)
        if not failure:
            return ""
        reasons.append(failure)
    return reasons[-1]


def said(*words: object) -> str:
    """What a command line says on failure; "" if it succeeds."""
    gc.collect()  # it is off in the sweep's processes, and what the last command held counts as memory of this one
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exit_code == 0:
        return ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{words[0]}: {type(result.exception).__name__}: {' '.join(str(result.exception).split())[:400]}"
    return f"{words[0]}: {' '.join(result.output.split())[-400:]}"


def totals(rows: list[dict[str, Any]]) -> list[str]:
    """A line a mapping: types, built, pruned, verified."""
    lines = []
    for mapping in dict.fromkeys(row["mapping"] for row in rows):
        reached = [STAGES.index(row["stage"]) for row in rows if row["mapping"] == mapping]
        counts = [f"{sum(r >= i for r in reached)} {name}" for i, name in enumerate(STAGES) if i]
        stock = sum(
            row["target"] == "stock" and row["stage"] == "verified" for row in rows if row["mapping"] == mapping
        )
        lines.append(f"{mapping}: {len(reached)} types, {', '.join(counts)}, {stock} of them as stock checkpoints")
    return lines
