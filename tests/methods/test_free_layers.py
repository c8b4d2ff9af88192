"""``--layers free``: the budget is divided over the layers, and the result is proven and read as every other.

It reaches for mptk.methods.division.layers: a division of made-up curves has a known answer.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import legalise_bare
from safetensors.torch import load_file, save_file
from small_modules import Residual
from transformers import LlamaForCausalLM

import mptk
from mptk import Plan, analyze, testing, trace
from mptk.compile.cut import find_changes
from mptk.cost.model import CostModel
from mptk.errors import BudgetError, FileError, InputError, PlanError
from mptk.io import Loaded
from mptk.ir import Analysis, resolve_plan
from mptk.methods.criteria import score_units, select_units
from mptk.methods.division.layers import LEVELS, Curve, choose_levels, divide, plan_whole_ends
from mptk.methods.division.selection import tie_layers
from mptk.protocols import Analysed
from mptk.tasks import CAUSAL_LM
from mptk.testing import expect_error
from mptk.trust import NO_CODE

SHORT = {"eval_windows": 1, "eval_length": 24}
SETTINGS = mptk.Settings(
    method="wanda", target="graph", layers="free", sparsity=0.214, align=4, samples=4, length=24, **SHORT
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Its middle layer adds almost nothing, so the widths of its layers will differ."""
    model = testing.draw_weights(testing.make_llama(layers=3))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e-3
    return testing.save_model(model, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def pruned(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "out"
    texts = {"data": [testing.SENTENCES] * 8, "eval_data": [testing.SENTENCES]}
    found = mptk.prune(checkpoint, out, SETTINGS, families="ffn", **texts)
    assert len({found.report.families[f"ffn.{layer}"]["width"] for layer in range(3)}) > 1
    return found


def test_the_layer_that_matters_least_loses_most():
    samples = torch.randn(16, 24)
    found = mptk.prune(Residual({0, 2}, 3, 64), settings=SETTINGS, example_inputs=(samples,), onnx=False)
    widths = {name: family["width"] for name, family in found.report.families.items() if family["of"] == 64}
    assert len(widths) == 3
    assert widths.pop(next(name for name in widths if name.endswith(".1"))) < min(widths.values())
    assert found.report.sparsity == pytest.approx(0.214, abs=0.01)
    assert set(found.report.splits) == {"free layers"}  # no equal widths give this sparsity
    assert not [note for note in found.report.notes if "equal layers" in note]


def test_it_is_proven_and_verified_with_its_graph_which_writes_text_as_the_cut_model_does(pruned):
    assert pruned.folder is not None
    stages = {row["stage"]: row["ok"] for row in pruned.report.proof}
    assert all(stages.values())
    assert pruned.report.families["kv_groups"] == {"of": 2, "width": 2, "layers": 3}
    assert any("ONNX" in stage for stage in stages)
    assert mptk.verify(pruned.folder)
    ids = torch.tensor([testing.make_tokenizer()("the quick brown")["input_ids"]])
    with torch.no_grad():
        token = int(pruned.model(ids)[0, -1].argmax())
    (text,) = mptk.generate(pruned.folder, "the quick brown", max_new_tokens=1)
    assert text == testing.make_tokenizer().decode([token], skip_special_tokens=True)


def test_a_width_of_all_layers_stays_that_of_all_and_a_family_that_is_left_whole_is_named_once():
    found = prune_module(Blocks(), layers="free", widths={"ffn.1": 24}, sparsity=0.3).report.families
    assert {f["width"] for name, f in found.items() if name.startswith("ffn.1")} == {24}
    found = prune_module(Blocks(), layers="free", widths={"ffn.1": 40}).report.families
    assert found["ffn.1"] == {"of": 40, "width": 40, "layers": 2}
    assert {"ffn.2.0", "ffn.2.1"} <= found.keys()


@pytest.mark.features
def test_its_plan_cuts_the_same_model_again_for_a_graph_only(checkpoint, pruned):
    asked = {"plan": str(pruned.folder / "plan.json"), "data": [testing.SENTENCES] * 8, "onnx": False, **SHORT}
    again = mptk.prune(checkpoint, target="graph", **asked)
    assert again.report.families == pruned.report.families
    assert again.report.plan_sha256 == pruned.report.plan_sha256
    with expect_error(InputError, name="target"):
        mptk.prune(checkpoint, progress=None, **asked)


@pytest.fixture(scope="module")
def learned(checkpoint, tmp_path_factory):
    """MaskPrune's choice of units at widths that its division of the layers gave, and a graph that was trained."""
    out = tmp_path_factory.mktemp("learned") / "out"
    asked = {"method": "maskprune", "steps": 4, "batch": 2, "micro": 2, "lr": 1e-3}
    return mptk.prune(checkpoint, out, SETTINGS, families="ffn", data=[testing.SENTENCES] * 16, onnx=False, **asked)


def test_maskprune_learns_units_at_the_layers_widths_and_trains_the_graph(learned):
    assert learned.report.sparsity == pytest.approx(SETTINGS.sparsity, abs=SETTINGS.tolerance)
    assert learned.report.recovery["rank"] == 0
    assert set(learned.report.splits) == {"equal layers", "free layers"}
    stages = {row["stage"]: row["ok"] for row in learned.report.proof}
    assert {"learned masks", "trained model"} <= stages.keys()
    assert all(stages.values())


def test_a_graph_is_trained_again(learned):
    asked = {"steps": 2, "batch": 2, "micro": 2, "lr": 1e-3, "length": 24, **SHORT}
    found = mptk.recover(learned.folder, None, data=[testing.SENTENCES] * 16, onnx=False, **asked)
    assert found.report.families == learned.report.families
    moved = found.model.state_dict()
    assert any(not moved[name].equal(weight) for name, weight in learned.model.state_dict().items())


def test_a_graph_that_lacks_a_trained_weight_is_refused(checkpoint, learned, tmp_path):
    folder = shutil.copytree(learned.folder, tmp_path / "copy")
    weights, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    analysis = analyze(trace(LlamaForCausalLM.from_pretrained(checkpoint), dynamic=True))
    cut, report = resolve_plan(analysis, Plan.load(folder / "plan.json")), mptk.Report.read(folder)
    for damaged in (weights | {name: weights[name][:, 1:]}, {n: w for n, w in weights.items() if n != name}):
        save_file({n: w.contiguous() for n, w in damaged.items()}, folder / "model.safetensors")
        with expect_error(FileError, name=folder):
            find_changes(analysis, cut, folder, report, trust=NO_CODE)


def test_a_budget_that_no_tried_width_meets_is_refused():
    with expect_error(BudgetError, name="sparsity") as refused:
        prune_module(Residual({0, 2}, 3, 64), layers="free", sparsity=0.95, tolerance=0.01)
    (nearest,) = refused.value.nearest
    assert 0.9 < nearest < 0.95


@pytest.mark.features
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"target": "stock"}, "target"),
        ({"target": "stock", "layers": "0-1"}, "target"),
        ({"target": "stock", "layers": "uniform", "keep": ("ffn.0",)}, "target"),
        ({"budget": "latency"}, "budget"),
        ({"budget": "latency", "layers": "uniform", "keep": ("ffn.0",)}, "budget"),
        ({"layers": "loose"}, "layers"),
        ({"layers": "2-0"}, "layers"),
        ({"families": ("ffn.1",), "layers": "1", "keep": ("ffn.1",)}, "keep"),
    ],
)
def test_what_cannot_be_divided_is_refused(checkpoint, tmp_path, change, name):
    with expect_error(InputError, name=name):
        mptk.prune(checkpoint, tmp_path / "out", SETTINGS, data=[testing.SENTENCES], **change)


