"""Whole experts: chosen by what they add to their tokens (REAP), cut to legal numbers, proven through the command line.

It reaches for passes.targets.derived, which numbers of experts are legal, and for a criterion's evidence.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import done
from criteria_cases import EXPERTS, WINDOWS, assert_scores, layers, routed
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import mptk
from mptk import Plan, analyze, testing, trace
from mptk.errors import AnalysisError, InputError, PlanError
from mptk.ir import make_token_samples, resolve_plan
from mptk.methods import criteria
from mptk.methods.criteria.observe import Calibration
from mptk.testing import expect_error
from passes.targets.derived import find_derived_families

PLANTED = 3
SIZES = testing.decoders.GROUPED


def planted(model: torch.nn.Module) -> torch.nn.Module:
    """The model with an expert of the largest weights that gives almost nothing: its gate and its output are small."""
    with torch.no_grad():
        for layer in model.model.layers:
            experts = layer.mlp.experts
            experts.gate_up_proj[PLANTED, : testing.decoders.FFN_SIZE] *= 9
            experts.gate_up_proj[PLANTED, testing.decoders.FFN_SIZE :] *= 1e-4
            experts.down_proj[PLANTED] *= 3
    return model


def prune(model: torch.nn.Module, folder: Path, *options: str) -> set[tuple[int, ...]]:
    """Prune by the command line, verify, and return the choices of experts that the layers keep."""
    model.save_pretrained(folder / "dense")
    words = "--data random --samples 8 --length 24 --eval-windows 2 --eval-length 12 --align 1 --no-onnx --out"
    for line in (["prune", folder / "dense", *options, *words.split(), folder / "out"], ["verify", folder / "out"]):
        done(*line)
    (family,) = Plan.load(folder / "out" / "plan.json").families.values()
    return {row for rows in family.keep.values() for row in rows}


def test_reap_is_the_mean_over_an_experts_tokens_of_router_weight_times_output_norm(moe):
    def scores(n: str) -> Tensor:
        _, chosen, weights = moe.inputs[f"{n}.mlp.experts"][:3]
        down = moe.weight(f"{n}.mlp.experts.down_proj")
        own = []
        for expert in range(EXPERTS):
            gates = (weights * (chosen == expert)).sum(1)[(chosen == expert).any(1)]
            own.append((gates * (routed(moe, n, expert)[1] @ down[expert].T).norm(dim=1)).mean())
        return torch.stack(own).detach()[None]

    found = criteria.score_units(moe.analysis, "reap", WINDOWS, families=["experts", "ffn"])
    assert_scores(found["experts"], layers(scores))
    assert_scores(found["ffn"], criteria.score_units(moe.analysis, "wanda", WINDOWS, families=["ffn"])["ffn"])


def test_the_expert_that_adds_least_goes_though_its_weights_are_the_largest(tmp_path):
    model = planted(testing.make_decoder("mixtral", num_hidden_layers=1))
    kept = prune(model, tmp_path, "--method", "reap", "--families", "experts", "--width", "experts=4")
    assert kept == {(0, 1, 2, 4)}
    analysis = analyze(trace(model, dynamic=True))
    for other in ("magnitude", "wanda"):
        scores = criteria.score_units(analysis, other, WINDOWS, families=["experts"])
        assert (scores["experts"].argmax(-1) == PLANTED).all()


def test_it_is_said_which_share_of_the_tokens_choices_is_lost(moe):
    reap, given = criteria.CRITERIA["reap"], make_token_samples(WINDOWS)
    calibration = Calibration(moe.analysis, [moe.analysis.variable("experts")], given)
    scores, evidence = criteria.measure_and_score(reap, calibration)
    plan = criteria.select_units(moe.analysis, scores, {"experts": 3})
    kept = plan.families["experts"].keep
    chosen = {layer: moe.inputs[f"{layer}.experts" if layer.endswith("mlp") else layer][1] for layer in kept}
    lost = sum(int((~torch.isin(chosen[layer], torch.tensor(rows[0]))).sum()) for layer, rows in kept.items())
    share = lost / sum(each.numel() for each in chosen.values())
    assert 0 < share < 1
    said = reap.compensate(moe.analysis, resolve_plan(moe.analysis, plan), evidence)
    assert said.statement == f"{share:.1%} of the router's choices on the calibration text fell on removed experts"
    assert said.state == {}


def shared_expert() -> torch.nn.Module:
    sizes = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "decoder_sparse_step": 1}
    sizes |= {"shared_expert_intermediate_size": 28, "num_hidden_layers": 1}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**SIZES, **sizes})).eval()


def grouped() -> torch.nn.Module:
    sizes = {"n_routed_experts": 10, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3, "n_shared_experts": 1}
    ranks = {"q_lora_rank": 14, "kv_lora_rank": 18, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12}
    more = {"moe_intermediate_size": 20, "first_k_dense_replace": 1, "num_key_value_heads": 6}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **sizes, **ranks, **more})).eval()


def test_groups_of_experts_keep_their_number_and_as_many_experts_as_a_token_has():
    """A class divides its experts into groups by a number that no weight shows: only each group's experts are cut."""
    analysis = analyze(trace(grouped(), dynamic=True))
    groups, within = (analysis.family(name) for name in ("experts.1", "experts.2"))
    assert (groups.size, within.size, within.minimum) == (2, 5, 3)
    assert find_derived_families(analysis)[groups.name].endswith("into as many groups as before")
    assert within.name not in find_derived_families(analysis)
    scores = criteria.score_units(analysis, "reap", WINDOWS, families=[groups.name, within.name])
    assert_scores(scores[groups.name], scores[within.name].sum(-1)[:, None])


