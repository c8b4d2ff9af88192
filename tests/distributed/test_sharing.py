"""Several processes share calibration: each runs its part of the windows, and all find what one finds.

tests/methods/test_learning.py lets them train together.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from forks import start_ranks, wait_for_code
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mptk import FamilyPlan, Plan, analyze, testing, trace
from mptk.distributed import processes
from mptk.distributed.processes import Sharing, make_accelerator, run_once, share_batches
from mptk.errors import BudgetError, InputError
from mptk.ir import make_token_samples, resolve_plan
from mptk.methods import criteria, distil
from mptk.methods.maskprune.learner import adapt
from mptk.methods.reconstruct import list_consumers, reconstruct_consumers
from passes.transforms.insert_masks import find_mask_sites

# ---- what each process finds ----


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


def write_found(folder: Path) -> None:
    """What this process finds, in a file of its own."""
    said = {"rank": run_once(lambda: os.environ["RANK"]), "refused": refused()}
    tensors = found()
    save_file(tensors, folder / f"{os.environ['RANK']}.safetensors", metadata=said | {"fsdp": refused_fsdp()})


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    ranks = start_ranks(lambda: write_found(tmp_path))
    assert [wait_for_code(rank) for rank in ranks] == [0, 0]
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    expected = found()
    assert one.keys() == two.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(one[name], two[name]), name
        torch.testing.assert_close(one[name], tensor, rtol=1e-5, atol=1e-4 if name.startswith("distilled") else 1e-6)
    for rank in range(2):
        with safe_open(tmp_path / f"{rank}.safetensors", "pt") as file:
            assert file.metadata() == {"rank": "0", "refused": "sparsity", "fsdp": "fsdp_version"}


# ---- how they share ----


def test_every_batch_has_one_process() -> None:
    for count in (1, 2, 3, 5):
        for batches in range(count, 12):
            parts = [Sharing(count, index).own(range(batches)) for index in range(count)]
            assert [b for part in parts for b in part] == list(range(batches))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_alone_shares_nothing() -> None:
    assert share_batches(3) == Sharing()
    ones = torch.ones(2)
    assert Sharing().sum_all(ones) is ones
    assert Sharing().gather(ones) == [ones]


@pytest.mark.parametrize(("architecture", "block"), [("llama", "LlamaDecoderLayer"), ("gpt2", "GPT2Block")])
def test_blocks_are_found_without_knowing_the_model_inside_an_adapter_too(architecture: str, block: str) -> None:
    model = testing.make_decoder(architecture)
    for wrapped in (model, adapt(model, 2, 0)):
        assert [type(b).__name__ for b in processes.find_module_blocks(wrapped)] == [
            block
        ] * model.config.num_hidden_layers
    assert processes.find_module_blocks(torch.nn.Linear(2, 2)) == []
