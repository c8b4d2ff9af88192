"""Which blocks to remove: influence, greedy, or the worth v of a block's mask (docs/maskprune.md), without training.

    python -m benchmarks.depth_choice --data FILE --text NAME=FILE [--text NAME=FILE …] [--by influence,v,tempered,alone]
        [--removed 6] [--windows 6] [--json FILE]

Calibration: 8 windows of 256 tokens of `--data` (`alone` and `greedy`: the first 1024 tokens). Loss in nats a token on
the first windows of each text. `v` is ½ F + d of MaskPrune's own saliency; in `tempered` F is combined with the
influence, as it is with Wanda's score for channels. `alone` is the loss without that block alone. Rows that the JSON
file has are not computed again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.quality import MODEL, add, rows_in
from mptk.io import data, models
from mptk.ir import Analysis, FamilyPlan, Plan, Samples, make_token_samples, resolve_plan
from mptk.methods import criteria
from mptk.methods.criteria import Calibration
from mptk.methods.criteria.fisher import combine_curvature
from mptk.methods.criteria.greedy import GREEDY
from mptk.methods.maskprune.solver import Solver
from mptk.staged.staged import EXECUTOR
from mptk.tasks import CAUSAL_LM
from passes.analysis.group import analyze_program
from passes.frontend.trace import trace_to_program
from passes.transforms.insert_masks import InsertedMasks, find_mask_sites
from passes.transforms.masked_reference import mask


def loss(analysis: Analysis, gone: list[int], samples: Samples) -> float:
    """Nats a token without the blocks ``gone``."""
    (depth,) = analysis.depths
    kept = tuple(unit for unit in range(depth.size) if unit not in gone)
    plan = Plan({depth.name: FamilyPlan(len(kept), depth.size, {depth.stack.module: (kept,)})})
    batches = samples.make_batches(256)
    outputs = EXECUTOR.run_programs(
        [mask(analysis, resolve_plan(analysis, plan))], [batch.tensors for batch in batches]
    )
    total = sum(float(CAUSAL_LM.compute_loss(next(outputs), batch)) for batch in batches)
    return total / CAUSAL_LM.count_predictions(samples)


def observed(analysis: Analysis, model: Any, samples: Samples) -> Solver:
    """MaskPrune's solver after its saliency: F and d of each block."""
    (depth,) = analysis.depths
    solver = Solver({depth.name: (1, 1, depth.size)}, lambda widths: 1.0, 0.5, 1, blocks={depth.name: []})
    masks = InsertedMasks(model, find_mask_sites(analysis, model, [depth.name]), solver.get_mask, solver.watch)
    for part in samples.split(2):
        output = model(**part.inputs, use_cache=False).logits
        (CAUSAL_LM.compute_sensitivity(output, part) / CAUSAL_LM.count_predictions(part)).backward()
        solver.observe(len(part) * part.positions)
        solver.clear()
    masks.enabled = False
    return solver


def scores(by: str, analysis: Analysis, model: Any, windows: Tensor, removed: int) -> Tensor:
    """A score for each block; the lowest go."""
    samples, (depth,) = make_token_samples(windows), analysis.depths
    if by == "influence":
        return criteria.score_units(analysis, by, windows, families=[depth.name])[depth.name].flatten()
    if by == "greedy":
        given = Calibration(analysis, [depth.tie()], samples, removals={depth.name: removed})
        return criteria.measure_and_score(GREEDY, given)[0][depth.name].flatten()
    if by == "alone":
        return torch.tensor([loss(analysis, [unit], samples.make_batches(1024)[0]) for unit in range(depth.size)])
    solver = observed(analysis, model, samples)
    if by == "tempered":
        prior = criteria.score_units(analysis, "influence", windows, families=[depth.name])[depth.name]
        return (
            0.5 * combine_curvature(solver.compute_curvature(depth.name), prior) + solver.compute_beyond(depth.name)
        ).flatten()
    return solver.compute_saliency(depth.name).flatten()


def main(
    text: Annotated[list[str], typer.Option(help="NAME=FILE, may be repeated.")],
    calibration: Annotated[str, typer.Option("--data")],
    by: str = "influence,v,tempered,alone",
    removed: int = 6,
    windows: int = 6,
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/depth_choice.json"),
) -> None:
    loaded = models.load(MODEL)
    model = loaded.model.eval().requires_grad_(False)
    analysis = analyze_program(trace_to_program(model, dynamic=True))
    given = data.load_evaluation_windows(loaded.tokenizer, calibration, 256, 8)
    texts = dict(each.split("=", 1) for each in text)
    held = {
        n: make_token_samples(data.load_evaluation_windows(loaded.tokenizer, f, 256, windows)) for n, f in texts.items()
    }
    for each in by.split(","):
        if any((row["by"], row["removed"], row["windows"]) == (each, removed, windows) for row in rows_in(json_file)):
            continue
        found = scores(each, analysis, model, given, removed)
        gone = sorted(found.argsort(stable=True)[:removed].tolist())
        losses = {name: round(loss(analysis, gone, samples), 3) for name, samples in held.items()}
        row = {"by": each, "removed": removed, "windows": windows, "blocks": gone, "loss": losses}
        print(row, flush=True)
        add(json_file, row | {"scores": [round(float(score), 4) for score in found]})


if __name__ == "__main__":
    typer.run(main)
