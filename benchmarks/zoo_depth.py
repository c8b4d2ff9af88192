"""The zoo's depth: for every model type, whether whole residual blocks can be removed, proven, and held by its class.

    python -m benchmarks.zoo_depth [--mapping NAME] [--types A,B] [--jobs N] [--json FILE] [--quick]

Each type runs in a process of its own (``benchmarks/zoo.py``): a tiny random model is traced, and of every list of
blocks about 60 % stay, drawn at random. The cut program must equal the dense one whose removed blocks add nothing
(1e-5 of the largest logit), and their removal must move the output. Then the model's own class is asked how many blocks
it holds, and must give the cut program's logits (``benchmarks/zoo_stock.py``). The full sweep of ``benchmarks.zoo``
proves the same among all families; this one takes a fraction of its time.
"""

from __future__ import annotations

import random
from typing import Annotated, Any

import torch
import typer

from benchmarks.tiny_models import MAPPINGS, model_types, tiny_model
from benchmarks.zoo import (
    Jobs,
    OneMapping,
    RowsFile,
    Types,
    ask_stock,
    calibrate,
    describe,
    disprove,
    rounding,
    saved_rows,
    sweep,
)
from benchmarks.zoo_plans import random_plan
from benchmarks.zoo_stock import depth_acceptance
from passes.analysis.blocks import explain_no_stack
from passes.analysis.group import analyze_program
from passes.frontend.trace import trace_to_program

STAGES = ("none", "analysed", "found", "proven", "held")
QUICK = 16


def run_type(mapping: str, model_type: str) -> dict[str, Any]:
    """One row, from the first of three sets of random weights whose difference is not rounding alone.

    ``stage`` is the last of ``STAGES`` that passed (``held``: by its class, at some number of blocks of every list),
    ``reason`` why the next one did not. ``depths``: family → its blocks, and why they are not proven ("" if they are).
    ``depth``: family → what the class accepts.
    """
    row: dict[str, Any] = {}
    for seed in range(3):
        row = _run(mapping, model_type, seed)
        if not rounding(row["reason"]):
            break
    return row


def _run(mapping: str, model_type: str, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = {"type": model_type, "mapping": mapping, "stage": "none", "reason": ""}
    try:
        tiny = tiny_model(mapping, model_type, seed)
        calibrate(tiny)
        program = trace_to_program(tiny.wrapper, tiny.inputs)
        analysis = analyze_program(program)
    except Exception as error:
        return {**row, "reason": describe(error)}
    if not analysis.depths:
        return {**row, "stage": "analysed", "reason": explain_no_stack(program, analysis.facts)}
    rng, row["depths"] = random.Random(seed), {}
    with torch.no_grad():
        dense = program(*tiny.inputs)
        for family in analysis.depths:
            why = disprove(analysis, random_plan([family], rng), tiny.inputs, dense)
            row["depths"][family.name] = {"blocks": family.size, "proof": why}
    row |= ask_stock(analysis, tiny, "depth", depth_acceptance)
    wrong = "; ".join(f"{name}: {found['proof']}" for name, found in row["depths"].items() if found["proof"])
    refused = "; ".join(
        f"{n}: {f['reloaded'] or f['refusal']}" for n, f in row.get("depth", {}).items() if not _held(f)
    )
    refused = refused or row.get("stock_error", "")
    return {**row, "stage": "found" if wrong else "proven" if refused else "held", "reason": wrong or refused}


def _held(family: dict[str, Any]) -> bool:
    """Whether the class holds some number of blocks, with equal logits."""
    return bool(family["accepted"]) and not family["reloaded"]


def totals(rows: list[dict[str, Any]]) -> list[str]:
    """A line a mapping: types, and how many passed each stage."""
    lines = []
    for mapping in dict.fromkeys(row["mapping"] for row in rows):
        reached = [STAGES.index(row["stage"]) for row in rows if row["mapping"] == mapping]
        counts = [f"{name} {sum(r >= i for r in reached)}" for i, name in enumerate(STAGES) if i]
        lines.append(f"{mapping}: {len(reached)} types, {', '.join(counts)}")
    return lines


def main(
    mapping: OneMapping = "",
    types: Types = "",
    jobs: Jobs = 1,
    json_file: RowsFile = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"Every {QUICK}th type only")] = False,
) -> None:
    """Remove blocks of every model type at random, and ask its class; prints a row each and the totals."""
    rows = saved_rows(json_file)
    wanted = [(m, t) for m in MAPPINGS if mapping in ("", m) for t in model_types(m)[:: QUICK if quick else 1]]
    pairs = [(m, t) for m, t in wanted if not types or t in types.split(",")]
    for row in sweep(pairs, rows, jobs, json_file, run_type):
        said = f"{row['seconds']:6.1f}s  {row['reason'][:300]}"
        said = f"{row['seconds']:6.1f}s  {row['reason'][:300]}"
        print(f"{row['mapping']:20} {row['type']:28} {row['stage']:8} {said}", flush=True)
    print("\n".join(totals(rows)))


if __name__ == "__main__":
    typer.run(main)