@cache
def analyse_llama() -> Analysis:
    return analyze(trace(testing.make_llama(layers=3), dynamic=True))


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"layers": "1,7"}, "layers"),
        ({"layers": "0-1", "families": ("hidden",)}, "hidden"),
        ({"layers": "0-1", "widths": {"ffn.2": 32}}, "ffn.2"),
        ({"families": ("ffn.3",)}, "ffn.3"),
        ({"align": "fnn=32"}, "fnn"),
        ({"align": "ffn.1=32"}, "align"),
        ({"keep": ("fnn.1",)}, "fnn.1"),
        ({"families": ("ffn.1",), "keep": ("ffn",)}, "ffn.1"),
    ],
)
def test_layers_that_contradict_the_model_or_each_other_are_refused(asked, name):
    with expect_error(InputError, name=name):
        tie_layers(analyse_llama(), mptk.Settings(method="wanda", target="graph", **asked))


def prune_module(module: torch.nn.Module, **asked: Any) -> mptk.Pruned:
    """By magnitude, a tenth less."""
    how = {"sparsity": 0.1, "tolerance": 0.05, "method": "magnitude", "onnx": False, "progress": None}
    return mptk.prune(module, settings=SETTINGS, example_inputs=(torch.randn(16, 24),), **{**how, **asked})


