"""Depth: whole residual blocks are found in the graph, masked, removed, and held by the stock class.

It reaches for passes.targets: the choice of blocks is tried without a run for each.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_checkpoints import SETTINGS
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
)

import mptk
from mptk import FamilyPlan, Plan, testing
from mptk.config import Learning, Training
from mptk.cost.model import CostModel
from mptk.errors import AnalysisError, PlanError
from mptk.ir import resolve_plan
from mptk.methods import criteria
from mptk.ort.decoder import OrtDecoder
from mptk.testing import cut_and_compare, expect_error, save_word_model
from passes.targets.choose_blocks import choose_blocks
from passes.targets.legalize import discover

SIZES = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 97, "num_hidden_layers": 4}
OTHERS = {"num_key_value_heads": 3, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True}
T5_SIZES = {"vocab_size": 97, "d_model": 24, "d_kv": 8, "d_ff": 40}
IDS = torch.tensor([[5, 9, 2, 31, 8, 4, 11]])


def random_model(model):
    torch.manual_seed(0)
    return testing.draw_weights(model, 0.15).eval()


def make_llama(layers=4):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **OTHERS, "num_hidden_layers": layers}))


def keeping(analysis, *units, name="layers"):
    """A plan that keeps these blocks and leaves all else whole."""
    family = analysis.family(name)
    return Plan({name: FamilyPlan(len(units), family.size, {family.groups[0].layer: (units,)})})


@pytest.fixture(scope="module")
def llama():
    model = random_model(make_llama())
    analysis = mptk.analyze(mptk.trace(model, dynamic=True))
    return SimpleNamespace(model=model, analysis=analysis, stock=discover(analysis, model))


@pytest.mark.parametrize(
    ("model", "config", "inner"),
    [
        (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES, use_parallel_residual=True), "gpt_neox.layers"),
        (BertModel, BertConfig(**SIZES), "encoder.layer"),
        (T5EncoderModel, T5Config(**T5_SIZES, num_heads=3, num_layers=4), "encoder.block"),
    ],
)
def test_blocks_are_found_in_parallel_with_norms_behind_and_with_a_shared_bias(model, config, inner):
    """Two branches beside each other, a norm after each addition, a first block that others read from."""
    analysis = mptk.analyze(mptk.trace(random_model(model(config)), [IDS]))
    family = analysis.family("layers")
    assert (family.groups[0].layer, family.size) == (inner, 4)
    assert list(family.stack.stay) == ([0] if model is T5EncoderModel else [])
    if family.stack.stay:
        with expect_error(PlanError, name="layers"):
            mptk.rewrite(analysis, keeping(analysis, 1, 2))
    found = cut_and_compare(analysis, keeping(analysis, 0, 3), [IDS])
    assert found.error < 1e-5 < 1e-2 < found.moved


class Block(nn.Module):
    """Adds to its input."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(x).relu()


class Scaled(Block):
    """Scales its result in place, which the next block reads through a view."""

    def forward(self, x):
        return super().forward(x.view_as(x)).mul_(0.7)


class Corrected(Block):
    """Writes into a part of its result after it was made, as Gemma 3n does with the streams of its residual."""

    def forward(self, x):
        y = super().forward(x).type_as(x)
        y[1:] += y[0]
        return y


class Overwriting(Block):
    """Adds in place, to memory that is not its own."""

    def forward(self, x):
        return x.add_(self.inner(x).relu())


@pytest.mark.parametrize("kind", [Block, Scaled, Corrected])
def test_a_product_may_enter_a_block_which_may_write_into_its_own_memory_alone(kind):
    x = torch.randn(3, 4)
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(kind(), kind(), kind()), nn.Linear(8, 5))
    analysis = mptk.analyze(mptk.trace(net, [x]))
    (family,) = analysis.depths
    assert (family.groups[0].layer, family.size, family.stack.stay) == ("1", 3, {})
    found = cut_and_compare(analysis, keeping(analysis, 0, 2), [x])
    assert found.error < 1e-5 < 1e-2 < found.moved
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(Overwriting(), Overwriting()), nn.Linear(8, 5))
    assert not mptk.analyze(mptk.trace(net, [x])).depths


