"""``mptk.rewrite`` proves its own result: what it raises if a stage is wrong, or if nothing would be proven.

It reaches for passes: a single transformation is made wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from inside import Inside
from torch import nn

import mptk
from mptk import MptkError, ProofError, analyze, trace
from mptk.ir.families import Analysis
from mptk.ir.passes import Pass
from mptk.ir.program import Program
from mptk.ir.resolved_plan import resolve_plan
from mptk.testing import draw_plan, draw_tokens, make_decoder, measure_largest
from passes.check_cut import draw_seeded_inputs
from passes.transforms.fold_norms import FoldNorms
from passes.transforms.masked_reference import mask
from passes.transforms.rewrite import Rewrite


@pytest.fixture(scope="module")
def llama() -> Analysis:
    return analyze(trace(make_decoder("llama"), (draw_tokens(),)))


def shifted(program: Program) -> Program:
    """One weight's kept columns out of order."""
    name = next(n for n in program.state if n.endswith("down_proj.weight"))
    return program.with_state({name: program.state[name].roll(1, 1)})


def scaled(program: Program) -> Program:
    name = next(n for n in program.state if n.endswith("layernorm.weight"))
    return program.with_state({name: program.state[name] * 1.01})


class Headed(nn.Module):
    """A branch that a parameter hides: a head of zeros, as before training, or a layer's scale of 1e-6."""

    def __init__(self, head: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.full((8,), scale))
        with torch.no_grad():
            self.head.weight.mul_(head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.scale * self.down(self.up(x).relu()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("module", [Headed(head=0.0), Headed(scale=1e-6)])
def test_where_a_parameter_hides_the_units_the_proof_has_a_random_one(module: Headed, inside: Inside) -> None:
    x, before = torch.randn(3, 8), {n: t.clone() for n, t in module.state_dict().items()}
    analysis = analyze(trace(module, (x,)))
    plan = draw_plan(analysis)
    small = mptk.rewrite(analysis, plan)
    assert torch.equal(small.state["head.weight"], module.head.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    spoil_program(inside, Rewrite, lambda p: p.with_state({"down.weight": p.state["down.weight"].roll(1, 1)}))
    with pytest.raises(ProofError, match="the proof fails at 'rewrite'"):
        mptk.rewrite(analysis, plan)


def spoil_program(inside: Inside, step: type[Pass], damage: Callable[[Program], Program]) -> None:
    target = f"{step.__module__}.{step.__name__}.run"
    inside.spoil(target, lambda result: replace(result, program=damage(result.program)))


@pytest.mark.parametrize(("step", "damage"), [(Rewrite, shifted), (FoldNorms, scaled)])
def test_the_stage_that_is_wrong_is_named_with_the_difference(
    llama: Analysis, inside: Inside, step: type[Pass], damage: Callable[[Program], Program]
) -> None:
    plan = draw_plan(llama)
    spoil_program(inside, step, damage)
    with pytest.raises(
        MptkError, match=rf"the proof fails at '{step.name}': .* differ by \d\.\de[+-]\d+ of the largest"
    ):
        mptk.rewrite(llama, plan)
    mptk.rewrite(llama, plan, check=False)


def test_a_mask_that_moves_nothing_proves_nothing() -> None:
    """Units that never fire."""
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.constant_(net[0].bias, -100.0)
    analysis = analyze(trace(net, (torch.ones(2, 5),)))
    plan = draw_plan(analysis)
    with pytest.raises(MptkError, match=r"nothing is proven: masking the units moves the outputs by 0\.0e\+00"):
        mptk.rewrite(analysis, plan)
    assert mptk.rewrite(analysis, plan, check=False).state["0.weight"].shape == (5, 5)


class Cancelling(nn.Module):
    """The difference of two products, which is ``part`` of either: rounding moves it by 1e-7 / ``part``."""

    def __init__(self, part: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm = nn.Linear(5, 64), nn.RMSNorm(64, eps=1e-5)
        self.left, self.right = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        self.right.weight.data = self.left.weight.data + part * self.right.weight.data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.up(x))
        return self.right(h) - self.left(h)


@torch.no_grad()
def test_a_program_that_rounding_moves_is_given_its_own_tolerance() -> None:
    analysis = analyze(trace(Cancelling(1e-3), (torch.ones(7, 5),)))
    plan = draw_plan(analysis)
    (x,) = draw_seeded_inputs(analysis.program).values()
    masked = mask(analysis, resolve_plan(analysis, plan))(x)
    assert measure_largest(mptk.rewrite(analysis, plan)(x), masked) > 5e-5 * masked.abs().max()


def test_a_program_that_rounding_moves_further_cannot_be_proven() -> None:
    analysis = analyze(trace(Cancelling(1e-6), (torch.ones(7, 5),)))
    with pytest.raises(MptkError, match="nothing is proven: rounding alone moves the masked program's outputs by"):
        mptk.rewrite(analysis, draw_plan(analysis))


def test_a_program_in_float64_is_proven_in_float64() -> None:
    analysis = analyze(trace(Cancelling(1e-6).double(), (torch.ones(7, 5, dtype=torch.float64),)))
    mptk.rewrite(analysis, draw_plan(analysis))


def test_an_output_without_elements_and_infinite_ones_that_agree_are_no_difference() -> None:
    class Masked(nn.Sequential):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = super().forward(x)
            return torch.where(torch.arange(3) == 1, -torch.inf, y), y[:, :0]

    analysis = analyze(trace(Masked(nn.Linear(5, 8), nn.Linear(8, 3)), (torch.ones(2, 5),)))
    mptk.rewrite(analysis, draw_plan(analysis))


def test_a_program_without_weights_is_cut_unproven() -> None:
    analysis = analyze(trace(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)).to("meta"), (torch.ones(2, 5),)))
    assert not mptk.rewrite(analysis, draw_plan(analysis)).has_values


def test_a_model_in_bfloat16_is_proven_in_float32() -> None:
    """In bfloat16 the cut model is further from the masked one than any tolerance that would find an error."""
    analysis = analyze(trace(make_decoder("llama").bfloat16(), (draw_tokens(),)))
    plan = draw_plan(analysis)
    cut = mptk.rewrite(analysis, plan)
    masked = mask(analysis, resolve_plan(analysis, plan))(draw_tokens())
    assert cut.state["model.layers.0.mlp.up_proj.weight"].dtype == masked.dtype == torch.bfloat16
    assert measure_largest(cut(draw_tokens()), masked) > 1e-3 * masked.abs().max()


def test_inputs_are_ids_of_the_smallest_table_and_other_numbers_as_traced() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Embedding(50, 4), nn.Embedding(3, 4)

        def forward(self, ids: torch.Tensor, flags: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.large(ids) + self.small(ids.view(-1)).view(2, 21, 4) * flags[..., None] + x

    flags = torch.tensor([[1, 0, 1], [0, 1, 1]]).repeat(1, 7)
    program = trace(Two(), (torch.zeros(2, 21, dtype=torch.long), flags, torch.zeros(2, 21, 4)))
    ids, kept, x = draw_seeded_inputs(program).values()
    assert set(ids.flatten().tolist()) == {0, 1, 2}
    assert kept.equal(flags)
    assert x.std() > 0.5
    assert all(a.equal(b) for a, b in zip(draw_seeded_inputs(program).values(), (ids, kept, x), strict=True))


def test_a_size_that_does_not_follow_the_cut_is_named_with_its_place(llama: Analysis, inside: Inside) -> None:
    inside.around("passes.transforms.rewrite.Resizer.scale_argument", lambda scaled, resizer, argument, term: argument)
    with pytest.raises(
        ProofError, match=r"the cut graph does not fit together at aten\.\w+\.default in model\..*: .*; please report"
    ) as e:
        mptk.rewrite(llama, draw_plan(llama))
    assert "\n" not in str(e.value)
