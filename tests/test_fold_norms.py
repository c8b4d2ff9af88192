"""RMS norms after a cut of the residual width: the folded program equals the masked dense one."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from mptk.cut import resolve_plan
from mptk.plan import FamilyPlan, Plan
from passes.fold_norms import fold_norms
from passes.group import analyze
from passes.mask import mask
from passes.rewrite import rewrite
from passes.trace import trace

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 97,
}
MODELS = {
    "weight": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=1e-2)),
    "one plus weight": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, rms_norm_eps=1e-6, pad_token_id=0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_scales_go_into_weights_and_epsilons(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
    ids = torch.randint(97, (2, 7))
    analysis = analyze(trace(model))
    keep = tuple(sorted(torch.randperm(48)[:30].tolist()))
    plan = Plan({"hidden": FamilyPlan(30, 48, {analysis.family("hidden").groups[0].layer: (keep,)})})
    cut = rewrite(analysis, plan)
    folded, epsilons = fold_norms(cut)
    with torch.no_grad():
        expected = mask(analysis, resolve_plan(analysis, plan))(ids)
        assert (folded(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (trace(model)(ids) - expected).abs().max() > 0.01 * expected.abs().max()
    eps = model.config.rms_norm_eps
    assert epsilons == pytest.approx({eps: eps * 48 / 30})
    scales = [
        n for n in folded.graph.graph.nodes if n.target is torch.ops.aten.mul.Tensor and isinstance(n.args[1], float)
    ]
    assert not any("stack_trace" not in n.meta for n in scales)
