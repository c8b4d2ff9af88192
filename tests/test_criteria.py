"""One-shot criteria against formulas written out by hand over module hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import mptk
from mptk.errors import MptkError
from mptk.ir.families import Analysis
from mptk.ir.resolved_plan import resolve_plan
from mptk.methods import criteria
from mptk.methods.criteria import observe
from passes.analysis.group import analyze
from passes.frontend.trace import trace
from passes.transforms.masked_reference import mask

LAYERS, HIDDEN, FFN, VOCAB = 2, 48, 80, 97
KV, Q, HEAD = 2, 3, 10  # query heads: KV · Q = 6
EXPERTS = 5
WINDOWS = torch.randint(3, VOCAB, (7, 9), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    model: Any
    analysis: Analysis
    inputs: dict[str, Tensor]
    """Module name → its first input over all of WINDOWS, [rows, features]; for experts the tuple of inputs."""
    grads: dict[str, Tensor]

    def weight(self, name: str) -> Tensor:
        return self.analysis.program.state[name].detach()


def make_case(build: Callable[[], Any]) -> Case:
    torch.manual_seed(0)
    model = build().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim > 1 else p.data.add_(torch.randn_like(p) * 0.2)
    inputs: dict[str, Any] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            inputs[name] = args if name.endswith("experts") else args[0].detach().flatten(0, -2)

        return hook

    mixing = [
        (n, m)
        for n, m in model.named_modules()
        if n.endswith("experts") or (getattr(m, "weight", nn.Parameter()).ndim == 2 and not isinstance(m, nn.Embedding))
    ]
    hooks = [m.register_forward_pre_hook(record(n)) for n, m in mixing]
    logits = model(WINDOWS, use_cache=False).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten()).backward()
    for hook in hooks:
        hook.remove()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    return Case(model, analyze(trace(model, dynamic=True)), inputs, grads)


@pytest.fixture(scope="module")
def gqa() -> Case:
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=KV * Q,
        num_key_value_heads=KV, head_dim=HEAD, vocab_size=VOCAB,
    )  # fmt: skip
    return make_case(lambda: LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def gpt2() -> Case:
    config = GPT2Config(
        n_embd=HIDDEN, n_inner=FFN, n_layer=LAYERS, n_head=6, vocab_size=VOCAB, n_positions=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return make_case(lambda: GPT2LMHeadModel(config))


@pytest.fixture(scope="module")
def moe() -> Case:
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=KV * Q,
        num_key_value_heads=KV, vocab_size=VOCAB, num_local_experts=EXPERTS,
    )  # fmt: skip
    return make_case(lambda: MixtralForCausalLM(config))


def norm(x: Tensor) -> Tensor:
    return x.square().sum(0).sqrt()


def wanda(case: Case, name: str) -> Tensor:
    """|W_ij| · ‖x_j‖ of one linear layer, [out, in]."""
    return case.weight(f"{name}.weight").abs() * norm(case.inputs[name])


def layers(f: Callable[[str], Tensor], prefix: str = "model.layers") -> Tensor:
    return torch.stack([f(f"{prefix}.{i}") for i in range(LAYERS)])


def heads_of(positions: Tensor) -> Tensor:
    """[KV · Q · HEAD] → [KV, Q, HEAD]."""
    return positions.view(KV, Q, HEAD)


def assert_scores(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected.float(), rtol=2e-4, atol=1e-7)


# ---- each criterion against its formula ----


def test_wanda_sums_over_consumers_by_unit_and_scope(gqa: Case) -> None:
    scores = criteria.score(gqa.analysis, "wanda", WINDOWS)
    attention = layers(lambda n: heads_of(wanda(gqa, f"{n}.self_attn.o_proj").sum(0)))
    assert_scores(scores["ffn"], layers(lambda n: wanda(gqa, f"{n}.mlp.down_proj").sum(0)[None]))
    assert_scores(scores["kv_groups"], attention.sum((2, 3))[:, None])
    assert_scores(scores["q_heads"], attention.sum(3))
    assert_scores(scores["v_dim"], attention.sum(2))


def test_wanda_of_the_residual_width_sums_over_every_reader(gqa: Case) -> None:
    readers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    expected = layers(lambda n: sum((wanda(gqa, f"{n}.{r}").sum(0) for r in readers), torch.zeros(HIDDEN))).sum(0)
    expected = expected + wanda(gqa, "lm_head").sum(0)
    assert_scores(criteria.score(gqa.analysis, "wanda", WINDOWS, families=["hidden"])["hidden"], expected[None, None])


def test_wanda_scores_units_without_a_consumer_by_their_producers(gqa: Case) -> None:
    def pairs(n: str) -> Tensor:
        q = wanda(gqa, f"{n}.self_attn.q_proj").sum(1).view(KV, Q, 2, HEAD // 2).sum((0, 1, 2))
        return (q + wanda(gqa, f"{n}.self_attn.k_proj").sum(1).view(KV, 2, HEAD // 2).sum((0, 1)))[None]

    assert_scores(criteria.score(gqa.analysis, "wanda", WINDOWS)["rotary_pairs"], layers(pairs))


def test_flap_is_variance_times_squared_columns_with_transposed_layers(gpt2: Case) -> None:
    def columns(name: str) -> Tensor:
        return gpt2.inputs[name].var(0) * gpt2.weight(f"{name}.weight").square().sum(1)  # Conv1D: [in, out]

    scores = criteria.score(gpt2.analysis, "flap", WINDOWS)
    assert_scores(scores["ffn"], layers(lambda n: columns(f"{n}.mlp.c_proj")[None], "transformer.h"))
    heads = layers(lambda n: columns(f"{n}.attn.c_proj").view(6, 8), "transformer.h")
    assert_scores(scores["heads"], heads.sum(2)[:, None])
    assert_scores(scores["v_dim"], heads)


def saliency(case: Case, name: str) -> Tensor:
    return (case.weight(name) * case.grads[name]).abs()


def test_taylor_is_weight_times_gradient_over_all_members(gqa: Case, gpt2: Case) -> None:
    scores = criteria.score(gqa.analysis, "taylor", WINDOWS, families=["ffn", "q_heads", "hidden"])

    def ffn(n: str) -> Tensor:
        rows = saliency(gqa, f"{n}.mlp.gate_proj.weight") + saliency(gqa, f"{n}.mlp.up_proj.weight")
        return (rows.sum(1) + saliency(gqa, f"{n}.mlp.down_proj.weight").sum(0))[None]

    def q_heads(n: str) -> Tensor:
        rows = saliency(gqa, f"{n}.self_attn.q_proj.weight").sum(1)
        return heads_of(rows + saliency(gqa, f"{n}.self_attn.o_proj.weight").sum(0)).sum(2)

    assert_scores(scores["ffn"], layers(ffn))
    assert_scores(scores["q_heads"], layers(q_heads))
    hidden = torch.zeros(HIDDEN)
    for name, p in gqa.model.named_parameters():
        if p.ndim == 1:
            hidden += saliency(gqa, name)
        else:
            hidden += saliency(gqa, name).sum(1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0)
    assert_scores(scores["hidden"], hidden[None, None])

    def gpt2_ffn(n: str) -> Tensor:
        made = saliency(gpt2, f"{n}.mlp.c_fc.weight").sum(0) + saliency(gpt2, f"{n}.mlp.c_fc.bias")
        return (made + saliency(gpt2, f"{n}.mlp.c_proj.weight").sum(1))[None]

    got = criteria.score(gpt2.analysis, "taylor", WINDOWS, families=["ffn"])["ffn"]
    assert_scores(got, layers(gpt2_ffn, "transformer.h"))


def test_magnitude_is_the_norm_of_all_of_a_units_weights(gpt2: Case, moe: Case) -> None:
    def heads(n: str) -> Tensor:
        fused = gpt2.weight(f"{n}.attn.c_attn.weight").square().sum(0) + gpt2.weight(f"{n}.attn.c_attn.bias").square()
        projection = gpt2.weight(f"{n}.attn.c_proj.weight").square().sum(1)
        return (fused.view(3, 6, 8).sum((0, 2)) + projection.view(6, 8).sum(1)).sqrt()[None]

    assert_scores(criteria.score(gpt2.analysis, "magnitude")["heads"], layers(heads, "transformer.h"))

    def ffn(n: str) -> Tensor:
        made = moe.weight(f"{n}.mlp.experts.gate_up_proj").square().sum(2).view(EXPERTS, 2, FFN).sum(1)
        return (made + moe.weight(f"{n}.mlp.experts.down_proj").square().sum(1)).sqrt()

    assert_scores(criteria.score(moe.analysis, "magnitude")["ffn"], layers(ffn))


# ---- packed experts ----


def routed(moe: Case, n: str, expert: int) -> tuple[Tensor, Tensor]:
    """An expert's own tokens: its input rows and its inner activations."""
    x, chosen = moe.inputs[f"{n}.mlp.experts"][:2]
    x = x[(chosen == expert).any(1)].detach()
    gate, up = (x @ moe.weight(f"{n}.mlp.experts.gate_up_proj")[expert].T).chunk(2, -1)
    return x, silu(gate) * up


