"""Gaps: what removed blocks add is made up for by the layer before them.

It reaches for mptk.methods.reconstruct: which layer it is, and the fit without a run around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from toy_checkpoints import SETTINGS
from transformers import T5Config, T5ForConditionalGeneration

import mptk
from mptk import FamilyPlan, Plan, Samples, analyze, testing, trace
from mptk.ir import Analysis, Program, make_token_samples, resolve_plan
from mptk.methods.reconstruct import find_gaps, reconstruct_consumers
from mptk.staged.staged import EXECUTOR, Executor
from mptk.testing import make_llama, save_word_model
from passes.transforms.insert_masks import MaskSite, find_mask_sites
from passes.transforms.masked_reference import mask


def without(analysis: Analysis, *gone: int) -> dict[str, FamilyPlan]:
    """Plans of every depth without its blocks ``gone``."""
    plans = {}
    for depth in analysis.depths:
        kept = tuple(unit for unit in range(depth.size) if unit not in gone)
        plans[depth.name] = FamilyPlan(len(kept), depth.size, {depth.stack.module: (kept,)})
    return plans


class Block(nn.Module):
    """Adds what its units, which read half of the channels, say to the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 8, bias=False)
        self.down.weight.data[:4] = 0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x[..., :4]).relu())


def alike(count: int) -> nn.Sequential:
    """A model whose blocks all have the same units."""
    torch.manual_seed(0)
    blocks = [Block() for _ in range(count)]
    for block in blocks:
        block.up.load_state_dict(blocks[0].up.state_dict())
    return nn.Sequential(nn.Linear(5, 8), nn.Sequential(*blocks), nn.Linear(8, 3))


def built(model: nn.Module, inputs: list[Tensor]) -> Analysis:
    return analyze(trace(model.eval(), inputs, dynamic=True))


@torch.no_grad()
def errors(
    analysis: Analysis, plan: Plan, samples: Samples, sites: Sequence[MaskSite] = (), executor: Executor = EXECUTOR
) -> tuple[float, float]:
    """How far the masked model is from the dense one, before and after the fit."""
    cut = resolve_plan(analysis, plan)
    fitted = reconstruct_consumers(analysis, sites, cut, {}, samples, executor=executor)
    dense = analysis.program(*samples.tensors)

    def apart(program: Program) -> float:
        return float((program(*samples.tensors) - dense).norm() / dense.norm())

    changed = replace(analysis, program=analysis.program.with_state(fitted))
    return apart(mask(analysis, cut)), apart(mask(changed, cut))


@pytest.mark.parametrize(
    ("gone", "rows", "left"), [((1,), 40_000, 0.02), ((1, 2), 40_000, 0.02), ((1, 3), 40_000, 0.02), ((1, 2), 3, 0.3)]
)
def test_what_the_layer_before_a_gap_can_add_is_not_lost(gone, rows, left):
    """All that removed blocks add is a sum of the units of the block before; the ridge falls with the rows."""
    x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(1))
    analysis = built(alike(4), [x])
    before, after = errors(analysis, Plan(without(analysis, *gone)), Samples({"input": x}))
    assert after < left * before


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [
        ("llama", "model.layers.0.mlp.down_proj"),
        ("gpt2", "transformer.h.0.mlp.c_proj"),
        ("opt", "model.decoder.layers.0.fc2"),
        ("gptneox", "gpt_neox.layers.0.mlp.dense_4h_to_h"),
        ("mixtral", None),
        ("gemma3", None),
    ],
)
def test_the_layer_is_found_in_the_graph(architecture, layer):
    """A mixture has a matrix for each expert, and behind a norm the sum is not linear in the weight."""
    model, ids = testing.make_decoder(architecture), testing.draw_tokens(8, 20)
    analysis = built(model, [ids])
    plan = Plan(without(analysis, 1))
    found = [gap.weight for gap in find_gaps(analysis, resolve_plan(analysis, plan))]
    assert found == ([f"{layer}.weight"] if layer else [])
    before, after = errors(analysis, plan, make_token_samples(ids))
    assert after < 0.9 * before if layer else after == before


class Tapped(nn.Module):
    """Reads the input of its second block again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(5, 8), nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        before = self.layers[0](self.first(x))
        return self.layers[2](self.layers[1](before)) * before.tanh()


def test_a_layer_whose_result_is_read_past_the_gap_stays_as_it_is_and_so_does_a_gap_at_the_start():
    analysis = built(Tapped(), [torch.randn(4, 5)])
    gone = [find_gaps(analysis, resolve_plan(analysis, Plan(without(analysis, unit)))) for unit in (1, 2)]
    assert [len(gaps) for gaps in gone] == [0, 1]
    analysis = built(alike(3), [torch.randn(4, 5)])
    gone = [find_gaps(analysis, resolve_plan(analysis, Plan(without(analysis, unit)))) for unit in (0, 1)]
    assert [len(gaps) for gaps in gone] == [0, 1]


def test_encoder_and_decoder_have_gaps_of_their_own():
    torch.manual_seed(0)
    config = T5Config(vocab_size=97, d_model=24, d_kv=8, d_ff=40, num_heads=3, num_layers=3, decoder_start_token_id=0)
    model, ids = T5ForConditionalGeneration(config).eval(), testing.draw_tokens(8, 9)
    analysis = analyze(trace(model, {"input_ids": ids, "decoder_input_ids": ids}, dynamic=True))
    found = [gap.weight for gap in find_gaps(analysis, resolve_plan(analysis, Plan(without(analysis, 2))))]
    last = "{}.block.1.layer.{}.DenseReluDense.wo.weight".format
    assert found == [last("encoder", 1), last("decoder", 2)]


@torch.no_grad()
def test_a_gap_and_a_narrower_layer_before_it_are_made_up_for_at_once():
    """Each unit that goes is the double of one that stays, as in the removed block."""
    x = torch.randn(4000, 5, generator=torch.Generator().manual_seed(1))
    net = alike(3)
    for block in net[1]:
        block.up.weight[6:], block.up.bias[6:] = block.up.weight[:6], block.up.bias[:6]
    analysis = built(net, [x])
    (ffn,) = (f for f in analysis.families if f.size == 12)
    half = FamilyPlan(6, 12, {group.layer: (tuple(range(6)),) for group in ffn.groups})
    plan, sites = Plan({ffn.name: half, **without(analysis, 1)}), find_mask_sites(analysis, net, [ffn.name])
    for executor in (EXECUTOR, Executor(stage=0, borders=0)):
        before, after = errors(analysis, plan, Samples({"input": x}), sites, executor)
        assert after < 0.02 * before


def test_a_folder_whose_gap_is_made_up_for_is_proven(tmp_path):
    source = save_word_model(make_llama(layers=3), tmp_path / "dense")
    settings = replace(SETTINGS, method="influence", sparsity=0.3, tolerance=0.1, onnx=False, samples=16)
    plain = mptk.prune(source, None, replace(settings, reconstruct=False)).report
    found = mptk.prune(source, tmp_path / "small", replace(settings, reconstruct=True)).report
    assert found.trained
    assert all(row["ok"] for row in found.proof)
    assert found.quality["pruned"] < plain.quality["pruned"]