def list_widths(module: torch.nn.Module, **asked: object) -> dict[str, int]:
    """Family or layer → units that stay, of those that were cut."""
    found = prune_module(module, **{"layers": "uniform", **asked})
    assert found.report.sparsity == pytest.approx(0.1, abs=0.05)
    return {name: family["width"] for name, family in found.report.families.items() if family["width"] < family["of"]}


@pytest.mark.parametrize(
    ("make", "asked", "layers", "widths"),
    [
        (lambda: Residual(set(), 3, 64), {"keep": ("ffn.0",), "families": ("ffn",)}, {"ffn.1", "ffn.2"}, 1),
        (lambda: Blocks(), {"layers": "2-3", "families": ("ffn.1.1", "ffn.2")}, {"ffn.1.1", "ffn.2.1"}, 2),
    ],
    ids=["all but one", "both"],
)
def test_only_the_named_layers_are_cut(make, asked, layers, widths):
    found = list_widths(make(), **asked)
    assert (found.keys(), len(set(found.values()))) == (layers, widths)


def test_a_layer_has_a_width_of_its_own_and_free_layers_leave_out_those_that_are_kept():
    """The one that would lose most is kept."""
    found = list_widths(Residual(set(), 3, 64), families=("ffn",), widths={"ffn.1": 60})
    assert found["ffn.0"] == found["ffn.2"] < found["ffn.1"] == 60
    found = list_widths(Residual({0, 2}, 3, 64), families=("ffn",), keep=("ffn.1",), layers="free")
    assert found.keys() <= {"ffn.0", "ffn.2"}


