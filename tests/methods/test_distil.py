"""Local distillation: what is left of each block is trained to give the dense block's outputs.

It reaches for mptk.methods.distil: a block's training is compared with the dense block's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from staged_programs import built
from torch import Tensor, nn

import mptk
from mptk import FamilyPlan, Plan, Samples, analyze, trace
from mptk.errors import InputError
from mptk.ir import Analysis, Cut, Program, list_removed_blocks, resolve_plan
from mptk.methods.distil import NO_BLOCK, Distilled, Schedule, distil_blocks
from mptk.protocols import RunFolder
from mptk.staged.staged import EXECUTOR, Executor
from mptk.testing import draw_plan, expect_error
from passes.transforms.remove_blocks import mask_blocks
from passes.transforms.rewrite import rewrite_program

HOW = Schedule(epochs=2, rate=3e-3)
INNER = ("ffn", "heads", "q_heads", "kv_groups", "channels")


@dataclass(frozen=True)
class Case:
    """A dense model and a cut of what is inside of its blocks. ``ends``: the weights that end these."""

    analysis: Analysis
    cut: Cut
    small: Program
    ends: frozenset[str]
    samples: Samples

    def distil(self, how: Schedule = HOW, executor: Executor = EXECUTOR, kept: RunFolder | None = None) -> Distilled:
        how = replace(how, step=2 * self.samples.positions)
        return distil_blocks(self.analysis, self.cut, self.ends, {}, self.samples, how, executor=executor, folder=kept)

    @torch.no_grad()
    def error(self, weights: Mapping[str, Tensor]) -> float:
        """How far the cut model with some weights is from the dense one."""
        given = self.samples[:2].tensors
        return float((self.small.with_state(weights)(*given) - self.analysis.program(*given)).norm())


@cache
def case(name: str) -> Case:
    program, inputs = built(name)
    analysis = analyze(program)
    plan = draw_plan(analysis, [f.name for f in analysis.families if f.name.partition(".")[0] in INNER], share=0.6)
    members = [m for name in plan.families for group in analysis.family(name).groups for m in group.members]
    torch.manual_seed(1)
    shapes = [(12, *t.shape[1:]) for t in inputs[0]]
    floats = [t.is_floating_point() for t in inputs[0]]
    rows = [torch.randn(s) if real else torch.randint(1, 97, s) for s, real in zip(shapes, floats, strict=True)]
    samples = Samples({str(i): t for i, t in enumerate(rows)})
    ends = frozenset(m.weight for m in members if m.role == "consumer")
    return Case(analysis, resolve_plan(analysis, plan), rewrite_program(analysis, plan), ends, samples)


@pytest.mark.parametrize("name", ["decoder", "mixture", "encoder and decoder", "images"])
def test_a_cut_model_comes_nearer_to_the_dense_one(name):
    cut = case(name)
    found = cut.distil()
    assert len(found.errors) >= 2
    assert all(after <= before for before, after in found.errors)
    assert cut.error(found.weights) < 0.97 * cut.error({})


def test_what_stays_makes_up_for_a_whole_block_that_goes():
    cut, (depth, *_) = case("decoder"), case("decoder").analysis.depths
    kept = tuple(unit for unit in range(depth.size) if unit)
    without = Plan({depth.name: FamilyPlan(depth.size - 1, depth.size, {depth.stack.module: (kept,)})})
    both = replace(cut.cut, choices=cut.cut.choices | resolve_plan(cut.analysis, without).choices)
    small = replace(cut.small, graph=cut.small.copy_graph())
    mask_blocks(small.graph.graph, list_removed_blocks(cut.analysis, both))
    small.graph.recompile()
    cut = replace(cut, cut=both, small=small)
    found = cut.distil()
    assert not [name for name in found.weights if name.startswith(f"{depth.stack.module}.0.")]
    assert [name for name in found.weights if name.startswith(f"{depth.stack.module}.1.")]
    assert cut.error(found.weights) < 0.97 * cut.error({})


def test_a_block_that_training_makes_worse_stays_as_it_was():
    cut = case("images")
    found = cut.distil(Schedule(epochs=2, rate=50.0))
    assert all(after == before for before, after in found.errors)
    assert all(torch.equal(found.weights[name], cut.small.state[name]) for name in found.weights)


def test_stages_in_files_and_blocks_that_were_kept_give_the_same(tmp_path):
    cut = case("decoder")

    def run(executor: Executor = EXECUTOR) -> Distilled:
        return cut.distil(executor=executor, kept=RunFolder(tmp_path / "run", {}, resume=True))

    expected = run()
    assert run().errors == expected.errors
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("block-*")}
    assert len(written) == 4
    (tmp_path / "run.run" / "block-2.safetensors").unlink()
    found = run(Executor(borders=0, smallest_file=0))
    again = {path.name for path in tmp_path.rglob("block-*") if path.stat().st_mtime_ns != written[path.name]}
    assert again == {"block-2.safetensors"}
    for weight in expected.weights:
        torch.testing.assert_close(found.weights[weight], expected.weights[weight], rtol=1e-4, atol=1e-5)


class Repeated(nn.Module):
    """One feed-forward layer, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(self.up(x).relu())
        return x


def test_weights_that_blocks_share_are_not_trained_by_themselves():
    analysis = analyze(trace(Repeated().eval(), (torch.randn(2, 6),)))
    (family,) = [f for f in analysis.families if f.size == 10]
    cut = resolve_plan(analysis, draw_plan(analysis, [family.name]))
    assert distil_blocks(analysis, cut, {"down.weight"}, {}, Samples({"x": torch.randn(2, 6)}), HOW) is None


def test_a_cut_without_blocks_of_its_own_says_that_nothing_was_distilled_and_it_follows_reconstruction():
    """Minutes choose epochs before the families are known."""
    how = {"method": "wanda", "distil_epochs": 1, "align": 1, "sparsity": 0.25, "tolerance": 0.1, "progress": None}
    found = mptk.prune(Repeated().eval(), example_inputs=torch.randn(4, 6), **how)
    assert NO_BLOCK in found.report.notes
    with expect_error(InputError, name="distil_epochs"):
        mptk.Settings(reconstruct=False, distil_epochs=1)
