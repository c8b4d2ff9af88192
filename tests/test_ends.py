"""A cut with equal layers says what whole first and last layers would have saved."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import mptk
from mptk.cost.model import CostModel
from mptk.ir.plan import Plan
from mptk.methods.division import ends
from mptk.protocols.chain import Prepared

LAYERS = 10
SETTINGS = mptk.Settings(method="wanda", sparsity=0.3, multiple=1, samples=8, onnx=False)


class Residual(nn.Module):
    """Ten layers, each added to what comes before, ``strong`` ones a thousand times as much as the others."""

    def __init__(self, strong: set[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleList(nn.Linear(24, 48) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(48, 24) for _ in range(LAYERS))
        with torch.no_grad():
            for layer in set(range(LAYERS)) - strong:
                self.down[layer].weight *= 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


def note(strong: set[int], **settings: object) -> str:
    found = mptk.prune(Residual(strong), None, SETTINGS, example_inputs=(torch.randn(8, 24),), **settings)
    assert found is not None
    return next((n for n in found.report.notes if "equal layers" in n), "")


def test_it_is_said_if_the_first_and_last_layers_matter_most() -> None:
    said = note({0, LAYERS - 1})
    less, alike, whole = map(float, re.findall(r"\d+\.\d+", said))
    assert less == pytest.approx(alike - whole, abs=0.011)
    assert "--layers free" in said


@pytest.mark.parametrize(
    ("strong", "settings"),
    [
        ({4, 5}, {}),  # whole ends would be worse
        ({0, LAYERS - 1}, {"layers": "free"}),  # the layers are not alike
        ({0, LAYERS - 1}, {"widths": {"ffn": 34}}),  # the user's widths
    ],
)
def test_nothing_is_said_else(strong: set[int], settings: dict[str, object]) -> None:
    assert note(strong, **settings) == ""


def test_whole_ends_save_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(ends, "masked_losses", lambda prepared, plans, *rest: (2.0, 1.0))
    whole_ends = ends.whole_ends

    def kept(prepared: Prepared, *given: object) -> Plan | None:
        made.append((prepared.analysis, whole_ends(prepared, *given)))
        return made[-1][1]

    monkeypatch.setattr(ends, "whole_ends", kept)
    assert note(set())
    ((analysis, plan),) = made
    assert set(plan.families) == {f"ffn.{layer}" for layer in range(1, LAYERS - 1)}
    assert CostModel(analysis.divided(plan.divided)).sparsity(plan.widths) == pytest.approx(0.3, abs=0.02)