class Ungated(torch.nn.Module):
    """A mixture that adds its experts' rows as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.head = torch.nn.Embedding(97, 12), torch.nn.Linear(12, 5), torch.nn.Linear(20, 7)
        self.experts = torch.nn.Parameter(torch.randn(5, 12, 20))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        experts, order = torch.sort(self.router(x).topk(2).indices.flatten())
        counts = torch.histc(experts.float(), bins=5, min=0, max=4)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        rows = torch.ops.transformers.grouped_mm_fallback(x[order // 2], self.experts, ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return self.head(rows[back].view(-1, 2, 20).sum(1) * self.router(x).max(-1, keepdim=True).values)


def test_what_reap_cannot_score_is_refused_with_the_way_out_and_fewer_experts_than_a_token_has(moe):
    with expect_error(InputError, name="families"):
        criteria.score_units(moe.analysis, "reap", WINDOWS, families=["ffn", "hidden"])
    analysis = analyze(trace(Ungated(), (WINDOWS,), dynamic=True))
    (family,) = (f for f in analysis.families if f.size == 5)
    with expect_error(AnalysisError, name=family.groups[0].layer):
        criteria.score_units(analysis, "reap", WINDOWS, families=[family.name])
    assert moe.analysis.family("experts").minimum == moe.model.config.num_experts_per_tok
    scores = criteria.score_units(moe.analysis, "random", families=["experts"])
    with expect_error(PlanError, name="experts"):
        mptk.rewrite(moe.analysis, criteria.select_units(moe.analysis, scores, {"experts": 1}))


@pytest.mark.parametrize(
    ("build", "given", "rank"),
    [
        # the queries' latent space, whose norm follows the cut, and whole experts
        (grouped, {"families": ("ffn.1", "experts.2"), "widths": {"ffn.1": 8, "experts.2": 3}}, 16),
        (shared_expert, {"method": "reap", "families": "experts", "widths": {"experts": 3}}, 0),
        (grouped, {"families": "ffn.3", "method": "maskprune", "steps": 4, "sparsity": 0.1, "tolerance": 0.1}, 0),
    ],
    ids=["latent queries", "shared expert", "learned"],
)
def test_other_mixtures_are_cut_trained_and_proven(build, given, rank):
    how = {"method": "wanda", "steps": 2, "batch": 2, "samples": 4, "length": 12, "eval_windows": 1, "eval_length": 12}
    how |= {"data": torch.randint(3, 90, (8, 12)), "align": 1, "progress": None, **given}
    found = mptk.prune(testing.draw_weights(build()), **how)
    assert found.report.recovery["rank"] == rank
    assert "trained model" in {row["stage"] for row in found.report.proof}
