"""A cut that one config class refuses, held by another class with equal logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from stock_specs import VOCAB, one_group, refused
from torch import Tensor
from transformers import LlamaForCausalLM

from passes.targets.stock.attempt import Refusal
from passes.targets.stock.config import StockConfig
from passes.targets.stock.rehome import find_other_class


def reference_logits(refusal: Refusal, state: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of the class whose config refused: the model itself does not mind."""
    reference = LlamaForCausalLM(refusal.config).eval()
    reference.load_state_dict(state)
    with torch.no_grad():
        return reference(tokens).logits


def test_a_refused_config_is_rehomed_in_a_class_with_equal_logits() -> None:
    torch.manual_seed(0)
    spec = one_group()
    keep = {"q": [0, 1, 3, 4, 5]}
    refusal = refused(spec.probe({"q": 5}))
    state, tokens = spec.cut(keep), torch.randint(VOCAB, (2, 31))
    reference = reference_logits(refusal, state, tokens)

    def check(stock: StockConfig) -> float:
        model = stock.model_class(stock.config).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            return (model(tokens).logits - reference).abs().max().item()

    found = find_other_class(refusal.config, spec.shapes({"q": 5}), check)
    assert found.model_class is not LlamaForCausalLM
    assert found.config.num_attention_heads == 5
    assert check(found) <= 1e-6
    assert (reference - spec.masked_logits(keep, tokens)).abs().max() < 1e-5
    assert found.changes["model_type"] == ("llama", found.config.model_type)
    assert getattr(found.config, "sliding_window", None) is None


def test_a_class_with_other_logits_is_no_home() -> None:
    spec = one_group()
    refusal = refused(spec.probe({"q": 5}))
    result = refused(find_other_class(refusal.config, spec.shapes({"q": 5}), lambda stock: 0.25))
    assert result.kind == "numeric"
    assert "0.25" in result.reason
    strange = {**spec.shapes({"q": 5}), "extra.weight": (3,)}
    assert refused(find_other_class(refusal.config, strange, lambda stock: 0.0)).kind == "names"
