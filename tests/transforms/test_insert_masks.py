"""Masks in the module's own forward pass: what they compute, and that they leave no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from decoder_analyses import analyze_decoder
from torch import Tensor, nn

from benchmarks.tiny_models import tiny_model
from mptk import FamilyPlan, Plan, analyze, testing, trace
from mptk.errors import AnalysisError
from mptk.ir import Analysis, resolve_plan
from mptk.methods.maskprune.learner import adapt, unwrap_adapters
from mptk.testing import draw_plan, expect_error
from passes.transforms.insert_masks import InsertedMasks, find_disturbance, find_mask_sites
from passes.transforms.masked_reference import mask


def shapes(analysis: Analysis) -> dict[tuple[str, int], tuple[int, int]]:
    """(family, layer) → [scopes, size]."""
    return {(f.name, i): (f.scopes, f.size) for f in analysis.families for i in range(len(f.groups))}


def families(analysis: Analysis) -> list[str]:
    return [f.name for f in analysis.families if find_disturbance(analysis, f.name) is None]


def hard_values(analysis: Analysis, plan: object) -> dict[tuple[str, int], Tensor]:
    """The plan as masks of 0 and 1: (family, layer) → [scopes, size]."""
    choices = resolve_plan(analysis, plan).choices
    return {
        (f.name, i): torch.from_numpy(choices[g.axis].table).float()
        for f in analysis.families
        for i, g in enumerate(f.groups)
        if g.axis in choices
    }


def masked(module: nn.Module, analysis: Analysis, families: Sequence[str], *how: Any) -> InsertedMasks:
    return InsertedMasks(module, find_mask_sites(analysis, module, families), *how)


def logits(module: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return module(ids, use_cache=False).logits


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3", "gpt2", "opt", "gptneox", "mixtral"])
def test_hard_masks_compute_what_the_masked_program_computes_and_ones_change_no_bit(architecture):
    model, ids = testing.make_decoder(architecture), testing.draw_tokens()
    analysis = analyze_decoder(architecture)
    dense = logits(model, ids)
    for family in families(analysis):
        plan = draw_plan(analysis, [family])
        values = hard_values(analysis, plan)
        twin = copy.deepcopy(model)
        masked(twin, analysis, [family], lambda name, layer, v=values: v[name, layer])
        expected = mask(analysis, resolve_plan(analysis, plan))(ids)
        seen = logits(twin, ids)
        assert (seen - dense).abs().max() > 1e-3, family
        assert (seen - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item()), family
    masked(model, analysis, families(analysis), lambda name, layer: torch.ones(shapes(analysis)[name, layer]))
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "mixtral"])
def test_soft_masks_mask_the_adapter_too_and_fold_into_the_merged_weights(architecture):
    model, ids = testing.make_decoder(architecture), testing.draw_tokens()
    analysis = analyze_decoder(architecture)
    generator = torch.Generator().manual_seed(0)
    values = {key: torch.rand(shape, generator=generator) for key, shape in shapes(analysis).items()}
    adapted = adapt(model, 3, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    dense, plain = logits(adapted, ids), copy.deepcopy(adapted)
    masks = masked(unwrap_adapters(adapted), analysis, families(analysis), lambda name, layer: values[name, layer])
    seen = logits(adapted, ids)
    assert (seen - dense).abs().max() > 1e-3
    with masks.switch_off():
        assert torch.equal(logits(adapted, ids), dense)
    merged = plain.merge_and_unload().eval()
    state = merged.state_dict()
    merged.load_state_dict(state | {name: masks.fold(name, state[name]) for name in masks.weights})
    assert (logits(merged, ids) - seen).abs().max() <= 2e-5 * max(1.0, seen.abs().max().item())


class Past(nn.Module):
    """Reads the weight of ``up`` and of ``down`` without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.up.weight.T + self.up.bias).relu() @ self.down.weight.T


def test_masks_reach_a_weight_that_is_read_without_its_layer():
    model, x = Past().eval(), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    analysis = analyze(trace(model, [x]))
    (family,) = analysis.families
    plan = draw_plan(analysis, [family.name])
    values = hard_values(analysis, plan)
    dense, expected = model(x), mask(analysis, resolve_plan(analysis, plan))(x)
    masks = masked(model, analysis, [family.name], lambda name, layer: values[name, layer])
    seen = model(x)
    assert (seen - dense).abs().max() > 1e-3
    assert torch.allclose(seen, expected, atol=1e-6)
    with masks.switch_off():
        assert torch.equal(model(x), dense)


class BothWays(nn.Module):
    """NeoMME's projections: one weight leads from the embedding's channels, and back to them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Linear(5, 6), nn.Linear(6, 4)
        self.there, self.back = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.back.weight = self.there.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.there(self.table(x)).relu() @ self.back.weight)


class Square(nn.Module):
    """TextNet's layers: a weight that leads from the stream's channels to the same channels."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor] = nn.functional.linear) -> None:
        super().__init__()
        self.stem, self.layer, self.out, self.product = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4), product

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x)
        return self.out(stream + self.product(stream, self.layer.weight).relu())


