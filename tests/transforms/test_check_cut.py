"""``mptk.rewrite`` proves its own result: what it raises if a stage is wrong, or if nothing would be proven."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mptk
from mptk import ProofError, analyze, trace
from mptk.errors import ModelError
from mptk.ir import Analysis, Cut, Log, Program, resolve_plan, run_passes
from mptk.testing import draw_plan, draw_tokens, expect_error, make_decoder, measure_largest
from passes.check_cut import Unmoved, check_cut, draw_seeded_inputs, replace_faint_weights
from passes.pipelines import cutting
from passes.transforms.masked_reference import mask


def cut_by_stages(analysis: Analysis, cut: Cut) -> dict[str, Program]:
    """The program after each pass that cuts it."""
    steps = cutting(analysis, cut)
    results = run_passes(analysis.program, steps, Log())
    return {step.name: result.program for step, result in zip(steps, results, strict=True)}


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


@pytest.mark.parametrize("hidden", [{"head": 0.0}, {"scale": 1e-6}])
def test_where_a_parameter_hides_the_units_the_proof_has_a_random_one(hidden):
    module, x = Headed(**hidden), torch.randn(3, 8)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    analysis = analyze(trace(module, (x,)))
    plan = draw_plan(analysis)
    small = mptk.rewrite(analysis, plan)
    assert torch.equal(small.state["head.weight"], module.head.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    woken, cut = replace_faint_weights(analysis), resolve_plan(analysis, plan)
    assert woken is not None
    stages = cut_by_stages(woken, cut)
    check_cut(woken, cut, stages)
    wrong = stages["rewrite"].with_state({"down.weight": stages["rewrite"].state["down.weight"].roll(1, 1)})
    with expect_error(ProofError, name="rewrite"):
        check_cut(woken, cut, {"rewrite": wrong})


@pytest.mark.parametrize(("stage", "damage"), [("rewrite", shifted), ("fold norms", scaled)])
def test_the_stage_that_is_wrong_is_named(stage, damage):
    llama = analyze(trace(make_decoder("llama", num_hidden_layers=1), (draw_tokens(),)))
    cut = resolve_plan(llama, draw_plan(llama))
    stages = cut_by_stages(llama, cut)
    check_cut(llama, cut, stages)
    with expect_error(ProofError, name=stage):
        check_cut(llama, cut, stages | {stage: damage(stages[stage])})


def test_a_mask_that_moves_nothing_proves_nothing():
    """Units that never fire."""
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.constant_(net[0].bias, -100.0)
    analysis = analyze(trace(net, (torch.ones(2, 5),)))
    plan = draw_plan(analysis)
    with pytest.raises(Unmoved):
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
def test_a_program_that_rounding_moves_is_given_its_own_tolerance():
    analysis = analyze(trace(Cancelling(1e-3), (torch.ones(7, 5),)))
    plan = draw_plan(analysis)
    (x,) = draw_seeded_inputs(analysis.program).values()
    masked = mask(analysis, resolve_plan(analysis, plan))(x)
    assert measure_largest(mptk.rewrite(analysis, plan)(x), masked) > 5e-5 * masked.abs().max()


def test_a_program_that_rounding_moves_further_can_be_proven_in_float64_alone():
    module, x = Cancelling(1e-6), torch.ones(7, 5)
    analysis = analyze(trace(module, (x,)))
    with expect_error(ModelError):
        mptk.rewrite(analysis, draw_plan(analysis))
    analysis = analyze(trace(module.double(), (x.double(),)))
    mptk.rewrite(analysis, draw_plan(analysis))


def test_an_output_without_elements_and_infinite_ones_that_agree_are_no_difference():
    class Masked(nn.Sequential):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = super().forward(x)
            return torch.where(torch.arange(3) == 1, -torch.inf, y), y[:, :0]

    analysis = analyze(trace(Masked(nn.Linear(5, 8), nn.Linear(8, 3)), (torch.ones(2, 5),)))
    mptk.rewrite(analysis, draw_plan(analysis))


def test_a_model_in_bfloat16_is_proven_in_float32():
    """In bfloat16 the cut model is further from the masked one than any tolerance that would find an error."""
    analysis = analyze(trace(make_decoder("llama", num_hidden_layers=1).bfloat16(), (draw_tokens(),)))
    plan = draw_plan(analysis)
    cut = mptk.rewrite(analysis, plan)
    masked = mask(analysis, resolve_plan(analysis, plan))(draw_tokens())
    assert cut.state["model.layers.0.mlp.up_proj.weight"].dtype == masked.dtype == torch.bfloat16
    assert measure_largest(cut(draw_tokens()), masked) > 1e-3 * masked.abs().max()


def test_inputs_are_ids_of_the_smallest_table_and_other_numbers_as_traced():
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
