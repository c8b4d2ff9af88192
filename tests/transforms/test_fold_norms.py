"""RMS norms after a cut of the residual width: the folded program equals the masked dense one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptk import FamilyPlan, Plan, ProofError, analyze, prune, testing, trace
from mptk.ir import Program, resolve_plan
from mptk.testing import expect_error
from passes.analysis.rules.resizer import scale_of
from passes.transforms.fold_norms import FoldNorms, find_unfoldable
from passes.transforms.masked_reference import mask
from passes.transforms.rewrite import rewrite_program

MODELS = {"weight": ("llama", 1e-2), "one plus weight": ("gemma3", 1e-6)}


@pytest.mark.parametrize("name", MODELS)
def test_scales_go_into_weights_and_epsilons(name):
    architecture, eps = MODELS[name]
    model, ids = testing.make_decoder(architecture, rms_norm_eps=eps), torch.randint(97, (2, 7))
    analysis = analyze(trace(model))
    keep = tuple(sorted(torch.randperm(48)[:30].tolist()))
    plan = Plan({"hidden": FamilyPlan(30, 48, {analysis.family("hidden").groups[0].layer: (keep,)})})
    cut = rewrite_program(analysis, plan)
    result = FoldNorms().run(cut)
    folded = result.program
    with torch.no_grad():
        expected = mask(analysis, resolve_plan(analysis, plan))(ids)
        assert (folded(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (trace(model)(ids) - expected).abs().max() > 0.01 * expected.abs().max()
    assert result.epsilons == pytest.approx({eps: eps * 48 / 30})
    assert scales(cut) > scales(folded) == 0


# ---- the pattern is matched whole, or the scale stays in the graph ----

WIDTH, KEPT, OUT = 12, 7, 5
Body = Callable[[Tensor, nn.Parameter, nn.Parameter], Tensor]
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Normed(nn.Module):
    """12 channels with a norm over them, and a head. ``body`` is given the channels, a weight and a bias."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, OUT)
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.up(x), self.weight, self.bias))


def mean_square(h: Tensor) -> Tensor:
    return h.square().mean(-1, keepdim=True)


def rms(h: Tensor) -> Tensor:
    return h * torch.rsqrt(mean_square(h) + 1e-2)


FOLDED: dict[str, Body] = {
    "rsqrt": lambda h, w, b: rms(h) * w,
    "weight first": lambda h, w, b: w * rms(h),
    "one plus weight": lambda h, w, b: rms(h) * (1 + w),
    "through another type": lambda h, w, b: (h.double() * torch.rsqrt(mean_square(h.double()) + 1e-2)).float() * w,
    "power": lambda h, w, b: h * (mean_square(h) + 1e-2).pow(-0.5) * w,
    "divided by a root": lambda h, w, b: h / (mean_square(h) + 1e-2).sqrt() * w,
    "divided by a power": lambda h, w, b: h / (mean_square(h) + 1e-2).pow(0.5) * w,
    "reciprocal of a root": lambda h, w, b: h * (1e-2 + mean_square(h)).sqrt().reciprocal() * w,
    "op": lambda h, w, b: F.rms_norm(h, (WIDTH,), w, 1e-2),
    "op with its default epsilon": lambda h, w, b: F.rms_norm(h * 1e-3, (WIDTH,), w),
    "op without weight": lambda h, w, b: F.rms_norm(h, (WIDTH,), eps=1e-2) * w,
    "twice": lambda h, w, b: rms(h) * w + rms(h * 2 + b) * w,
    "gate in between": lambda h, w, b: rms(h) * h.sigmoid() * w,
    "in groups": lambda h, w, b: rms(h.unflatten(-1, (1, WIDTH))).flatten(2) * w,
}
KEPT_IN_GRAPH: dict[str, Body] = {
    "no norm": lambda h, w, b: h + torch.sigmoid(h.mean(-1, keepdim=True) + 0.5) * w,
    "bias in between": lambda h, w, b: (rms(h) + b) * w,
    "activation in between": lambda h, w, b: F.silu(rms(h)) * w,
    "softmax in between": lambda h, w, b: rms(h).softmax(-1) * w,
    "no weight": lambda h, w, b: rms(h),
    "op, no weight": lambda h, w, b: F.rms_norm(h, (WIDTH,), eps=1e-2),
    "no epsilon": lambda h, w, b: h * torch.rsqrt(mean_square(h)) * w,
    "squared": lambda h, w, b: (torch.rsqrt(mean_square(h) + 1e-2) ** 2) * h * w,
    "times itself": lambda h, w, b: (r := torch.rsqrt(mean_square(h) + 1e-2)) * r * h * w,
    "weight used elsewhere": lambda h, w, b: rms(h) * w + w,
    "mean used elsewhere": lambda h, w, b: rms(h) * w + mean_square(h),
    "root used elsewhere": lambda h, w, b: (h * (r := torch.rsqrt(mean_square(h) + 1e-2)) + r) * w,
    "root used beside the norm": lambda h, w, b: h * (r := torch.rsqrt(mean_square(h) + 1e-2)) * w + r,
    "mean used beside the norm": lambda h, w, b: h * torch.rsqrt((m := mean_square(h)) + 1e-2) * w + m,
    "sum used beside the norm": lambda h, w, b: h * torch.rsqrt(s := mean_square(h) + 1e-2) * w + s,
    "only its type counts": lambda h, w, b: h.type_as(torch.rsqrt(mean_square(h) + 1e-2)) * w,
    "another function with one half": lambda h, w, b: h / torch.clamp(mean_square(h) + 1e-2, 0.5) * w,
    "root itself": lambda h, w, b: h * (mean_square(h) + 1e-2).sqrt() * w,
    "other offset of the weight": lambda h, w, b: rms(h) * (1 + w) + rms(h + b) * w,
    "scaled weight": lambda h, w, b: rms(h) * (2 * w),
}


