"""A run that computes in bfloat16 on request: near to float32, and nothing that is proven runs that way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mptk import Plan, Report, Settings, prune
from mptk.config import Learning
from mptk.run.minutes import fill_in
from mptk.testing import Laboratory


def share_kept(one: Plan, other: Plan) -> float:
    """The least share of a layer's units that both plans keep."""
    return min(
        len(set(a) & set(b)) / len(a)
        for name, family in one.families.items()
        for layer, rows in family.keep.items()
        for a, b in zip(rows, other.families[name].keep[layer], strict=True)
    )


def test_a_run_keeps_nearly_the_same_units_and_its_folder_passes_the_same_proof(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    exact = laboratory.prune("decoder", tmp_path / "exact", reconstruct=True)
    plan, report = Plan.load(exact / "plan.json"), Report.read(exact)
    families = tuple(plan.families)
    out = laboratory.prune(
        "decoder",
        tmp_path / "out",
        compute_dtype="bfloat16",
        reconstruct=True,
        families=families,
        widths=dict(plan.widths),
    )
    found = Report.read(out)
    assert share_kept(plan, Plan.load(out / "plan.json")) >= 0.9
    assert found.weights_sha256 != report.weights_sha256  # what was fitted
    assert found.quality["dense"] == report.quality["dense"]
    assert all(row["ok"] and row["tolerance"] <= 1e-4 for row in found.proof)


def test_training_takes_the_type_too_unless_a_precision_is_given() -> None:
    settings = Settings(compute_dtype="bfloat16", learning=Learning(steps=4))
    assert fill_in(settings).learning.precision == "bf16"
    assert fill_in(replace(settings, learning=Learning(precision="fp16"))).learning.precision == "fp16"
    assert fill_in(replace(settings, compute_dtype="float32")).learning.precision == "no"


class Float(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def test_a_pruned_module_runs_in_an_autocast() -> None:
    """The trace notes the type that a conversion starts from, which an autocast changes."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 12), Float(), torch.nn.Linear(12, 4))
    x = torch.randn(3, 8)
    small = prune(net, example_inputs=x, method="magnitude", sparsity=0.25, align=1, progress=None).model
    with torch.autocast("cpu", torch.bfloat16):
        assert small(x).shape == (3, 4)
