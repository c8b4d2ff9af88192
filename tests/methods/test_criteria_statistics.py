"""What all criteria share: statistics over the text, seeds, progress, the choice of units.

It reaches for mptk.methods.criteria: a plan does not show a score.
"""

from __future__ import annotations

import pytest
import torch
from criteria_cases import WINDOWS, Case
from inside import Inside

from mptk.ir.resolved_plan import resolve_plan
from mptk.methods import criteria
from mptk.methods.criteria import observe
from mptk.testing.decoders import FFN_SIZE, LAYER_COUNT


def test_routed_moments_of_experts_with_no_rows_and_rows_of_no_expert() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 5.0], [100.0, 100.0]])
    moments = observe.compute_moments(x, 1, [0], torch.tensor([2, 2, 3], dtype=torch.int32))
    assert moments.count.tolist() == [[2], [0], [1]]
    assert moments.mean.tolist() == [[2, 4], [0, 0], [5, 5]]
    assert moments.deviation.tolist() == [[2, 8], [0, 0], [0, 0]]


def test_statistics_do_not_depend_on_the_batch_size(gqa: Case, moe: Case, inside: Inside) -> None:
    whole = {c: criteria.score_units(gqa.analysis, c, WINDOWS) for c in ("wanda", "flap", "taylor", "fisher")}
    experts = criteria.score_units(moe.analysis, "flap", WINDOWS)
    inside.bound("mptk.methods.criteria.observe.OBSERVED_TOKENS", 3 * WINDOWS.shape[1])  # batches of 3, 3 and 1
    inside.bound("mptk.methods.criteria.observe.GRADIENT_TOKENS", 1)
    for name, expected in whole.items():
        for family, got in criteria.score_units(gqa.analysis, name, WINDOWS).items():
            torch.testing.assert_close(got, expected[family], rtol=1e-4, atol=1e-8)
    for family, got in criteria.score_units(moe.analysis, "flap", WINDOWS).items():
        torch.testing.assert_close(got, experts[family], rtol=1e-4, atol=1e-8)


def test_merged_variance_survives_a_large_mean() -> None:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    x = x.float()
    parts = [observe.compute_moments(part, 1, []) for part in x.split([7, 50, 3])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    torch.testing.assert_close(merged.deviation / 59, x.double().var(0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", criteria.CRITERIA)
def test_scores_are_deterministic_and_cover_every_family(gqa: Case, moe: Case, name: str) -> None:
    criterion = criteria.CRITERIA[name]
    analysis = (moe if name == "reap" else gqa).analysis
    first, second = (criteria.score_units(analysis, name, WINDOWS) for _ in range(2))
    for family in analysis.families if "channels" in criterion.judges else analysis.depths:
        assert first[family.name].shape == (len(family.groups), family.scopes, family.size)
        assert torch.equal(first[family.name], second[family.name])


def test_random_follows_the_seed_and_nothing_else(gqa: Case) -> None:
    all_families = criteria.score_units(gqa.analysis, "random", seed=4)
    alone = criteria.score_units(gqa.analysis, "random", seed=4, families=["ffn"])
    assert list(alone) == ["ffn"]
    assert torch.equal(alone["ffn"], all_families["ffn"])
    assert not torch.equal(alone["ffn"], criteria.score_units(gqa.analysis, "random", seed=5)["ffn"])


def test_progress_counts_windows(gqa: Case) -> None:
    long = WINDOWS.repeat(1, observe.OBSERVED_TOKENS // (3 * WINDOWS.shape[1]))  # batches of 3, 3 and 1
    seen: list[tuple[int, int]] = []
    criteria.score_units(gqa.analysis, "wanda", long, families=["ffn"], progress=lambda *counts: seen.append(counts))
    assert seen == [(3, 7), (6, 7), (7, 7)]


# ---- select ----


def test_select_keeps_the_best_of_each_scope_row_and_breaks_ties_by_index(gqa: Case) -> None:
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