def cut_width(body: Body) -> tuple[Program, Program, str | None]:
    """The masked program, the cut and folded one, and why a stock class could not hold the cut."""
    module = Normed(body)
    nn.init.normal_(module.weight, 1.0, 0.2)
    analysis = analyze(trace(module, (X,)))
    (family,) = analysis.families
    plan = Plan({family.name: FamilyPlan(KEPT, WIDTH, {g.layer: (tuple(range(2, 2 + KEPT)),) for g in family.groups})})
    masked, cut = mask(analysis, resolve_plan(analysis, plan)), rewrite_program(analysis, plan)
    return masked, cut, find_unfoldable(analysis, family)


def scales(program: Program) -> int:
    return sum(scale_of(n) is not None and bool(n.users) for n in program.graph.graph.nodes)


@torch.no_grad()
@pytest.mark.parametrize("name", FOLDED)
def test_a_whole_norm_takes_the_scale(name):
    masked, cut, refusal = cut_width(FOLDED[name])
    result = FoldNorms().run(cut)
    folded = result.program
    assert scales(cut) > scales(folded) == 0
    assert result.epsilons
    assert (folded(X) - masked(X)).abs().max() <= 1e-6 * masked(X).abs().max()
    assert (refusal is None) == (name != "op with its default epsilon")


@torch.no_grad()
@pytest.mark.parametrize("name", KEPT_IN_GRAPH)
def test_what_is_no_whole_norm_keeps_its_scale_and_no_stock_class_is_offered_it(name):
    masked, cut, refusal = cut_width(KEPT_IN_GRAPH[name])
    folded = FoldNorms()(cut).program
    assert (folded(X) - masked(X)).abs().max() <= 1e-6 * masked(X).abs().max()
    assert scales(folded)
    assert refusal is not None
    assert "test_fold_norms.py:" in refusal


@torch.no_grad()
def test_calls_without_users_that_count_stay():
    """Masks that are made under ``torch.vmap`` open and close a level of it."""

    masked, cut, _ = cut_width(lambda h, w, b: rms(h) * w * torch.vmap(lambda i: i % 2 == 0)(torch.arange(3))[:, None])
    folded = FoldNorms()(cut).program
    assert not scales(folded)
    assert (folded(X) - masked(X)).abs().max() <= 1e-6 * masked(X).abs().max()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_class_that_gives_an_epsilon_to_norms_of_small_values_cannot_hold_the_cut(scale):
    """Qwen3 has one field for all norms, and queries have norms of their own. Small ones are about as small as it."""
    model = testing.make_decoder("qwen3", num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight *= scale
    asked = {"sparsity": 0.33, "tolerance": 0.1, "align": 1, "method": "magnitude", "families": ("hidden",)}
    ids = torch.randint(3, 97, (2, 4))
    with nullcontext() if scale == 1 else expect_error(ProofError):
        prune(model, data=ids, onnx=False, eval_windows=1, progress=None, **asked)
