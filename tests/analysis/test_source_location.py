"""Why an axis stays whole, and where in the model's source: the module's path and the line, in the model's own file."""

from __future__ import annotations

import inspect
import linecache
import re

import pytest
import torch
from torch import Tensor, nn

from mptk import analyze, testing, trace
from mptk.ir import Analysis, find_reachable

REASON = re.compile(r"(?P<why>.+) \((?P<op>[\w.]+) in (?P<module>.+), (?P<file>\w+\.py):(?P<line>\d+)\)")


def reasons(analysis: Analysis) -> list[dict[str, str]]:
    """Every reason of every blocked axis, taken apart. Fails where an axis has none, or one of them no place."""
    assert all(b.reasons for b in analysis.blocked)
    found = [(reason, REASON.fullmatch(reason)) for b in analysis.blocked for reason in b.reasons]
    assert [reason for reason, match in found if match is None] == []
    return [match.groupdict() for _, match in found if match]


EMBEDDING = {"model.embed_tokens": "self.embed_tokens("}
HEAD = {"lm_head": "self.lm_head("}
ROUTERS = {f"model.layers.{i}.mlp.gate": "self.weight" for i in range(testing.decoders.LAYER_COUNT)}


@pytest.mark.parametrize(
    ("architecture", "changes", "lines"),
    [
        ("llama", {}, EMBEDDING | HEAD),
        ("gpt2", {}, {"transformer.wte": "self.wte(", "transformer.wpe": "self.wpe("} | HEAD),
        ("mixtral", {"num_experts_per_tok": 5}, EMBEDDING | ROUTERS | HEAD),  # no expert is to spare
    ],
)
def test_a_reason_names_the_module_and_the_line_of_the_models_own_file(architecture, changes, lines):
    model = testing.make_decoder(architecture, **changes)
    source = str(inspect.getsourcefile(type(model)))
    found = reasons(analyze(trace(model, (testing.draw_tokens(),))))
    assert {reason["module"] for reason in found} == lines.keys()
    for reason in found:
        assert source.endswith(f"/{reason['file']}")
        assert lines[reason["module"]] in linecache.getline(source, int(reason["line"]))


class Misread(nn.Module):
    """Reads 12 channels as 4 · 3 and as 3 · 4: no unit of either is one of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = y.view(-1, 4, 3) + y.view(-1, 3, 4).mT
        return self.down(y)  # type: ignore[no-any-return]


def test_views_that_do_not_fit_have_a_place_too():
    found = reasons(analyze(trace(Misread(), (torch.ones(2, 5),))))
    (misread,) = {r["line"]: r for r in found if "cuts across its boundaries" in r["why"]}.values()
    assert (misread["module"], misread["file"]) == ("the model", "test_source_location.py")
    assert "y.view(-1, 4, 3) +" in linecache.getline(__file__, int(misread["line"]))


def test_a_model_of_torchs_modules_alone_has_torchs_lines():
    found = reasons(analyze(trace(nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 7)), (torch.ones(2, 5),))))
    assert {(r["module"], r["file"]) for r in found} == {("0", "linear.py"), ("2", "linear.py")}


def test_what_is_reached_follows_each_way_once():
    sources = {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": ["b"], "e": ["a"]}
    assert find_reachable(["a"], sources.__getitem__) == {"a", "b", "c", "d"}
    assert find_reachable([], sources.__getitem__) == set()