class Normed(nn.Module):
    """LeViT's attention: a norm over batches stands between a layer and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.norm = nn.Linear(5, 6), nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.norm.running_mean = torch.ones(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.query(x)) @ self.key(x).T


PRODUCTS = {
    "plain": lambda x, w: x @ w,
    "t": lambda x, w: x @ w.t(),
    "T": lambda x, w: x @ w.T,
    "mT": lambda x, w: x @ w.mT,
    "H": lambda x, w: x @ w.H,
    "transpose": lambda x, w: x @ w.transpose(-1, 0),
    "permute": lambda x, w: x @ w.permute(1, 0),
    "elementwise": lambda x, w: x @ (w * 2).t(),
}


@pytest.mark.parametrize(
    "kind",
    [BothWays, Square, Normed, *(pytest.param(partial(Square, each), id=name) for name, each in PRODUCTS.items())],
)
def test_masks_are_wherever_the_cut_is_and_have_a_gradient(kind):
    model, x = kind().eval(), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    analysis = analyze(trace(model, [x]))
    for family in analysis.families:
        plan = draw_plan(analysis, [family.name])
        values, twin = hard_values(analysis, plan), copy.deepcopy(model)
        for value in values.values():
            value.requires_grad_()
        masked(twin, analysis, [family.name], lambda name, layer, values=values: values[name, layer])
        found = twin(x)
        assert torch.allclose(found, mask(analysis, resolve_plan(analysis, plan))(x), atol=1e-6)
        found.square().sum().backward()
        assert all(value.grad.any() for value in values.values())


@pytest.mark.parametrize(("kind", "without"), [("llama4_text", "router"), ("zamba", "shared_transf")])
def test_layers_that_no_adapter_fits_get_none(kind, without):
    """Llama 4's router is a Linear that returns two tensors; two layers of Zamba share their weights."""
    model = adapt(tiny_model("causal-lm", kind).model, 2, seed=0)
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert adapted
    assert not [name for name in adapted if without in name]


def test_families_that_cannot_fade_out_are_refused_by_name():
    model, analysis = testing.make_decoder("mixtral"), analyze_decoder("mixtral")
    with expect_error(AnalysisError, name="experts"):
        masked(model, analysis, ["experts"], lambda name, layer: torch.ones(1, 5))


@pytest.mark.parametrize("architecture", ["llama", "gptneox"])
def test_a_mask_of_a_block_multiplies_what_it_adds(architecture):
    """At 0 the block is removed. Its gradient is the sum of those that each position saw."""
    model, ids = testing.make_decoder(architecture), testing.draw_tokens()
    analysis = analyze_decoder(architecture)
    (depth,) = analysis.depths
    m, seen = torch.ones(1, depth.size, requires_grad=True), dict[int, Tensor]()

    def note(name: str, i: int, each: Tensor) -> None:
        seen[int(each.any(0).nonzero())] = each

    masks = masked(model, analysis, ["layers"], lambda name, i: m, note)
    model(ids, use_cache=False).logits[0, -1].square().sum().backward()
    assert torch.allclose(sum(seen.values(), torch.zeros(())).sum(0), m.grad[0], rtol=1e-3, atol=1e-4)
    assert len(seen) == depth.size
    dense = logits(model, ids)
    with torch.no_grad():
        m[0, 0] = 0
    kept = tuple(range(1, depth.size))
    plan = Plan({"layers": FamilyPlan(len(kept), depth.size, {depth.stack.module: (kept,)})})
    without = mask(analysis, resolve_plan(analysis, plan))(ids)
    found = logits(model, ids)
    assert (found - dense).abs().max() > 1e-3
    assert torch.allclose(found, without, rtol=1e-5, atol=1e-5)
    with masks.switch_off():
        assert torch.allclose(logits(model, ids), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptneox"])
def test_gradients_seen_position_by_position_are_those_of_masks_at_that_position(architecture):
    """Their sum is the mask's gradient; and each is what a mask of that position alone would get."""
    model, ids = testing.make_decoder(architecture), testing.draw_tokens(1, 5)
    analysis = analyze_decoder(architecture)
    names = families(analysis)
    masks = {key: torch.ones(shape, requires_grad=True) for key, shape in shapes(analysis).items()}
    seen: dict[tuple[str, int], Tensor] = {}
    inserted = masked(
        model, analysis, names, lambda name, i: masks[name, i], lambda name, i, each: seen.update({(name, i): each})
    )

    def loss() -> Tensor:
        return model(ids, use_cache=False).logits[0, -1].square().sum()

    loss().backward()
    assert {name for name, _ in seen} == inserted.watched >= {"ffn"}
    for key, each in seen.items():
        assert each.shape == (5, masks[key].numel())
        assert torch.allclose(each.sum(0), masks[key].grad.flatten(), rtol=1e-3, atol=1e-4)
    site = next(p for p in inserted.sites if p.family == "ffn" and p.layer == 1)
    factor = torch.ones(5, len(site.index), requires_grad=True)
    handle = model.get_submodule(site.module).register_forward_pre_hook(lambda _, args: (args[0] * factor,))
    with inserted.switch_off():
        loss().backward()
    handle.remove()
    assert torch.allclose(seen["ffn", 1][:, site.index], factor.grad, rtol=1e-3, atol=1e-4)
