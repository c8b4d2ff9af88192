"""Run by two processes: scores, fitted and distilled weights of a tiny model, saved by each into a file of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mptk import FamilyPlan, Plan, analyze, testing, trace
from mptk.distributed.processes import make_accelerator, run_once
from mptk.errors import BudgetError, InputError
from mptk.ir import make_token_samples, resolve_plan
from mptk.methods import criteria, distil
from mptk.methods.reconstruct import list_consumers, reconstruct_consumers
from passes.transforms.insert_masks import find_mask_sites


def found() -> dict[str, Tensor]:
    model, windows = testing.make_decoder("mixtral"), testing.draw_tokens(80, 31)  # several batches of each kind
    analysis = analyze(trace(model, dynamic=True))
    result = {
        f"{name}.{family}": values
        for name in ("wanda", "flap", "taylor")
        for family, values in criteria.score_units(analysis, name, windows, families=["q_heads"]).items()
    }
    scores = {family: result[f"wanda.{family}"] for family in ("q_heads",)}
    cut = resolve_plan(analysis, criteria.select_units(analysis, scores, {"q_heads": 2}))
    sites = find_mask_sites(analysis, model, ["q_heads"])
    fitted = dict(reconstruct_consumers(analysis, sites, cut, {}, make_token_samples(windows)))
    how = distil.Schedule(epochs=1, rate=1e-3)
    trained = distil.distil_blocks(
        analysis, cut, list_consumers(sites), fitted, make_token_samples(windows), how
    ).weights
    return result | fitted | made_up_for() | {f"distilled.{name}": trained[name] for name in trained}


def made_up_for() -> dict[str, Tensor]:
    """The layer before a removed block, fitted to the residual stream after it."""
    analysis = analyze(trace(testing.make_decoder("llama"), dynamic=True))
    cut = resolve_plan(analysis, Plan({"layers": FamilyPlan(1, 2, {"model.layers": ((0,),)})}))
    return dict(reconstruct_consumers(analysis, [], cut, {}, make_token_samples(testing.draw_tokens(10, 9))))


def refused() -> str:
    """The error that all get if the first process finds nothing; the others would find something."""

    def find() -> str:
        if os.environ["RANK"] == "0":
            raise BudgetError("no width meets the budget", name="sparsity")
        return "something"

    try:
        return run_once(find)
    except BudgetError as error:
        return error.name


def refused_fsdp() -> str:
    """The setting that the error names if FSDP's first version was launched."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    try:
        make_accelerator("no")
    except InputError as error:
        return error.name
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    file = Path(sys.argv[1]) / f"{os.environ['RANK']}.safetensors"
    said = {"rank": run_once(lambda: os.environ["RANK"]), "refused": refused()}
    tensors = found()
    save_file(tensors, file, metadata=said | {"fsdp": refused_fsdp()})