def test_each_experts_channels_are_scored_on_its_own_tokens(moe: Case) -> None:
    scores = criteria.score(moe.analysis, "wanda", WINDOWS, families=["ffn", "experts"])
    flap = criteria.score(moe.analysis, "flap", WINDOWS, families=["ffn"])["ffn"]

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


def test_gradients_pass_through_packed_experts(moe: Case) -> None:
    def ffn(n: str) -> Tensor:
        made = saliency(moe, f"{n}.mlp.experts.gate_up_proj").sum(2).view(EXPERTS, 2, FFN).sum(1)
        return made + saliency(moe, f"{n}.mlp.experts.down_proj").sum(1)

    assert_scores(criteria.score(moe.analysis, "taylor", WINDOWS, families=["ffn"])["ffn"], layers(ffn))


def test_routed_moments_of_experts_with_no_rows_and_rows_of_no_expert() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 5.0], [100.0, 100.0]])
    moments = observe.moments_of(x, 1, [0], torch.tensor([2, 2, 3], dtype=torch.int32))
    assert moments.count.tolist() == [[2], [0], [1]]
    assert moments.mean.tolist() == [[2, 4], [0, 0], [5, 5]]
    assert moments.deviation.tolist() == [[2, 8], [0, 0], [0, 0]]


class BlockDiagonal(nn.Module):
    """A weight of its own for each of 3 blocks of 4 channels: y = Σ_g x_g W_g."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(VOCAB, 7), nn.Linear(7, 12)
        self.blocks = nn.Parameter(torch.randn(3, 4, 11))

    def forward(self, ids: Tensor) -> Any:
        x = self.inner(self.embed(ids)).unflatten(-1, (3, 4))
        return torch.einsum("btgk,gko->bto", x, self.blocks)


def test_blocks_of_a_batched_product_keep_their_own_statistics() -> None:
    torch.manual_seed(0)
    model = BlockDiagonal().eval()
    analysis = analyze(trace(model, (WINDOWS[:2],), dynamic=True))
    family = next(f for f in analysis.families if f.size == 4)
    with torch.no_grad():
        x = model.inner(model.embed(WINDOWS)).flatten(0, 1).unflatten(-1, (3, 4))
    expected = norm(x) * model.blocks.detach().abs().sum(2)
    assert_scores(criteria.score(analysis, "wanda", WINDOWS)[family.name], expected[None])


# ---- statistics ----


def test_statistics_do_not_depend_on_the_batch_size(gqa: Case, moe: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {c: criteria.score(gqa.analysis, c, WINDOWS) for c in ("wanda", "flap", "taylor")}
    experts = criteria.score(moe.analysis, "flap", WINDOWS)
    monkeypatch.setattr(observe, "OBSERVED_TOKENS", 3 * WINDOWS.shape[1])  # batches of 3, 3 and 1
    monkeypatch.setattr(observe, "GRADIENT_TOKENS", 1)
    for name, expected in whole.items():
        for family, got in criteria.score(gqa.analysis, name, WINDOWS).items():
            torch.testing.assert_close(got, expected[family], rtol=1e-4, atol=1e-8)
    for family, got in criteria.score(moe.analysis, "flap", WINDOWS).items():
        torch.testing.assert_close(got, experts[family], rtol=1e-4, atol=1e-8)


def test_merged_variance_survives_a_large_mean() -> None:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    x = x.float()
    parts = [observe.moments_of(part, 1, []) for part in x.split([7, 50, 3])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    torch.testing.assert_close(merged.deviation / 59, x.double().var(0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", criteria.CRITERIA)
def test_scores_are_deterministic_and_cover_every_family(gqa: Case, name: str) -> None:
    first, second = (criteria.score(gqa.analysis, name, WINDOWS) for _ in range(2))
    for family in gqa.analysis.families:
        assert first[family.name].shape == (len(family.groups), family.scopes, family.size)
        assert torch.equal(first[family.name], second[family.name])


def test_random_follows_the_seed_and_nothing_else(gqa: Case) -> None:
    all_families = criteria.score(gqa.analysis, "random", seed=4)
    alone = criteria.score(gqa.analysis, "random", seed=4, families=["ffn"])
    assert list(alone) == ["ffn"]
    assert torch.equal(alone["ffn"], all_families["ffn"])
    assert not torch.equal(alone["ffn"], criteria.score(gqa.analysis, "random", seed=5)["ffn"])


def test_progress_counts_windows(gqa: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "OBSERVED_TOKENS", 3 * WINDOWS.shape[1])
    seen: list[tuple[int, int]] = []
    criteria.score(gqa.analysis, "wanda", WINDOWS, families=["ffn"], progress=lambda *counts: seen.append(counts))
    assert seen == [(3, 7), (6, 7), (7, 7)]


# ---- select ----


def test_select_keeps_the_best_of_each_scope_row_and_breaks_ties_by_index(gqa: Case) -> None:
    scores = {
        "q_heads": torch.tensor([[[1.0, 3.0, 2.0], [5.0, 0.0, 9.0]], [[2.0, 2.0, 2.0], [0.0, 1.0, 1.0]]]),
        "ffn": torch.arange(FFN).float().expand(LAYERS, 1, FFN),
    }
    plan = criteria.select(gqa.analysis, scores, {"q_heads": 2, "ffn": 3})
    assert dict(plan.families["q_heads"].keep) == {
        "model.layers.0.self_attn": ((1, 2), (0, 2)),
        "model.layers.1.self_attn": ((0, 1), (1, 2)),
    }
    assert plan.families["ffn"].keep["model.layers.1.mlp"] == ((77, 78, 79),)
    assert plan.widths == {"q_heads": 2, "ffn": 3}
    resolve_plan(gqa.analysis, plan)


# ---- FLAP's bias compensation ----


def error(case: Case, program: Any, plan: Any) -> float:
    """Mean squared logit error of the cut model against the dense one; masked = rewritten on the way."""
    analysis = replace(case.analysis, program=program)
    with torch.no_grad():
        cut = mptk.rewrite(analysis, plan)(WINDOWS)
        torch.testing.assert_close(mask(analysis, resolve_plan(analysis, plan))(WINDOWS), cut, rtol=1e-4, atol=1e-4)
        return float((cut - case.analysis.program(WINDOWS)).square().mean())


def test_compensation_moves_lost_means_into_biases(gpt2: Case) -> None:
    result = criteria.one_shot(gpt2.analysis, "flap", {"ffn": 61, "v_dim": 7}, WINDOWS)
    assert result.statement == "FLAP bias compensation: applied to c_proj"
    assert len(result.state) == 2 * LAYERS
    for i in range(LAYERS):
        layer = f"transformer.h.{i}"
        for family, label, name in [("ffn", f"{layer}.mlp", "mlp.c_proj"), ("v_dim", f"{layer}.attn", "attn.c_proj")]:
            keep = result.plan.families[family].keep[label]
            size = FFN if family == "ffn" else 8
            removed = [s * size + u for s, row in enumerate(keep) for u in range(size) if u not in row]
            means, bias = gpt2.inputs[f"{layer}.{name}"].mean(0), f"{layer}.{name}.bias"
            expected = gpt2.weight(bias) + means[removed] @ gpt2.weight(f"{layer}.{name}.weight")[removed]
            torch.testing.assert_close(result.state[bias], expected, rtol=1e-4, atol=1e-5)
    evidence = criteria.gather(gpt2.analysis, "flap", WINDOWS, families=["ffn", "v_dim"])
    again = criteria.compensate(gpt2.analysis, resolve_plan(gpt2.analysis, result.plan), evidence.observations)
    assert all(torch.equal(bias, result.state[name]) for name, bias in again.state.items())
    program = gpt2.analysis.program
    assert error(gpt2, program.with_state(result.state), result.plan) < 0.9 * error(gpt2, program, result.plan)


def test_compensation_says_where_there_is_no_bias(gqa: Case) -> None:
    result = criteria.one_shot(gqa.analysis, "flap", {"q_heads": 2, "ffn": 64}, WINDOWS, seed=3)
    assert result.state == {}
    assert result.statement == "FLAP bias compensation: not applied, o_proj and down_proj have no bias"
    assert result.plan.meta == {"criterion": "flap", "seed": 3, "calibration": {"windows": 7, "length": 9}}
    assert criteria.one_shot(gqa.analysis, "wanda", {"ffn": 64}, WINDOWS).statement == ""


class SharedLayer(nn.Module):
    """One feed-forward layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 7), nn.Linear(7, 13)
        self.inner, self.outer = nn.Linear(7, 12), nn.Linear(12, 7)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for _ in range(2):
            x = x + self.outer(self.inner(x).relu())
        return self.head(x)