class Blocks(torch.nn.Module):
    """Residual blocks of two inner widths by turns, which make two families of two layers each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Residual(set(), 1, 64 if i % 2 else 40) for i in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_range_of_layers_counts_the_models_blocks():
    found = prune_module(Blocks(), layers="3", tolerance=0.1)
    cut = {layer for family in found.plan.families.values() if family.width < family.of for layer in family.keep}
    assert {layer.split(".")[1] for layer in cut} == {"3"}


def test_a_plan_names_no_unit_twice():
    whole = {"width": 32, "of": 64, "keep": {f"model.layers.{i}.mlp": "0-31" for i in range(3)}}
    layer = {"width": 16, "of": 64, "keep": {"model.layers.1.mlp": "0-15"}}
    plan = Plan.from_json({"format": "mptk-plan/1", "families": {"ffn": whole, "ffn.1": layer}})
    with expect_error(PlanError, name="ffn.1"):
        resolve_plan(analyse_llama(), plan)


@pytest.mark.parametrize(
    ("asked", "tied", "whole"),
    [
        ({}, {"ffn": (0, 1, 2)}, set()),
        ({"layers": "1-2"}, {"ffn": (1, 2), "ffn.0": (0,)}, {"ffn.0"}),
        ({"keep": ("ffn.1",)}, {"ffn": (0, 2), "ffn.1": (1,)}, {"ffn.1"}),
        ({"widths": {"ffn": 40, "ffn.1": 60}}, {"ffn": (0, 2), "ffn.1": (1,)}, set()),
        ({"families": ("ffn.1",)}, {"ffn": (1,), "ffn.0": (0,), "ffn.2": (2,)}, {"ffn.0", "ffn.2"}),
        ({"families": ("ffn.1",), "widths": {"ffn.1": 60}}, {f"ffn.{i}": (i,) for i in range(3)}, {"ffn.0", "ffn.2"}),
    ],
)
def test_settings_tie_layers(asked, tied, whole):
    found = tie_layers(analyse_llama(), mptk.Settings(method="wanda", target="graph", **asked))
    assert {v.name: v.layers for v in found.variables.values() if v.family.name == "ffn"} == tied
    assert {name for name in found.whole if name.startswith("ffn")} == whole
    assert found.untied >= ({"ffn"} if len(tied) > 1 else set())
    assert found.keep == ()


def test_tied_layers_cost_what_they_cost_one_by_one():
    found = tie_layers(analyse_llama(), mptk.Settings(method="wanda", target="graph", layers="1-2"))
    cost = CostModel(analyse_llama())
    assert cost.tie(found.variables).compute_sparsity({"ffn": 32}) == cost.compute_sparsity({"ffn.1": 32, "ffn.2": 32})
    assert cost.compute_sparsity({"ffn": 32}) == cost.compute_sparsity({f"ffn.{i}": 32 for i in range(3)})


def test_no_other_division_loses_less():
    """Against all divisions of the same layers, with convex curves."""
    cost, steepness = CostModel(analyse_llama()), {"ffn.0": 5.0, "ffn.1": 0.2, "ffn.2": 1.0}
    ladder = tuple(range(4, 65, 4))
    levels = choose_levels(ladder)

    def lose(name: str, width: float) -> float:
        return steepness[name] * (1 - width / 64) ** 2

    def lose_all(widths: Mapping[str, float]) -> float:
        return sum(lose(name, width) for name, width in widths.items())

    curves = {name: Curve(levels, tuple(lose(name, w) for w in levels)) for name in steepness}
    found = divide(curves, dict.fromkeys(steepness, ladder), cost, 0.2)
    every = (dict(zip(steepness, widths, strict=True)) for widths in itertools.product(levels, repeat=3))
    assert cost.compute_sparsity(found) == pytest.approx(0.2, abs=0.01)
    assert lose_all(found) <= min(lose_all(widths) for widths in every if cost.compute_sparsity(widths) >= 0.2)


def test_levels_are_legal_and_fall_from_the_whole():
    assert choose_levels(range(4, 65, 4)) == (64, *(round(64 * share) for share in LEVELS))
    assert choose_levels([1, 2, 3]) == (3, 2, 1)
    assert choose_levels([7]) == (7,)


def test_a_curve_that_rises_again_is_read_as_level():
    """Noise may make a narrower layer seem better than a wider one."""
    cost = CostModel(analyse_llama())
    curves = {"ffn.0": Curve((64, 32, 16), (0.0, 0.4, 0.1)), "ffn.1": Curve((64, 32, 16), (0.0, 0.1, 0.2))}
    widths = divide(curves, dict.fromkeys(curves, (16, 32, 48, 64)), cost, cost.compute_sparsity({"ffn.1": 16}))
    assert widths == {"ffn.0": 64, "ffn.1": 16}


# ---- what whole first and last layers would have saved, which a run with equal layers says ----

DEPTH = 6
EQUAL = mptk.Settings(method="wanda", sparsity=0.3, align=1, samples=8, onnx=False)


def note(strong: set[int]) -> str:
    found = mptk.prune(Residual(strong, DEPTH, 48), None, EQUAL, example_inputs=(torch.randn(8, 24),))
    return next((n for n in found.report.notes if "equal layers" in n), "")


def test_it_is_said_only_if_the_first_and_last_layers_matter_most():
    said = note({0, DEPTH - 1})
    less, alike, whole = map(float, re.findall(r"\d+\.\d+", said))
    assert less == pytest.approx(alike - whole, abs=0.011)
    assert f"--layers 1-{DEPTH - 2} cuts so" in said
    assert note({2, 3}) == ""  # whole ends would be worse


def test_whole_ends_save_as_much_unless_the_user_gives_widths():
    model = testing.make_llama(layers=DEPTH)
    analysis = analyze(trace(model, dynamic=True))
    dense = Analysed(Loaded(model, None, "llama", Path()), CAUSAL_LM, analysis)
    asked = mptk.Settings(method="random", sparsity=0.2, align=1, families=("ffn",))
    prepared = legalise_bare(dense, asked)
    scores, equal = score_units(analysis, "random"), prepared.candidates[0].widths
    plan = plan_whole_ends(prepared, scores, select_units(analysis, scores, equal))
    assert set(plan.families) == {f"ffn.{layer}" for layer in range(1, DEPTH - 1)}
    assert prepared.cost.compute_sparsity(equal) == pytest.approx(0.2, abs=0.01)
    saved = [1 - width / 64 for width in plan.widths.values()]
    assert sum(saved) / DEPTH == pytest.approx(1 - equal["ffn"] / 64, abs=0.01)
    given = legalise_bare(dense, replace(asked, widths={"ffn": 34}))
    assert plan_whole_ends(given, scores, select_units(analysis, scores, {"ffn": 34})) is None
