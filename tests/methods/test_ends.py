"""A cut with equal layers says what whole first and last layers would have saved.

It reaches for mptk.methods.division.layers: which plan is compared.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lab import legalise_bare
from small_modules import Residual

import mptk
from mptk import testing
from mptk.io import models
from mptk.methods.criteria import score_units, select_units
from mptk.methods.division.layers import plan_whole_ends
from mptk.protocols import Analysed
from mptk.tasks import CAUSAL_LM
from passes.analysis import group
from passes.frontend import trace

LAYERS = 6
SETTINGS = mptk.Settings(method="wanda", sparsity=0.3, align=1, samples=8, onnx=False)


def note(strong: set[int]) -> str:
    found = mptk.prune(Residual(strong, LAYERS, 48), None, SETTINGS, example_inputs=(torch.randn(8, 24),))
    return next((n for n in found.report.notes if "equal layers" in n), "")


def test_it_is_said_only_if_the_first_and_last_layers_matter_most() -> None:
    said = note({0, LAYERS - 1})
    less, alike, whole = map(float, re.findall(r"\d+\.\d+", said))
    assert less == pytest.approx(alike - whole, abs=0.011)
    assert f"--layers 1-{LAYERS - 2} cuts so" in said
    assert note({2, 3}) == ""  # whole ends would be worse


def test_whole_ends_save_as_much_unless_the_user_gives_widths() -> None:
    model = testing.make_llama(layers=LAYERS)
    analysis = group.analyze_program(trace.trace_to_program(model, dynamic=True))
    dense = Analysed(models.Loaded(model, None, "llama", Path()), CAUSAL_LM, analysis)
    asked = mptk.Settings(method="random", sparsity=0.2, align=1, families=("ffn",))
    prepared = legalise_bare(dense, asked)
    scores, equal = score_units(analysis, "random"), prepared.candidates[0].widths
    plan = plan_whole_ends(prepared, scores, select_units(analysis, scores, equal))
    assert plan is not None
    assert set(plan.families) == {f"ffn.{layer}" for layer in range(1, LAYERS - 1)}
    assert prepared.cost.compute_sparsity(equal) == pytest.approx(0.2, abs=0.01)
    saved = [1 - width / 64 for width in plan.widths.values()]
    assert sum(saved) / LAYERS == pytest.approx(1 - equal["ffn"] / 64, abs=0.01)
    given = legalise_bare(dense, replace(asked, widths={"ffn": 34}))
    assert plan_whole_ends(given, scores, select_units(analysis, scores, {"ffn": 34})) is None
