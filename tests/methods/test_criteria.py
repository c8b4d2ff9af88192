"""One-shot criteria against formulas written out by hand over module hooks.

It reaches for mptk.methods.criteria: a plan does not show a score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from criteria_cases import (
    EXPERTS,
    WINDOWS,
    Case,
    Q,
    SharedLayer,
    assert_scores,
    heads_of,
    layers,
    norm,
    position_slopes,
    pull,
    routed,
    saliency,
    wanda,
)
from torch import Tensor, nn

import mptk
from mptk import Plan, Samples, analyze, trace
from mptk.errors import AnalysisError, BudgetError, DataError, InputError, ModelError, TraceError
from mptk.ir import Analysis, make_token_samples, resolve_plan
from mptk.methods import criteria
from mptk.methods.criteria import Compensation, fisher, observe
from mptk.methods.criteria.flap import FLAP, compensate
from mptk.methods.criteria.observe import Calibration, find_sites
from mptk.testing import expect_error
from mptk.testing.decoders import FFN_SIZE, HEAD_SIZE, HIDDEN_WIDTH, KV_COUNT, LAYER_COUNT, VOCAB_SIZE
from passes.transforms.masked_reference import mask


def given(case: Case, *families: str) -> Calibration:
    return Calibration(case.analysis, [case.analysis.variable(name) for name in families], make_token_samples(WINDOWS))


class Queries(nn.Module):
    """Queries that are weights alone, repeated for each sample, read what is made of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Parameter(torch.randn(3, 6)), nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6))

    def forward(self, x: Tensor) -> Tensor:
        read: Tensor = self.queries.expand(x.shape[0], -1, -1) @ self.keys(x).transpose(1, 2)
        return read


def test_weights_that_inputs_give_their_size_are_no_weights_of_a_contraction():
    """Perceiver's queries: their value is not known without inputs."""
    analysis = analyze(trace(Queries(), (torch.randn(2, 4, 5),), dynamic=True))
    names = [analysis.program.weights.get(site.weight.name) for site in find_sites(analysis)]
    assert names == ["keys.1.weight"]
    scores = criteria.score_units(analysis, "wanda", Samples({"x": torch.randn(4, 4, 5)}))
    assert all(found.isfinite().all() for found in scores.values())


