"""Which config fields a search finds for a class: products, shared fields, families cut together, ladders, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from stock_specs import Spec, changed, gated, gpt2, gpt_neox, llama, mixtral, one_group, opt, qwen2, refused, t5
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from benchmarks.tiny_models import tiny_model
from mptk import analyze, trace
from passes.targets.legalize import discover
from passes.targets.stock.learn import Stock


def ladder(stock: Stock, family: str, widths: Iterable[int], **others: int) -> list[int]:
    return [width for width in widths if stock.check_widths({**others, family: width}) is None]


def test_a_field_is_the_product_of_two_families_and_experts_are_one():
    stock = llama().discover()
    assert stock.refusals == {}
    assert changed(stock.build_config({"kv": 1, "q": 2})) == {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert changed(mixtral().discover().build_config({"experts": 3})) == {"num_local_experts": 3}


def test_the_ladder_is_what_the_config_class_accepts():
    stock = one_group().discover()
    assert ladder(stock, "q", range(1, 7)) == [1, 2, 3, 4, 6]
    assert ladder(stock, "ffn", range(8, 81, 24), q=4) == [8, 32, 56, 80]
    refusal = refused(stock.check_widths({"q": 5}))
    assert (refusal.kind, refusal.where) == ("validator", "LlamaConfig.validate_architecture")
    assert "hidden size (48) is not a multiple of the number of attention heads (5)" in refusal.reason


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (gpt2, "heads and hidden are one number in the config and must be cut in proportion"),
        (gpt_neox, "no field sets the sizes of heads and no others"),
        (opt, "no field sets the sizes of heads and no others"),
    ],
)
def test_heads_that_are_wired_to_the_hidden_size_are_refused(make, reason):
    spec = make()
    assert refused(spec.probe({"heads": 3})).kind == "shape"
    stock = spec.discover()
    assert stock.refusals["heads"].reason == reason
    assert ladder(stock, "heads", range(1, 5)) == [4]
    assert ladder(stock, "ffn", [24, 72]) == [24, 72]


def test_heads_and_hidden_together_imply_a_field_that_no_shape_shows():
    spec = gpt2()
    stock = spec.discover()
    assert stock.together == [frozenset({"heads", "hidden"})]
    assert changed(stock.build_config({"heads": 3, "hidden": 36})) == {"n_embd": 36, "n_head": 3, "n_inner": 192}
    assert changed(spec.probe({"heads": 3, "hidden": 36})) == {"n_embd": 36, "n_head": 3, "n_inner": 192}
    assert refused(stock.check_widths({"heads": 3, "hidden": 24})).kind == "shared"
    assert stock.refusals["heads"].kind == "shared"
    assert "heads" in refused(stock.check_widths({"hidden": 36})).reason


def test_families_that_share_a_field_are_cut_together():
    stock = t5().discover()
    assert stock.together == [frozenset({"encoder", "decoder", "cross"})]
    assert changed(stock.build_config({"encoder": 3, "decoder": 3, "cross": 3})) == {"num_heads": 3}
    refusal = refused(stock.check_widths({"encoder": 3, "decoder": 2, "cross": 3}))
    assert (refusal.kind, refusal.where) == ("shared", "num_heads")
    alone = refused(stock.check_widths({"encoder": 3}))
    assert (alone.kind, alone.where) == ("shared", "encoder")
    assert "cross and decoder" in alone.reason


def test_probing_leaves_no_trace():
    spec = qwen2()
    before = spec.model.config.to_dict()
    spec.discover()
    assert spec.model.config.to_dict() == before
    assert "__getattr__" not in vars(PreTrainedConfig)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_class_is_built_three_times_at_most(kind):
    """With symbols, with symbols for what its config leaves open, and once with the numbers that were found.

    A class with experts does not run on tensors without numbers. It is built once more to see that it never did.
    """
    model: Any = tiny_model("causal-lm", kind).model
    analysis, built, init = analyze(trace(model)), [], type(model).__init__
    own = {"__init__": lambda *given: built.append(given) or init(*given)}
    model.__class__ = type(type(model).__name__, (type(model),), own)
    stock = discover(analysis, model)
    assert "kv_groups" not in stock.refusals
    assert 0 < len(built) <= 3 + (kind == "qwen3_moe")


class Counted(LlamaForCausalLM):
    built = 0

    def __init__(self, config: LlamaConfig) -> None:
        Counted.built += 1
        super().__init__(config)


def test_widths_of_a_deep_model_are_asked_without_building_it():
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = Counted(LlamaConfig(**sizes, **heads))
    stock = Spec(model, {"kv": 3, "q": 3, "ffn": 1536}, [64, 576, 49152], gated(576, head=64)).discover()
    built = Counted.built
    for kv, q in itertools.product((1, 2, 3), (1, 2, 3)):  # 576 is a multiple of every product
        assert stock.check_widths({"kv": kv, "q": q}) is None
    assert ladder(stock, "ffn", range(64, 1537, 64)) == [*range(64, 1537, 64)]
    assert Counted.built == built
