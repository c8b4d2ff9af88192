"""Several processes share calibration: each runs its part of the windows, and all find what one finds."""

from __future__ import annotations

import os
from pathlib import Path

import architectures
import torch
from forks import on_two
from inside import changed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mptk import FamilyPlan, MptkError, Plan, analyze, trace
from mptk.distributed.processes import Sharing, once, sharing
from mptk.ir.resolved_plan import resolve_plan
from mptk.ir.samples import next_tokens
from mptk.methods import criteria, distil
from mptk.methods.reconstruct import consumers, reconstruct_consumers
from passes.transforms.insert_masks import find_mask_sites


def found() -> dict[str, Tensor]:
    """Scores, fitted and distilled weights of a tiny model, in batches of two windows."""
    model, windows = architectures.model("mixtral"), architectures.tokens(7, 9)
    analysis = analyze(trace(model, dynamic=True))
    with changed() as inside:
        for bound in ("criteria.observe.OBSERVED_TOKENS", "criteria.gradients.GRADIENT_TOKENS", "distil.STEP"):
            inside.bound(f"mptk.methods.{bound}", 18)
        result = {
            f"{name}.{family}": values
            for name in ("wanda", "flap", "taylor")
            for family, values in criteria.score(analysis, name, windows, families=["q_heads"]).items()
        }
        scores = {family: result[f"wanda.{family}"] for family in ("q_heads",)}
        cut = resolve_plan(analysis, criteria.select(analysis, scores, {"q_heads": 2}))
        sites = find_mask_sites(analysis, model, ["q_heads"])
        fitted = dict(reconstruct_consumers(analysis, sites, cut, {}, next_tokens(windows)))
        how = distil.Schedule(epochs=1, rate=1e-3)
        trained = distil.distil_blocks(analysis, cut, consumers(sites), fitted, next_tokens(windows), how).weights
        return result | fitted | made_up_for() | {f"distilled.{name}": trained[name] for name in trained}


def made_up_for() -> dict[str, Tensor]:
    """The layer before a removed block, fitted to the residual stream after it."""
    analysis = analyze(trace(architectures.model("llama"), dynamic=True))
    cut = resolve_plan(analysis, Plan({"layers": FamilyPlan(1, 2, {"model.layers": ((0,),)})}))
    return dict(reconstruct_consumers(analysis, [], cut, {}, next_tokens(architectures.tokens(10, 9))))


def refused() -> str:
    """The error that all get if the first process finds nothing; the others would find something."""

    def find() -> str:
        if os.environ["RANK"] == "0":
            raise MptkError("no width meets the budget")
        return "something"

    try:
        return once(find)
    except MptkError as error:
        return str(error)


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    def run() -> None:
        said = {"rank": once(lambda: os.environ["RANK"]), "refused": refused()}
        save_file(found(), tmp_path / f"{os.environ['RANK']}.safetensors", metadata=said)

    expected = found()  # what is traced here is traced in no fork
    on_two(run)
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert one.keys() == two.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(one[name], two[name]), name
        torch.testing.assert_close(one[name], tensor, rtol=1e-5, atol=1e-4 if name.startswith("distilled") else 1e-6)
    for rank in range(2):
        with safe_open(tmp_path / f"{rank}.safetensors", "pt") as file:
            assert file.metadata() == {"rank": "0", "refused": "no width meets the budget"}


def test_every_batch_has_one_process() -> None:
    for count in (1, 2, 3, 5):
        for batches in range(count, 12):
            parts = [Sharing(count, index).own(range(batches)) for index in range(count)]
            assert [b for part in parts for b in part] == list(range(batches))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_alone_shares_nothing() -> None:
    assert sharing(3) == Sharing()
    ones = torch.ones(2)
    assert Sharing().total(ones) is ones
    assert Sharing().all(ones) == [ones]