def test_wanda_sums_over_consumers_by_unit_and_scope_and_takes_producers_where_there_are_none(gqa):
    def sum_pairs(n: str) -> Tensor:
        q = wanda(gqa, f"{n}.self_attn.q_proj").sum(1).view(KV_COUNT, Q, 2, HEAD_SIZE // 2).sum((0, 1, 2))
        return (q + wanda(gqa, f"{n}.self_attn.k_proj").sum(1).view(KV_COUNT, 2, HEAD_SIZE // 2).sum((0, 1)))[None]

    scores = criteria.score_units(gqa.analysis, "wanda", WINDOWS)
    attention = layers(lambda n: heads_of(wanda(gqa, f"{n}.self_attn.o_proj").sum(0)))
    assert_scores(scores["ffn"], layers(lambda n: wanda(gqa, f"{n}.mlp.down_proj").sum(0)[None]))
    assert_scores(scores["kv_groups"], attention.sum((2, 3))[:, None])
    assert_scores(scores["q_heads"], attention.sum(3))
    assert_scores(scores["v_dim"], attention.sum(2))
    assert_scores(scores["rotary_pairs"], layers(sum_pairs))
    readers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    hidden = layers(lambda n: torch.stack([wanda(gqa, f"{n}.{r}").sum(0) for r in readers]).sum(0)).sum(0)
    assert_scores(scores["hidden"], (hidden + wanda(gqa, "lm_head").sum(0))[None, None])


def test_flap_is_variance_times_squared_columns_with_transposed_layers(gpt2):
    def columns(name: str) -> Tensor:
        return gpt2.inputs[name].var(0) * gpt2.weight(f"{name}.weight").square().sum(1)  # Conv1D: [in, out]

    scores = criteria.score_units(gpt2.analysis, "flap", WINDOWS)
    assert_scores(scores["ffn"], layers(lambda n: columns(f"{n}.mlp.c_proj")[None], "transformer.h"))
    heads = layers(lambda n: columns(f"{n}.attn.c_proj").view(6, 8), "transformer.h")
    assert_scores(scores["heads"], heads.sum(2)[:, None])
    assert_scores(scores["v_dim"], heads)


def test_taylor_is_weight_times_gradient_over_all_members(gqa, gpt2, moe):
    scores = criteria.score_units(gqa.analysis, "taylor", WINDOWS, families=["ffn", "q_heads", "hidden"])

    def ffn(n: str) -> Tensor:
        rows = saliency(gqa, f"{n}.mlp.gate_proj.weight") + saliency(gqa, f"{n}.mlp.up_proj.weight")
        return (rows.sum(1) + saliency(gqa, f"{n}.mlp.down_proj.weight").sum(0))[None]

    def q_heads(n: str) -> Tensor:
        rows = saliency(gqa, f"{n}.self_attn.q_proj.weight").sum(1)
        return heads_of(rows + saliency(gqa, f"{n}.self_attn.o_proj.weight").sum(0)).sum(2)

    assert_scores(scores["ffn"], layers(ffn))
    assert_scores(scores["q_heads"], layers(q_heads))
    hidden = torch.zeros(HIDDEN_WIDTH)
    for name, p in gqa.model.named_parameters():
        summed = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        hidden += saliency(gqa, name) if p.ndim == 1 else saliency(gqa, name).sum(summed)
    assert_scores(scores["hidden"], hidden[None, None])

    def gpt2_ffn(n: str) -> Tensor:
        made = saliency(gpt2, f"{n}.mlp.c_fc.weight").sum(0) + saliency(gpt2, f"{n}.mlp.c_fc.bias")
        return (made + saliency(gpt2, f"{n}.mlp.c_proj.weight").sum(1))[None]

    def moe_ffn(n: str) -> Tensor:
        made = saliency(moe, f"{n}.mlp.experts.gate_up_proj").sum(2).view(EXPERTS, 2, FFN_SIZE).sum(1)
        return made + saliency(moe, f"{n}.mlp.experts.down_proj").sum(1)

    for case, expected in ((gpt2, layers(gpt2_ffn, "transformer.h")), (moe, layers(moe_ffn))):
        assert_scores(criteria.score_units(case.analysis, "taylor", WINDOWS, families=["ffn"])["ffn"], expected)


def test_fisher_sees_what_each_position_adds_to_the_gradient_in_a_mask(gqa, moe):
    slopes = fisher.measure_fisher(given(gqa, "ffn", "kv_groups", "q_heads")).slopes
    by_head = layers(lambda n: heads_of(pull(gqa, f"{n}.self_attn.o_proj")))
    assert_scores(slopes["ffn"].mean.float(), layers(lambda n: pull(gqa, f"{n}.mlp.down_proj")[None]))
    assert_scores(slopes["q_heads"].mean.float(), by_head.sum(3))
    assert_scores(slopes["kv_groups"].mean.float(), by_head.sum((2, 3))[:, None])
    each = position_slopes(gqa, "model.layers.0.self_attn.o_proj").view(-1, KV_COUNT, Q * HEAD_SIZE).sum(-1)
    assert slopes["kv_groups"].count == len(each) == WINDOWS.numel()
    assert_scores(slopes["kv_groups"].squares[0, 0].float(), each.square().sum(0))

    def experts(n: str) -> Tensor:
        name = f"{n}.mlp.experts.down_proj"
        return (moe.weight(name) * moe.grads[name]).sum(1)

    assert_scores(fisher.measure_fisher(given(moe, "ffn")).slopes["ffn"].mean.float(), layers(experts))


def test_fisher_is_half_the_curvature_tempered_by_wanda_less_the_slope(gqa):
    def ffn(n: str) -> Tensor:
        each = position_slopes(gqa, f"{n}.mlp.down_proj").double()
        g = each.mean(0)
        curvature = each.square().mean(0) - g.square()
        prior = wanda(gqa, f"{n}.mlp.down_proj").sum(0).double().square()
        tempered = (curvature * prior * curvature.mean() / prior.mean()).sqrt()
        sure = (g.abs() - 2 * (curvature / len(each)).sqrt()).clamp_min(0) * g.sign()
        assert 0 < int((sure != 0).sum()) < FFN_SIZE
        return (0.5 * tempered - sure)[None]

    scores = criteria.score_units(gqa.analysis, "fisher", WINDOWS)
    assert_scores(scores["ffn"], layers(ffn))
    by_wanda = criteria.score_units(gqa.analysis, "wanda", WINDOWS)["rotary_pairs"]  # no consumer
    assert_scores(scores["rotary_pairs"], by_wanda)


def test_magnitude_is_the_norm_of_all_of_a_units_weights(gpt2, moe):
    def heads(n: str) -> Tensor:
        fused = gpt2.weight(f"{n}.attn.c_attn.weight").square().sum(0) + gpt2.weight(f"{n}.attn.c_attn.bias").square()
        projection = gpt2.weight(f"{n}.attn.c_proj.weight").square().sum(1)
        return (fused.view(3, 6, 8).sum((0, 2)) + projection.view(6, 8).sum(1)).sqrt()[None]

    assert_scores(criteria.score_units(gpt2.analysis, "magnitude")["heads"], layers(heads, "transformer.h"))

    def ffn(n: str) -> Tensor:
        made = moe.weight(f"{n}.mlp.experts.gate_up_proj").square().sum(2).view(EXPERTS, 2, FFN_SIZE).sum(1)
        return (made + moe.weight(f"{n}.mlp.experts.down_proj").square().sum(1)).sqrt()

    assert_scores(criteria.score_units(moe.analysis, "magnitude")["ffn"], layers(ffn))


def test_each_experts_channels_are_scored_on_its_own_tokens(moe):
    scores = criteria.score_units(moe.analysis, "wanda", WINDOWS, families=["ffn", "experts"])
    flap = criteria.score_units(moe.analysis, "flap", WINDOWS, families=["ffn"])["ffn"]

    def expected(n: str, statistic: Callable[[Tensor], Tensor], power: int) -> Tensor:
        down = moe.weight(f"{n}.mlp.experts.down_proj").abs() ** power
        return torch.stack([down[e].sum(0) * statistic(routed(moe, n, e)[1]) for e in range(EXPERTS)])

    assert_scores(scores["ffn"], layers(lambda n: expected(n, norm, 1)))
    assert_scores(flap, layers(lambda n: expected(n, lambda x: x.var(0), 2)))

    def whole(n: str) -> Tensor:
        made = moe.weight(f"{n}.mlp.experts.gate_up_proj").abs().sum(1)
        own = torch.stack([(made[e] * norm(routed(moe, n, e)[0])).sum() for e in range(EXPERTS)])
        return (wanda(moe, f"{n}.mlp.gate").sum(1) + own + expected(n, norm, 1).sum(1))[None]

    assert_scores(scores["experts"], layers(whole))


class BlockDiagonal(nn.Module):
    """A weight of its own for each of 3 blocks of 4 channels: y = Σ_g x_g W_g."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(VOCAB_SIZE, 7), nn.Linear(7, 12)
        self.blocks = nn.Parameter(torch.randn(3, 4, 11))

    def forward(self, ids: Tensor) -> Any:
        x = self.inner(self.embed(ids)).unflatten(-1, (3, 4))
        return torch.einsum("btgk,gko->bto", x, self.blocks)


def test_blocks_of_a_batched_product_keep_their_own_statistics():
    torch.manual_seed(0)
    model = BlockDiagonal().eval()
    analysis = analyze(trace(model, (WINDOWS[:2],), dynamic=True))
    family = next(f for f in analysis.families if f.size == 4)
    with torch.no_grad():
        x = model.inner(model.embed(WINDOWS)).flatten(0, 1).unflatten(-1, (3, 4))
    expected = norm(x) * model.blocks.detach().abs().sum(2)
    assert_scores(criteria.score_units(analysis, "wanda", WINDOWS)[family.name], expected[None])


def test_moments_of_experts_with_no_rows_and_rows_of_no_expert_and_merged_about_a_large_mean():
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 5.0], [100.0, 100.0]])
    moments = observe.compute_moments(x, 1, [0], torch.tensor([2, 2, 3], dtype=torch.int32))
    assert moments.count.tolist() == [[2], [0], [1]]
    assert moments.mean.tolist() == [[2, 4], [0, 0], [5, 5]]
    assert moments.deviation.tolist() == [[2, 8], [0, 0], [0, 0]]
    x = (torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4).float()
    one, two, three = (observe.compute_moments(part, 1, []) for part in x.split([7, 50, 3]))
    torch.testing.assert_close(one.merge(two).merge(three).deviation / 59, x.double().var(0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", criteria.CRITERIA)
def test_scores_are_deterministic_and_cover_every_family(gqa, moe, name):
    criterion = criteria.CRITERIA[name]
    analysis = (moe if name == "reap" else gqa).analysis
    first, second = (criteria.score_units(analysis, name, WINDOWS) for _ in range(2))
    for family in analysis.families if "channels" in criterion.judges else analysis.depths:
        assert first[family.name].shape == (len(family.groups), family.scopes, family.size)
        assert torch.equal(first[family.name], second[family.name])


def test_random_follows_the_seed_and_nothing_else(gqa):
    whole, other = (criteria.score_units(gqa.analysis, "random", seed=seed)["ffn"] for seed in (4, 5))
    (alone,) = criteria.score_units(gqa.analysis, "random", seed=4, families=["ffn"]).values()
    assert torch.equal(alone, whole)
    assert not torch.equal(alone, other)


def test_progress_counts_windows(gqa):
    seen: list[tuple[int, int]] = []
    criteria.score_units(gqa.analysis, "wanda", WINDOWS, families=["ffn"], progress=lambda *counts: seen.append(counts))
    assert seen == [(66, 80), (80, 80)]


def test_select_keeps_the_best_of_each_scope_row_and_breaks_ties_by_index(gqa):
    scores = {
        "q_heads": torch.tensor([[[1.0, 3.0, 2.0], [5.0, 0.0, 9.0]], [[2.0, 2.0, 2.0], [0.0, 1.0, 1.0]]]),
        "ffn": torch.arange(FFN_SIZE).float().expand(LAYER_COUNT, 1, FFN_SIZE),
    }
    plan = criteria.select_units(gqa.analysis, scores, {"q_heads": 2, "ffn": 3})
    assert dict(plan.families["q_heads"].keep) == {
        "model.layers.0.self_attn": ((1, 2), (0, 2)),
        "model.layers.1.self_attn": ((0, 1), (1, 2)),
    }
    assert plan.families["ffn"].keep["model.layers.1.mlp"] == ((77, 78, 79),)
    assert plan.widths == {"q_heads": 2, "ffn": 3}
    resolve_plan(gqa.analysis, plan)


# ---- FLAP's compensation: the lost means go into the consumers' biases ----


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


def test_compensation_moves_lost_means_into_biases_and_says_where_there_is_none(gqa, gpt2):
    plan, result = flapped(gpt2.analysis, {"ffn": 61, "v_dim": 7})
    assert result.statement == "FLAP bias compensation: applied to c_proj"
    assert len(result.state) == 2 * LAYER_COUNT
    for i in range(LAYER_COUNT):
        layer = f"transformer.h.{i}"
        for family, label, name in [("ffn", f"{layer}.mlp", "mlp.c_proj"), ("v_dim", f"{layer}.attn", "attn.c_proj")]:
            keep = plan.families[family].keep[label]
            size = FFN_SIZE if family == "ffn" else 8
            removed = [s * size + u for s, row in enumerate(keep) for u in range(size) if u not in row]
            lost = gpt2.inputs[f"{layer}.{name}"].mean(0)[removed] @ gpt2.weight(f"{layer}.{name}.weight")[removed]
            bias = f"{layer}.{name}.bias"
            torch.testing.assert_close(result.state[bias], gpt2.weight(bias) + lost, rtol=1e-4, atol=1e-5)
    program = gpt2.analysis.program
    assert error(gpt2, program.with_state(result.state), plan) < 0.9 * error(gpt2, program, plan)
    _, result = flapped(gqa.analysis, {"q_heads": 2, "ffn": 64})
    assert result.state == {}
    assert result.statement == "FLAP bias compensation: not applied, o_proj and down_proj have no bias"


def test_a_bias_used_twice_gets_the_mean_correction():
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


class NoContraction(nn.Module):
    """Channels that no weight mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.scale = nn.Embedding(VOCAB_SIZE, 12), nn.Parameter(torch.randn(12))

    def forward(self, ids: Tensor) -> Any:
        return (self.embed(ids) * self.scale).sum(-1)


def test_a_family_that_no_weight_mixes_has_magnitude_only():
    analysis = analyze(trace(NoContraction(), (WINDOWS[:2],), dynamic=True))
    (family,) = analysis.families
    with expect_error(AnalysisError, name=family.name):
        criteria.score_units(analysis, "wanda", WINDOWS)
    assert criteria.score_units(analysis, "magnitude")[family.name].shape == (1, 1, 12)
    with expect_error(ModelError):
        criteria.score_units(analysis, "taylor", WINDOWS)


def test_what_cannot_be_scored_or_selected_is_refused(gqa, moe):
    analysis = gqa.analysis
    with expect_error(InputError, name="wand") as refused:
        criteria.score_units(analysis, "wand")
    assert "wanda" in refused.value.nearest
    for name in set(criteria.CRITERIA) - {"random", "magnitude"}:
        assert criteria.CRITERIA[name].passes
        with expect_error(InputError, name="data"):
            criteria.score_units(moe.analysis if name == "reap" else analysis, name)
    with expect_error(DataError):
        criteria.score_units(analysis, "wanda", WINDOWS.float())
    with expect_error(InputError, name="fn") as refused:
        criteria.score_units(analysis, "magnitude", families=["fn"])
    assert refused.value.nearest[0] == "ffn"
    scores = criteria.score_units(analysis, "magnitude", families=["ffn"])
    with expect_error(BudgetError, name="ffn"):
        criteria.select_units(analysis, scores, {"ffn": FFN_SIZE + 1})
    with expect_error(InputError, name="kv_groups"):
        criteria.select_units(analysis, scores, {"kv_groups": 1})
    state = {n: t * torch.inf for n, t in analysis.program.state.items() if "down_proj" in n}
    infinite = replace(analysis, program=analysis.program.with_state(state))
    with expect_error(ModelError, name="magnitude"):
        criteria.score_units(infinite, "magnitude", families=["ffn"])


def test_programs_of_fixed_sizes_or_without_weights_are_refused():
    fixed = analyze(trace(SharedLayer(), (WINDOWS[:2],)))
    with expect_error(DataError):
        criteria.score_units(fixed, "wanda", WINDOWS)
    assert criteria.score_units(fixed, "wanda", WINDOWS[:2])
    with torch.device("meta"):
        bare = SharedLayer()
    with expect_error(TraceError):
        criteria.score_units(analyze(trace(bare, (WINDOWS[:2],))), "magnitude")


def test_the_criterion_of_the_docs_scores_as_they_say(gqa):
    page = (Path(__file__).parents[2] / "docs" / "criteria.md").read_text()
    example = page.split("```python\n")[-1].split("```")[0]
    made: dict[str, Any] = {}
    exec(compile(example, "docs/criteria.md", "exec"), made)  # noqa: S102
    scores = criteria.measure_and_score(made["NORM"], given(gqa, "ffn"))[0]["ffn"]
    assert_scores(scores, layers(lambda n: HIDDEN_WIDTH * norm(gqa.inputs[f"{n}.mlp.down_proj"])[None]))