class Plain(nn.Module):
    """Modules without an addition: it is done outside of them and no part of them, or not at all."""

    def __init__(self, adds):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.adds, self.seen = adds, nn.Linear(8, 5)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x) if self.adds else layer(x)
        return self.seen(x)


@pytest.mark.parametrize("adds", [True, False])
def test_modules_that_do_not_add_to_their_input_are_no_blocks(adds):
    assert not mptk.analyze(mptk.trace(Plain(adds), [torch.randn(3, 8)])).depths


def test_the_cut_equals_the_mask_with_channels_too(llama):
    plan = keeping(llama.analysis, 1, 3)
    ffn = llama.analysis.family("ffn")
    channels = FamilyPlan(24, 40, {g.layer: (tuple(range(i, 24 + i)),) for i, g in enumerate(ffn.groups)})
    both = Plan({**plan.families, "ffn": channels})
    found = cut_and_compare(llama.analysis, both, [IDS])
    assert found.error < 1e-5 < 1e-2 < found.moved
    small, dense = mptk.rewrite(llama.analysis, both).state_dict(), llama.model.state_dict()
    assert {name.split(".")[2] for name in small if name.startswith("model.layers.")} == {"0", "1"}
    up = "model.layers.{}.mlp.up_proj.weight".format
    assert torch.equal(small[up(1)], dense[up(3)][3:27])


def test_removed_blocks_are_counted_exactly_and_none_are_by_default(llama):
    cost = CostModel(llama.analysis)
    block = sum(p.numel() for p in llama.model.model.layers[0].parameters())
    assert cost.dense.parameters - cost.of(keeping(llama.analysis, 0, 2)).parameters == 2 * block
    assert cost({"layers": 2}).parameters == cost.of(keeping(llama.analysis, 0, 2)).parameters
    assert cost.compute_sparsity({"layers": 3}) == pytest.approx(0.25)
    assert cost({"layers": 3}).flops < cost.dense.flops
    assert "layers" not in [family.name for family in llama.analysis.families]
    assert resolve_plan(llama.analysis, keeping(llama.analysis, 0, 1, 2, 3)).removes is False


def test_a_block_that_turns_its_input_least_goes_first(llama):
    """The influence is 1 − cosine of what enters and leaves. Criteria for channels use it for blocks; it judges no more."""
    with torch.no_grad():
        hidden = llama.model.model(IDS, output_hidden_states=True).hidden_states
    found = criteria.score_units(llama.analysis, "influence", IDS, families=["layers"])["layers"].flatten()
    expected = [1 - torch.cosine_similarity(x, y, -1).mean().item() for x, y in pairwise(hidden[:4])]
    assert found[:3].tolist() == pytest.approx(expected, rel=1e-4)
    both = criteria.score_units(llama.analysis, "wanda", IDS, families=["ffn", "layers"])
    assert torch.equal(both["layers"].flatten(), found)
    kept = choose_blocks(llama.analysis.stacks[0], found.tolist(), 3, llama.stock)
    assert set(range(4)) - set(kept) == {int(found.argmin())}
    with expect_error(AnalysisError, name="ffn"):
        criteria.score_units(llama.analysis, "influence", IDS, families=["ffn"])


def test_greedy_removes_the_block_without_which_the_loss_is_lowest(llama):
    """Each round looks at the model without the blocks that are gone already."""
    ids = torch.randint(5, 97, (2, 12))
    found = criteria.score_units(llama.analysis, "greedy", ids, families=["layers"])["layers"].flatten()
    layers = list(llama.model.model.layers)
    left = list(range(4))
    with torch.no_grad():
        for _ in range(3):
            losses = {}
            for unit in left:
                llama.model.model.layers = nn.ModuleList(layers[i] for i in left if i != unit)
                losses[unit] = llama.model(ids, labels=ids, use_cache=False).loss.item()
            left.remove(min(losses, key=losses.get))
    llama.model.model.layers = nn.ModuleList(layers)
    assert [int(unit) for unit in found.argsort()][3:] == left


