"""The protocol of passes: what a run of a list records, and what stops a pass that is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from mptk import analyze, trace
from mptk.ir import Log, Pass, PassRecord, PassResult, Program, resolve_plan, run_passes
from mptk.testing import draw_plan
from passes.pipelines import cutting
from passes.targets.onnx.lower import LowerComplex, LowerOps
from passes.transforms.fold_norms import FoldNorms
from passes.transforms.masked_reference import Mask
from passes.transforms.rewrite import Rewrite
from passes.transforms.weight_types import Retype, RoundWeights


class Normed(nn.Module):
    """12 channels with an RMS norm over them: 4 → 12 → 5."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(4, 12), nn.RMSNorm(12, eps=1e-3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up(x)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def normed():
    analysis = analyze(trace(Normed(), (torch.ones(3, 4),)))
    return analysis, resolve_plan(analysis, draw_plan(analysis))


def test_a_run_records_what_each_pass_did(normed):
    seen: list[PassRecord] = []
    log = Log(on_record=seen.append)
    results = run_passes(normed[0].program, cutting(*normed, torch.bfloat16), log)
    rewrite, blocks, fold, store = seen
    assert seen == log.records
    assert str(rewrite) == "rewrite: 3 → 4 ops, 137 → 82 parameters, 4 weights sliced"
    assert str(blocks) == "remove blocks: 4 → 4 ops, 82 → 82 parameters"
    assert str(fold) == "fold norms: 4 → 3 ops, 82 → 82 parameters, epsilon 0.001 → 0.00171429"
    assert str(store) == "store: 3 → 3 ops, 82 → 82 parameters, 5 weights rounded"
    assert [record["changed"] for record in log.to_list()] == [True, False, True, True]
    assert results[-1].program.state["up.weight"].shape == (7, 4)


def test_a_pass_that_finds_nothing_to_do_says_so(normed):
    analysis, _ = normed
    whole = resolve_plan(analysis, draw_plan(analysis, []))
    log = Log()
    run_passes(analysis.program, [*cutting(analysis, whole), Retype(torch.float32)], log)
    assert [record.changed for record in log.records] == [False, False, False, False, False]
    assert str(log.records[0]) == "rewrite: 3 → 3 ops, 137 → 137 parameters"


def test_the_analysis_must_be_of_the_program(normed):
    other = trace(Normed(), (torch.ones(3, 4),))
    for step in (Rewrite(*normed), Mask(*normed)):
        with pytest.raises(AssertionError):
            step(other)


@pytest.mark.parametrize(
    "step",
    [
        Rewrite,
        Mask,
        lambda *_: FoldNorms(),
        lambda *_: RoundWeights(),
        lambda *_: LowerOps(),
        lambda *_: LowerComplex(),
        lambda *_: Retype(torch.float64),
    ],
)
def test_each_pass_checks_its_result(normed, step):
    before = normed[0].program
    wrong = replace(before, state=before.state.with_entries({"head.bias": torch.ones(4)}))
    with pytest.raises(AssertionError):
        step(*normed).ensures(before, wrong)


@dataclass(frozen=True)
class Shorten(Pass):
    """Shorten a weight and forget the graph."""

    name: ClassVar[str] = "shorten"

    def run(self, program: Program) -> PassResult:
        return PassResult(replace(program, state=program.state.with_entries({"head.bias": torch.ones(4)})), True)

    def ensures(self, before: Program, after: Program) -> None:
        """Nothing."""


def test_a_weight_that_the_graph_does_not_expect_stops_any_pass(normed):
    with pytest.raises(AssertionError, match=r"head\.bias"):
        run_passes(normed[0].program, [Shorten()], Log())
