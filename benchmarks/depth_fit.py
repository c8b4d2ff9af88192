"""Blocks, channels, or both: the loss of cuts after the closed-form fit, without training.

    python -m benchmarks.depth_fit --data FILE --text NAME=FILE [--text NAME=FILE …] [--cut layers=24 --cut ffn=1120 …]
        [--samples 32] [--windows 3] [--json FILE]

Blocks go by influence and channels by Wanda, scored and fitted on `--samples` windows of 256 tokens of `--data`. Loss in
nats a token on the first `--windows` windows of 512 tokens of each text; of the dense model and of cuts of blocks only,
also without the fit. Rows that the JSON file has are not computed again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.quality import MODEL, add, rows_in
from mptk import rewrite
from mptk.cli.options import parse_width
from mptk.cost.model import CostModel
from mptk.io import data, models
from mptk.ir import Analysis, Plan, Program, Samples, make_token_samples, resolve_plan
from mptk.methods import criteria
from mptk.methods.criteria.observe import sum_losses
from mptk.methods.reconstruct import gather_products
from mptk.staged.staged import EXECUTOR
from mptk.tasks import CAUSAL_LM
from passes.analysis.group import analyze_program
from passes.frontend.trace import trace_to_program
from passes.transforms.insert_masks import find_mask_sites


def losses(program: Program, texts: dict[str, Samples]) -> dict[str, float]:
    """Nats a token on each text."""
    found = {}
    for name, samples in texts.items():
        total = float(sum_losses(CAUSAL_LM, EXECUTOR, [program], samples.make_batches(512)))
        found[name] = round(total / CAUSAL_LM.count_predictions(samples), 3)
    return found


def cut(analysis: Analysis, plan: Plan) -> Program:
    return rewrite(analysis, plan, check=False)


def main(
    text: Annotated[list[str], typer.Option(help="NAME=FILE, may be repeated.")],
    calibration: Annotated[str, typer.Option("--data")],
    cuts: Annotated[list[str], typer.Option("--cut", help="Widths, as layers=28,ffn=1024; may be repeated.")],
    samples: int = 32,
    windows: int = 3,
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/depth_fit.json"),
) -> None:
    loaded = models.load(MODEL)
    model = loaded.model.eval().requires_grad_(False)
    analysis = analyze_program(trace_to_program(model, dynamic=True))
    given = data.load_evaluation_windows(loaded.tokenizer, calibration, 256, samples)
    paths = dict(each.split("=", 1) for each in text)
    held = {
        n: make_token_samples(data.load_evaluation_windows(loaded.tokenizer, f, 512, windows)) for n, f in paths.items()
    }
    done = [row["widths"] for row in rows_in(json_file) if (row["samples"], row["windows"]) == (samples, windows)]
    every = [dict(parse_width(each) for each in one.split(",") if one) for one in ["", *cuts]]
    scores = criteria.score_units(analysis, "wanda", given, families=["ffn", "layers"])
    plans = [(widths, criteria.select_units(analysis, scores, widths)) for widths in every if widths not in done]
    sites, resolved = find_mask_sites(analysis, model, ["ffn"]), [resolve_plan(analysis, plan) for _, plan in plans]
    products = gather_products(analysis, sites, resolved, make_token_samples(given))
    for (widths, plan), each in zip(plans, resolved, strict=True):
        row = {"samples": samples, "windows": windows, "widths": widths}
        row["removed"] = round(CostModel(analysis).compute_sparsity(widths), 3)
        if "layers" in widths:
            kept = plan.families["layers"].keep["model.layers"][0]
            row["blocks"] = [unit for unit in range(analysis.family("layers").size) if unit not in kept]
        if widths:
            row["fitted"] = losses(cut(analysis.with_weights(dict(products.fit_layers(each))), plan), held)
        if widths.keys() <= {"layers"}:
            row["loss"] = losses(cut(analysis, plan), held)
        print(row, flush=True)
        add(json_file, row)


if __name__ == "__main__":
    typer.run(main)
