"""A cut with equal layers says what whole first and last layers would have saved.

It reaches for mptk.cost.model: a plan's budget is counted again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inside import Inside
from small_modules import Residual

import mptk
from mptk import Plan
from mptk.cost.model import CostModel
from mptk.protocols.chain import Prepared

LAYERS = 10
SETTINGS = mptk.Settings(method="wanda", sparsity=0.3, align=1, samples=8, onnx=False)


def note(strong: set[int], **settings: object) -> str:
    found = mptk.prune(Residual(strong, LAYERS, 48), None, SETTINGS, example_inputs=(torch.randn(8, 24),), **settings)
    return next((n for n in found.report.notes if "equal layers" in n), "")


def test_it_is_said_if_the_first_and_last_layers_matter_most() -> None:
    said = note({0, LAYERS - 1})
    less, alike, whole = map(float, re.findall(r"\d+\.\d+", said))
    assert less == pytest.approx(alike - whole, abs=0.011)
    assert said.endswith(f"with --target graph, --layers 1-{LAYERS - 2} cuts so, and --layers free divides the budget")


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


def test_whole_ends_save_as_much(inside: Inside) -> None:
    found: list[tuple[Prepared, Plan]] = []

    def planned(whole_ends: Callable[..., Plan], prepared: Prepared, *given: Any) -> Plan:
        found.append((prepared, whole_ends(prepared, *given)))
        return found[-1][1]

    inside.around("mptk.methods.division.layers.plan_whole_ends", planned)
    inside.gives("mptk.methods.division.layers.measure_masked_losses", (2.0, 1.0))
    assert note(set())
    ((prepared, plan),) = found
    assert set(plan.families) == {f"ffn.{layer}" for layer in range(1, LAYERS - 1)}
    assert CostModel(prepared.analysis).compute_sparsity(plan.widths) == pytest.approx(0.3, abs=0.02)