def test_a_bias_used_twice_gets_the_mean_correction() -> None:
    torch.manual_seed(0)
    model = SharedLayer().eval()
    analysis = analyze(trace(model, (WINDOWS[:2],), dynamic=True))
    family = next(f for f in analysis.families if f.size == 12)
    seen: list[Tensor] = []
    model.outer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    model(WINDOWS)
    result = criteria.one_shot(analysis, "flap", {family.name: 9}, WINDOWS)
    ((keep,),) = result.plan.families[family.name].keep.values()
    removed = [u for u in range(12) if u not in keep]
    means = torch.stack([x.mean(0) for x in seen]).mean(0)
    expected = model.outer.bias.detach() + model.outer.weight.detach()[:, removed] @ means[removed]
    torch.testing.assert_close(result.state["outer.bias"], expected, rtol=1e-4, atol=1e-6)


# ---- errors ----


class NoContraction(nn.Module):
    """Channels that no weight mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.scale = nn.Embedding(VOCAB, 12), nn.Parameter(torch.randn(12))

    def forward(self, ids: Tensor) -> Any:
        return (self.embed(ids) * self.scale).sum(-1)


def test_a_family_that_no_weight_mixes_says_what_can_score_it() -> None:
    analysis = analyze(trace(NoContraction(), (WINDOWS[:2],), dynamic=True))
    (family,) = analysis.families
    with pytest.raises(MptkError, match=rf"{family.name} .*use magnitude"):
        criteria.score(analysis, "wanda", WINDOWS)
    assert criteria.score(analysis, "magnitude")[family.name].shape == (1, 1, 12)
    with pytest.raises(MptkError, match="needs logits"):
        criteria.score(analysis, "taylor", WINDOWS)


def test_user_errors_name_cause_and_remedy(gqa: Case) -> None:
    analysis = gqa.analysis
    assert [criteria.needs_data(n) for n in criteria.CRITERIA] == [False, False, True, True, True]
    with pytest.raises(MptkError, match="no criterion 'wand'; choose one of random, magnitude"):
        criteria.needs_data("wand")
    with pytest.raises(MptkError, match="wanda needs calibration text"):
        criteria.score(analysis, "wanda")
    with pytest.raises(MptkError, match="pass int64"):
        criteria.score(analysis, "wanda", WINDOWS.float())
    with pytest.raises(MptkError, match="no family 'fn'; there are hidden"):
        criteria.score(analysis, "magnitude", families=["fn"])
    scores = criteria.score(analysis, "magnitude", families=["ffn"])
    with pytest.raises(MptkError, match=rf"cannot keep {FFN + 1} units; give a width in 1..{FFN}"):
        criteria.select(analysis, scores, {"ffn": FFN + 1})
    with pytest.raises(MptkError, match="kv_groups has no scores"):
        criteria.select(analysis, scores, {"kv_groups": 1})
    state = {n: t * torch.inf for n, t in analysis.program.state.items() if "down_proj" in n}
    with pytest.raises(MptkError, match="not finite"):
        criteria.score(replace(analysis, program=analysis.program.with_state(state)), "magnitude", families=["ffn"])


def test_programs_of_fixed_sizes_or_without_weights_are_refused() -> None:
    fixed = analyze(trace(SharedLayer(), (WINDOWS[:2],)))
    with pytest.raises(MptkError, match="dynamic=True"):
        criteria.score(fixed, "wanda", WINDOWS)
    assert criteria.score(fixed, "wanda", WINDOWS[:2])
    with torch.device("meta"):
        bare = SharedLayer()
    with pytest.raises(MptkError, match="traced without weights"):
        criteria.score(analyze(trace(bare, (WINDOWS[:2],))), "magnitude")


# ---- extension ----


def test_a_criterion_can_be_added_as_the_docs_say(gqa: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "criteria.md").read_text()
    example = page.split("```python\n")[-1].split("```")[0]
    monkeypatch.setattr(criteria, "CRITERIA", dict(criteria.CRITERIA))
    exec(compile(example, "docs/criteria.md", "exec"), {})  # noqa: S102
    scores = criteria.score(gqa.analysis, "norm", WINDOWS, families=["ffn"])["ffn"]
    assert_scores(scores, layers(lambda n: HIDDEN * norm(gqa.inputs[f"{n}.mlp.down_proj"])[None]))
