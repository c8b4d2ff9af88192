"""examples/plugin, installed: its criterion, its rule and its target work from the command line and from Python."""

from __future__ import annotations

import shutil

import pytest

from mptk import Report, testing

COMMON = ["--samples", "4", "--length", "32", "--align", "4", "--no-onnx", "--sparsity", "0.25"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    words = testing.make_tokenizer(begin=True)
    return testing.save_model(testing.make_llama(), tmp_path_factory.mktemp("model"), words)


def test_criterion_and_target_prune_and_verify_from_the_command_line(fresh, site, model, tmp_path):
    out = tmp_path / "out"
    assert "mptk_example.gate" in fresh.command("ops", paths=[site]).out
    options = ["--method", "peak", "--target", "npz", "--out", str(out), *COMMON]
    pruned = fresh.command("prune", model, *options, paths=[site])
    assert pruned.code == 0, pruned.err
    report = Report.read(out)
    assert (report.settings.method, report.settings.target) == ("peak", "npz")
    narrowed = [f["width"] for f in report.families.values() if f["width"] < f["of"]]
    assert narrowed
    assert all(width % 8 == 0 for width in narrowed)
    assert [d["stage"] for d in report.proof] == ["stored weights", "rewritten graph"]
    assert not (out / "config.json").exists()
    verified = fresh.command("verify", out, paths=[site])
    assert verified.code == 0, verified.err


ANALYSED = """
import torch
from torch import nn
import mptk
from mptk import Samples
from mptk.methods import criteria
from mptk_example.rule import gate

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.by, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 7)
    def forward(self, x):
        return self.down(gate(self.up(x), self.by(x)))

model, x = Gated(), torch.randn(3, 6)
analysis = mptk.analyze(model, [x])
(family,) = analysis.families
print(family.size, sorted(member.weight for member in family.groups[0].members))
peaks = gate(model.up(x), model.by(x)).abs().amax(0) * model.down.weight.abs().sum(0)
found = criteria.score_units(analysis, "peak", Samples({"x": x}))[family.name]
print(torch.allclose(found.flatten(), peaks))
"""


def test_rule_makes_its_operator_prunable_and_the_criterion_measures_it(fresh, site):
    members = ["by.bias", "by.weight", "down.weight", "up.bias", "up.weight"]
    assert fresh.run(ANALYSED, paths=[site]).out.split("\n")[:2] == [f"10 {members}", "True"]


def test_a_plugin_that_does_not_load_is_one_line(fresh, site, tmp_path):
    for place in site.glob("mptk_example*"):
        shutil.copytree(place, tmp_path / place.name)
    (tmp_path / "mptk_example" / "target.py").unlink()
    words = ["--target", "npz", "--steps", "0", "--method", "wanda", "--out", tmp_path / "o"]
    failed = fresh.command("prune", "smollm2-135m", *words, paths=[tmp_path, site])
    assert failed.code == 1
    assert "the plugin npz of mptk-example does not load" in failed.err
    assert "Traceback" not in failed.err
