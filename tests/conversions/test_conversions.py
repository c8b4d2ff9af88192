"""A kind of conversion of its own is a class that a feature names: its model, its proof and its note follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

import mptk
from mptk import Plan, ProofError, Settings, testing
from mptk.ir import Entry, Program
from mptk.plugins import Feature
from mptk.protocols import Analyse, Analysed, Change, Conversion
from mptk.staged.staged import Executor
from mptk.testing import expect_error

MEASURED = {"data": "random", "samples": 4, "length": 24, "eval_windows": 2, "eval_length": 24, "progress": None}


@dataclass(frozen=True, kw_only=True)
class ScaledValues(Conversion):
    """Values are ``by`` times as large, and the projections after them make up for it."""

    name = "values"
    stage = "scaled values"
    settles = "how large values are"
    does = "scales values"

    by: float

    @classmethod
    def find_change(cls, settings: Settings, texts: Mapping[str, Sequence[str]]) -> Change | None:
        return None

    @classmethod
    def from_entry(cls, entry: Entry) -> Change:
        return partial(cls.scale, float(str(entry["by"])), float(str(entry.get("back", entry["by"]))))

    @classmethod
    def scale(cls, by: float, back: float, model: Analysed, analyse: Analyse) -> Conversion:
        weights = model.loaded.weights
        changes = {name: partial(torch.mul, other=by) for name in weights if "v_proj" in name}
        changes |= {name: partial(torch.mul, other=1 / back) for name in weights if "o_proj" in name}
        return cls(model, analyse(replace(model.loaded, weights=weights.with_edits(changes))), by=by)

    @property
    def entry(self) -> Entry:
        return {"by": self.by}

    @property
    def note(self) -> str:
        return f"values are {self.by} times as large"

    def make_equal_pair(self, executor: Executor) -> tuple[Program, Program]:
        return self.before.analysis.program, self.after.analysis.program


@pytest.fixture(autouse=True)
def install_scaling():
    feature = Feature("scaling", "", conversions={ScaledValues.name: f"{__name__}:ScaledValues"})
    with testing.install_plugin({"mptk.features": {"scaling": feature}}):
        yield


def test_a_conversion_of_its_own_is_made_written_and_proven(tmp_path):
    dense = testing.make_llama(layers=1)
    Plan({}, conversions={"values": {"by": 4.0}}).save(tmp_path / "plan.json")
    found = mptk.prune(dense, tmp_path / "out", plan=str(tmp_path / "plan.json"), onnx=False, **MEASURED)
    assert "values are 4.0 times as large" in found.report.notes
    assert [stage["stage"] for stage in found.report.proof].count("scaled values") == 1
    layer, before = found.model.model.layers[0].self_attn, dense.model.layers[0].self_attn
    assert torch.equal(layer.v_proj.weight, 4 * before.v_proj.weight)
    assert mptk.verify(tmp_path / "out", model=dense)


def test_a_conversion_that_changes_the_model_is_not_proven(tmp_path):
    Plan({}, conversions={"values": {"by": 4.0, "back": 2.0}}).save(tmp_path / "plan.json")
    with expect_error(ProofError, name="scaled values"):
        mptk.prune(testing.make_llama(layers=1), plan=str(tmp_path / "plan.json"), **MEASURED)