def test_flap_corrects_no_bias_if_only_blocks_go():
    """It scores no block, so it has measured nothing to correct with."""
    model = random_model(make_llama(layers=2))
    short = {"data": IDS.repeat(4, 1), "onnx": False, "eval_windows": 1, "tolerance": 0.2, "widths": {"layers": 1}}
    found = mptk.prune(model, method="flap", families=("layers",), progress=None, **short)
    assert found.report.families["layers"]["width"] == 1
    assert all(row["ok"] for row in found.report.proof)


def test_prune_removes_blocks_from_checkpoint_and_graph(tmp_path):
    """A folder with fewer blocks and narrower feed-forward layers, with ONNX."""
    source, small = save_word_model(make_llama(layers=3), tmp_path / "dense"), tmp_path / "small"
    settings = replace(SETTINGS, families=("layers", "ffn"), widths={"layers": 2}, sparsity=0.4, tolerance=0.1)
    report = mptk.prune(source, small, settings).report
    assert report.families["layers"] == {"of": 3, "width": 2, "layers": 1}
    assert report.families["ffn"]["width"] < 40
    assert report.config_changes["num_hidden_layers"] == [3, 2]
    assert {d["stage"] for d in report.proof if d["ok"]} >= {"reloaded checkpoint", "ONNX Runtime decode"}
    assert len(AutoModelForCausalLM.from_pretrained(small).model.layers) == 2
    assert OrtDecoder(small).past == [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    plan = json.loads((small / "plan.json").read_text())["families"]["layers"]
    assert (plan["width"], plan["of"], list(plan["keep"])) == (2, 3, ["model.layers"])


@pytest.mark.always
@pytest.mark.features
def test_the_proof_compares_gradients_of_the_blocks_that_stay(laboratory, tmp_path):
    """Block 1 of the dense model is block 0 of a graph that keeps only it."""
    Plan({"layers": FamilyPlan(1, 2, {"vit.layers": ((1,),)})}).save(tmp_path / "plan.json")
    out = laboratory.prune("image classifier", tmp_path / "out", plan=str(tmp_path / "plan.json"), target="graph")
    assert {row["stage"]: row["ok"] for row in mptk.Report.read(out).proof}["gradients"]


LEARNED = mptk.Settings(
    method="maskprune",
    **{"families": ("layers", "ffn"), "sparsity": 0.5, "tolerance": 0.1, "align": 8, "onnx": False},
    **{"samples": 8, "length": 32, "eval_windows": 1},
    learning=Learning(steps=4, mask_share=0.5, rank=4, training=Training(batch=4, micro=2, lr=3e-3)),
)


def test_maskprune_divides_a_budget_among_blocks_and_channels_or_keeps_a_given_depth(tmp_path):
    """The blocks that turn their input least go, as many as the learned masks say."""
    source, out = save_word_model(make_llama(layers=3), tmp_path / "dense"), tmp_path / "small"
    report = mptk.prune(source, out, LEARNED).report
    assert report.sparsity == pytest.approx(0.5, abs=0.1)
    assert all(d["ok"] for d in report.proof)
    assert "learned masks" in [d["stage"] for d in report.proof]
    kept = Plan.load(out / "plan.json").families
    assert kept.keys() == {"layers", "ffn"}
    assert len(AutoModelForCausalLM.from_pretrained(out).model.layers) == kept["layers"].width < 3
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"width/layers", "width/ffn"} <= rows[0].keys()
    assert all(d.ok for d in mptk.verify(out))
    given = replace(LEARNED, widths={"layers": 2, "ffn": 24})
    report = mptk.prune(source, settings=given).report
    assert (report.families["layers"]["width"], report.families["ffn"]["width"]) == (2, 24)
