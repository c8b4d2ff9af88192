"""FLAP's bias compensation: the lost means go into the consumers' biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from criteria_cases import WINDOWS, Case, SharedLayer
from torch import Tensor

import mptk
from mptk import Plan, analyze, trace
from mptk.ir.families import Analysis
from mptk.ir.resolved_plan import resolve_plan
from mptk.ir.samples import make_token_samples
from mptk.methods import criteria
from mptk.methods.criteria import Calibration, Compensation
from mptk.methods.criteria.flap import FLAP, compensate
from mptk.testing.decoders import FFN_SIZE, LAYER_COUNT
from passes.transforms.masked_reference import mask


def error(case: Case, program: Any, plan: Any) -> float:
    """Mean squared logit error of the cut model against the dense one; masked = rewritten on the way."""
    analysis = replace(case.analysis, program=program)
    with torch.no_grad():
        cut = mptk.rewrite(analysis, plan)(WINDOWS)
        torch.testing.assert_close(mask(analysis, resolve_plan(analysis, plan))(WINDOWS), cut, rtol=1e-4, atol=1e-4)
        return float((cut - case.analysis.program(WINDOWS)).square().mean())


def flapped(analysis: Analysis, widths: dict[str, int]) -> tuple[Plan, Compensation]:
    """The plan of FLAP's scores, and its corrections."""
    families = [analysis.variable(name) for name in widths]
    scores, evidence = criteria.measure_and_score(FLAP, Calibration(analysis, families, make_token_samples(WINDOWS)))
    plan = criteria.select_units(analysis, scores, widths)
    return plan, compensate(analysis, resolve_plan(analysis, plan), evidence)


def test_compensation_moves_lost_means_into_biases(gpt2: Case) -> None:
    plan, result = flapped(gpt2.analysis, {"ffn": 61, "v_dim": 7})
    assert result.statement == "FLAP bias compensation: applied to c_proj"
    assert len(result.state) == 2 * LAYER_COUNT
    for i in range(LAYER_COUNT):
        layer = f"transformer.h.{i}"
        for family, label, name in [("ffn", f"{layer}.mlp", "mlp.c_proj"), ("v_dim", f"{layer}.attn", "attn.c_proj")]:
            keep = plan.families[family].keep[label]
            size = FFN_SIZE if family == "ffn" else 8
            removed = [s * size + u for s, row in enumerate(keep) for u in range(size) if u not in row]
            means, bias = gpt2.inputs[f"{layer}.{name}"].mean(0), f"{layer}.{name}.bias"
            expected = gpt2.weight(bias) + means[removed] @ gpt2.weight(f"{layer}.{name}.weight")[removed]
            torch.testing.assert_close(result.state[bias], expected, rtol=1e-4, atol=1e-5)
    program = gpt2.analysis.program
    assert error(gpt2, program.with_state(result.state), plan) < 0.9 * error(gpt2, program, plan)


def test_compensation_says_where_there_is_no_bias(gqa: Case) -> None:
    _, result = flapped(gqa.analysis, {"q_heads": 2, "ffn": 64})
    assert result.state == {}
    assert result.statement == "FLAP bias compensation: not applied, o_proj and down_proj have no bias"


def test_a_bias_used_twice_gets_the_mean_correction() -> None:
    torch.manual_seed(0)
    model = SharedLayer().eval()
    analysis = analyze(trace(model, (WINDOWS[:2],), dynamic=True))
    family = next(f for f in analysis.families if f.size == 12)
    seen: list[Tensor] = []
    model.outer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    model(WINDOWS)
    plan, result = flapped(analysis, {family.name: 9})
    ((keep,),) = plan.families[family.name].keep.values()
    removed = [u for u in range(12) if u not in keep]
    means = torch.stack([x.mean(0) for x in seen]).mean(0)
    expected = model.outer.bias.detach() + model.outer.weight.detach()[:, removed] @ means[removed]
    torch.testing.assert_close(result.state["outer.bias"], expected, rtol=1e-4, atol=1e-6)
