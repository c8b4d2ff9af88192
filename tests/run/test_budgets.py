"""Budgets other than the parameters of blocks: the whole model, the KV cache, and the memory of serving."""

from __future__ import annotations

import pytest
import torch
from toy_checkpoints import llama_config
from transformers import LlamaForCausalLM

import mptk
from mptk.errors import BudgetError, InputError
from mptk.testing import expect_error

LAYERS, HEADS, GROUPS, DIM, FFN = 2, 8, 4, 8, 96
SETTINGS = mptk.Settings(method="magnitude", samples=2, length=16, align=1, onnx=False, portable=False, tolerance=0.02)
LEVERS = {"hidden", "layers", "vocabulary", "kv_heads", "align", "portable"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": HEADS * DIM, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "head_dim": DIM}
    config = llama_config(**sizes, num_attention_heads=HEADS, num_key_value_heads=GROUPS)
    return LlamaForCausalLM(config).eval()


def pruned(model: LlamaForCausalLM, **settings: object) -> mptk.Pruned:
    found = mptk.prune(model, None, SETTINGS, progress=None, **settings)
    assert found is not None
    return found


def cache(groups: int, context: int, itemsize: int = 4) -> int:
    """Keys and values: bytes of one sequence."""
    return 2 * LAYERS * groups * DIM * context * itemsize


def weights(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_half_of_the_kv_cache_is_half_of_the_kv_heads(model):
    found = pruned(model, budget="kv-cache", sparsity=0.5, context=1000)
    assert found.plan.widths == {"kv_groups": GROUPS // 2}, "the other families would save nothing"
    assert found.report.cost["dense"]["kv_cache"] == cache(GROUPS, 1000)
    assert found.report.cost["pruned"]["kv_cache"] == cache(GROUPS // 2, 1000)


def test_serving_counts_weights_and_the_cache(model):
    stored, context = LlamaForCausalLM(model.config).bfloat16().eval(), 2048
    found = pruned(stored, budget="serving", sparsity=0.43, context=context)
    dense, left = (found.report.cost[name]["serving"] for name in ("dense", "pruned"))
    assert dense == weights(stored) + cache(GROUPS, context, 2)
    assert left == weights(found.model) + cache(found.plan.widths["kv_groups"], context, 2)
    assert 1 - left / dense == pytest.approx(0.43, abs=0.02)


def test_total_counts_embeddings_too(model):
    found = pruned(model, budget="total", sparsity=0.2)
    gone = 1 - sum(p.numel() for p in found.model.parameters()) / sum(p.numel() for p in model.parameters())
    assert gone == pytest.approx(0.2, abs=0.02)
    assert found.report.sparsity > gone + 0.03, "it says the share of the blocks"


@pytest.mark.features
def test_merged_heads_count_in_the_budget(model):
    found = pruned(model, budget="kv-cache", sparsity=0, kv_heads=2)
    assert found.report.cost["dense"]["kv_cache"] == cache(GROUPS, 4096)
    assert found.report.cost["pruned"]["kv_cache"] == cache(2, 4096)


def test_layers_that_go_take_their_cache(model):
    found = pruned(model, budget="kv-cache", sparsity=0.5, families=("layers",), method="random")
    assert found.report.cost["pruned"]["kv_cache"] == cache(GROUPS, 4096) / LAYERS


@pytest.mark.features
def test_a_model_without_a_cache_is_refused(laboratory):
    with expect_error(InputError, name="budget"):
        mptk.prune(str(laboratory.open_model("encoder")), None, laboratory.make_settings("encoder"), budget="kv-cache")


@pytest.mark.features
@pytest.mark.parametrize(
    ("asked", "levers"),
    [
        ({"sparsity": 0.95}, {"hidden", "layers"}),
        ({"sparsity": 0.85, "portable": True}, {"portable", "hidden"}),
        ({"sparsity": 0.9, "budget": "total"}, {"vocabulary", "hidden"}),
        ({"sparsity": 0.85, "budget": "kv-cache"}, {"kv_heads", "layers"}),
        ({"sparsity": 0.2, "families": ("ffn",), "align": 48}, {"align"}),
    ],
)
def test_a_budget_that_is_out_of_reach_names_the_levers(model, asked, levers):
    with expect_error(BudgetError, name="sparsity") as refused:
        pruned(model, **asked)
    assert {lever for lever in LEVERS if lever in str(refused.value)} == levers
    assert "--" not in str(refused.value), "Python reads keywords"
