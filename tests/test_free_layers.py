"""``--layers free``: the budget is divided over the layers, and the result is proven and read as every other."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import toy_checkpoints as toys

import mptk
from mptk.cost.model import CostModel
from mptk.errors import MptkError
from mptk.ir.plan import Plan
from mptk.ir.resolved_plan import resolve_plan
from mptk.methods.division import LEVELS, Curve, divide, levels
from passes.analysis.group import analyze
from passes.frontend.trace import trace

SETTINGS = mptk.Settings(
    method="wanda",
    target="graph",
    layers="free",
    sparsity=0.214,
    multiple=4,
    samples=4,
    length=24,
    eval_windows=2,
    eval_length=24,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder whose second MLP adds nearly nothing to the residual stream, and whose first and last add much."""
    model = toys.llama(layers=3)
    with torch.no_grad():
        for layer, scale in zip(model.model.layers, (30, 1e-3, 30), strict=True):
            layer.mlp.down_proj.weight *= scale
    folder = tmp_path_factory.mktemp("dense")
    model.save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pruned(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> mptk.Pruned:
    out = tmp_path_factory.mktemp("pruned") / "out"
    found = mptk.prune(checkpoint, out, SETTINGS, families="ffn", data=[toys.TEXT] * 8)
    assert found is not None
    return found


def test_the_layer_that_matters_least_loses_most(pruned: mptk.Pruned) -> None:
    widths = [pruned.report.families[f"ffn.{layer}"]["width"] for layer in range(3)]
    assert widths[1] < min(widths[0], widths[2])
    assert pruned.report.sparsity == pytest.approx(0.214, abs=0.01)
    assert pruned.report.losses["free layers"] < pruned.report.losses["equal layers"]
    assert pruned.report.families["kv_groups"] == {"of": 2, "width": 2, "layers": 3}


def test_it_is_proven_and_verified_with_its_graph(pruned: mptk.Pruned) -> None:
    assert pruned.folder is not None
    stages = {row["stage"]: row["ok"] for row in pruned.report.proof}
    assert all(stages.values())
    assert any("ONNX" in stage for stage in stages)
    assert mptk.verify(pruned.folder)


def test_its_plan_cuts_the_same_model_again(checkpoint: str, pruned: mptk.Pruned, tmp_path: Path) -> None:
    assert pruned.folder is not None
    plan = str(pruned.folder / "plan.json")
    again = mptk.prune(checkpoint, tmp_path / "again", target="graph", plan=plan, data=[toys.TEXT] * 8, onnx=False)
    assert again is not None
    assert again.report.families == pruned.report.families
    assert again.report.plan_sha256 == pruned.report.plan_sha256


def test_a_width_of_all_layers_stays_that_of_all(checkpoint: str, tmp_path: Path) -> None:
    found = mptk.prune(checkpoint, tmp_path / "out", SETTINGS, widths={"q_heads": 2}, data=[toys.TEXT] * 8, onnx=False)
    assert found is not None
    assert {f["width"] for name, f in found.report.families.items() if name.startswith("q_heads.")} == {2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "stock"}, "a stock checkpoint has one width for all layers; use --target graph"),
        ({"method": "maskprune", "steps": 4}, "maskprune gives all layers one width; use a one-shot --method"),
        ({"budget": "latency"}, "use another --budget"),
        ({"layers": "loose"}, "no layers 'loose'; choose one of uniform, free"),
    ],
)
def test_what_cannot_be_divided_is_refused(checkpoint: str, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(MptkError, match=message):
        mptk.prune(checkpoint, tmp_path / "out", SETTINGS, data=[toys.TEXT], **change)


def test_a_plan_names_no_unit_twice() -> None:
    analysis = analyze(trace(toys.llama(), dynamic=True))
    keep = {"model.layers.0.mlp": "0-31", "model.layers.1.mlp": "0-31"}
    whole = {"width": 32, "of": 64, "keep": keep}
    layer = {"width": 16, "of": 64, "keep": {"model.layers.1.mlp": "0-15"}}
    plan = Plan.from_json({"format": "mptk-plan/1", "families": {"ffn": whole, "ffn.1": layer}})
    with pytest.raises(MptkError, match=r"ffn\.1 names units of model\.layers\.1\.mlp that another family names, too"):
        resolve_plan(analysis, plan)


def test_no_other_division_loses_less() -> None:
    """Against all divisions of the same layers, with convex curves."""
    whole = analyze(trace(toys.llama(layers=3), dynamic=True))
    cost = CostModel(whole.divided(["ffn"]))
    steepness = {"ffn.0": 5.0, "ffn.1": 0.2, "ffn.2": 1.0}
    ladder = tuple(range(4, 65, 4))

    def loss(name: str, width: float) -> float:
        return steepness[name] * (1 - width / 64) ** 2

    widths = levels(ladder)
    curves = {name: Curve(widths, tuple(loss(name, w) for w in widths)) for name in steepness}
    found = divide(curves, dict.fromkeys(steepness, ladder), cost, 0.2)
    best = min(
        (w for w in itertools.product(widths, repeat=3) if cost.sparsity(dict(zip(steepness, w, strict=True))) >= 0.2),
        key=lambda w: sum(loss(name, width) for name, width in zip(steepness, w, strict=True)),
    )
    assert cost.sparsity(found) == pytest.approx(0.2, abs=0.01)
    assert sum(loss(n, w) for n, w in found.items()) <= sum(loss(n, w) for n, w in zip(steepness, best, strict=True))


def test_levels_are_legal_and_fall_from_the_whole() -> None:
    assert levels(range(4, 65, 4)) == (64, *(round(64 * share) for share in LEVELS))
    assert levels([1, 2, 3]) == (3, 2, 1)
    assert levels([7]) == (7,)


def test_a_curve_that_rises_again_is_read_as_level() -> None:
    """Noise may make a narrower layer seem better than a wider one."""
    cost = CostModel(analyze(trace(toys.llama(), dynamic=True)).divided(["ffn"]))
    curves = {"ffn.0": Curve((64, 32, 16), (0.0, 0.4, 0.1)), "ffn.1": Curve((64, 32, 16), (0.0, 0.1, 0.2))}
    widths = divide(curves, dict.fromkeys(curves, (16, 32, 48, 64)), cost, cost.sparsity({"ffn.1": 16}))
    assert widths == {"ffn.0": 64, "ffn.1": 16}
