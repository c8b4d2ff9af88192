"""Legal widths and the choice among them, on tiny models whose sizes are pairwise different."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from lab import legalise_bare
from small_modules import Small
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from benchmarks.tiny_models import tiny_model
from mptk import Settings, analyze, testing, trace
from mptk.cost.model import CostModel
from mptk.errors import BudgetError, InputError
from mptk.io import Loaded
from mptk.ir import Alignment, read_alignment
from mptk.protocols import Analysed
from mptk.targets import find_target
from mptk.tasks import CAUSAL_LM
from mptk.testing import expect_error
from passes.targets import legalize
from passes.targets.derived import find_derived_families


def llama(**changes: int) -> LlamaForCausalLM:
    sizes = {"intermediate_size": 160, "num_hidden_layers": 3, "num_key_value_heads": 3, **changes}
    return testing.make_decoder("llama", meta=True, **sizes)


@pytest.fixture(scope="module")
def small():
    model = llama()
    analysis = analyze(trace(model))
    legal = legalize.find_stock_widths(analysis, legalize.discover(analysis, model), Alignment(32))
    return analysis, CostModel(analysis), legal


def test_cost_counts_what_the_module_holds_and_of_a_cut_what_a_model_built_so_would(small):
    _, cost, _ = small
    model = llama()
    assert cost.dense.parameters == sum(p.numel() for p in model.parameters())
    block = [p for n, p in model.named_parameters() if "self_attn" in n or "mlp" in n]
    assert cost.dense.block == sum(p.numel() for p in block)
    assert cost.dense.bytes == 4 * cost.dense.parameters
    linear = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    assert cost.dense.flops == 2 * linear
    cut = llama(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    assert cost({"kv_groups": 2, "ffn": 64}).parameters == sum(p.numel() for p in cut.parameters())


def test_ladders_respect_the_config_class_and_the_multiple(small):
    _, _, target = small
    assert target.ladders["kv_groups"] == (1, 2, 3)  # 2, 4 and 6 heads divide 48
    assert target.ladders["q_heads"] == (1, 2)
    assert target.ladders["ffn"] == (32, 64, 96, 128, 160)
    assert "rotary" in target.refused["rotary_pairs"]
    assert target.ladders["rotary_pairs"] == (5,)


def test_heads_that_the_class_hard_wires_are_cut_with_the_hidden_size_or_not_at_all():
    config = GPT2Config(n_embd=48, n_inner=80, n_layer=2, n_head=6, vocab_size=97, n_positions=64)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    analysis = analyze(trace(model))
    target = legalize.find_stock_widths(analysis, legalize.discover(analysis, model), Alignment(8))
    assert target.together == (frozenset({"heads", "hidden"}),)
    assert target.ladders["hidden"] == (8, 16, 24, 32, 40, 48)
    assert legalize.choose_default_families(analysis.make_variables(), target) == ["ffn"]
    both = legalize.find_candidates(CostModel(analysis), target, ["heads", "hidden"], 0.3)
    assert both
    assert all(c.widths["hidden"] == 8 * c.widths["heads"] for c in both)
    assert legalize.find_candidates(CostModel(analysis), target, ["heads"], 0.3) == []
    assert legalize.find_graph_widths(analysis, Alignment(8)).ladders["heads"] == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("sparsity", [0.2, 0.35, 0.5, 0.7])
def test_every_candidate_is_legal_and_its_sparsity_true(small, sparsity):
    analysis, cost, target = small
    names = legalize.choose_default_families(analysis.make_variables(), target)
    assert set(names) == {"kv_groups", "q_heads", "ffn"}
    found = legalize.find_candidates(cost, target, names, sparsity)
    distances = [abs(c.sparsity - sparsity) for c in found]
    assert distances == sorted(distances)
    for c in found:
        assert all(width in target.ladders[name] for name, width in c.widths.items())
        assert c.sparsity == pytest.approx(1 - cost(c.widths).block / cost.dense.block)
    every = itertools.product((1, 2, 3), (1, 2), (32, 64, 96, 128, 160))
    cuts = [dict(zip(("kv_groups", "q_heads", "ffn"), widths, strict=True)) for widths in every]
    assert distances[0] == pytest.approx(min(abs(cost.compute_sparsity(cut) - sparsity) for cut in cuts))


@pytest.mark.parametrize("sparsity", [0.35, 0.5])
def test_no_combination_is_left_out_because_a_list_is_short(small, sparsity):
    """Each of the other families' combinations stands once, with the ffn nearest to the budget."""
    _, cost, target = small
    found = legalize.find_candidates(cost, target, ["kv_groups", "q_heads", "ffn"], sparsity)
    chosen = legalize.choose_candidates(found, sparsity, 0.1, ["ffn"], 100)
    near = {(c.widths["kv_groups"], c.widths["q_heads"]) for c in found if abs(c.sparsity - sparsity) <= 0.1}
    assert sorted((c.widths["kv_groups"], c.widths["q_heads"]) for c in chosen) == sorted(near)
    for c in chosen:
        others = (cost.compute_sparsity({**c.widths, "ffn": ffn}) for ffn in target.ladders["ffn"])
        assert abs(c.sparsity - sparsity) == pytest.approx(min(abs(other - sparsity) for other in others))


def test_few_candidates_are_far_from_each_other():
    """The most even one and the ends: not the neighbours of the most even one."""
    line = [legalize.Candidate({"heads": heads, "ffn": 100 - 9 * heads}, 0.5, abs(heads - 5)) for heads in range(1, 11)]
    assert [c.widths["heads"] for c in legalize.pick_candidates(line, 3)] == [5, 10, 1]
    assert legalize.pick_candidates(line, 10) == line
    chosen = legalize.choose_candidates(line, 0.5, 0.1, ["ffn"], 3)
    assert [c.widths["heads"] for c in chosen] == [5, 1, 10]
    assert len(legalize.choose_candidates(line, 0.5, 0.1, ["ffn"])) == 10


def test_the_nearest_cut_is_taken_if_it_is_within_two_percent_and_named_if_it_is_not(small):
    _, cost, target = small
    line = [legalize.Candidate({"ffn": 100 - n}, n / 100, 0.0) for n in (28, 34, 50)]
    assert [c.widths["ffn"] for c in legalize.choose_candidates(line, 0.295, 0.01, ["ffn"])] == [72]
    found = legalize.find_candidates(cost, target, ["ffn"], 0.97)
    for given, sparsity, nearest in ((line, 0.307, 0.28), (found, 0.97, cost.compute_sparsity({"ffn": 32}))):
        with expect_error(BudgetError, name="sparsity") as refused:
            legalize.choose_candidates(given, sparsity, 0.01, ["ffn"], 4)
        assert refused.value.nearest[0] == nearest


@pytest.mark.parametrize(
    ("asked", "quantize", "step"), [(8, (), 8), (8, ("int8",), 32), (64, ("int4", "fp16"), 32), (48, ("int8",), 32)]
)
def test_widths_for_a_quantised_graph_are_multiples_of_its_blocks(small, asked, quantize, step):
    """Whatever is asked for: of the ffn, whose 160 channels are five blocks of 32."""
    analysis, _, _ = small
    settings = Settings(align=asked, quantize=quantize, method="maskprune", families=("ffn",), tolerance=0.2)
    model = Analysed(Loaded(llama(), None, "model", Path()), CAUSAL_LM, analysis)
    widths = [c.widths["ffn"] for c in legalise_bare(model, settings).candidates]
    assert all(width % step == 0 for width in widths)
    assert any(width % 32 for width in widths) == (step < 32)


@pytest.mark.parametrize(
    ("text", "ffn", "hidden"),
    [(32, 32, 32), ("h100", 128, 128), ("ffn=80", 80, 32), ("a100,hidden=16,ffn=mps", 64, 16), ("8, ffn=2", 2, 8)],
)
def test_a_divisor_is_a_number_a_device_or_one_for_each_family(text, ffn, hidden):
    found = read_alignment(text)
    assert (found.find_divisors("ffn")[0], found.find_divisors("hidden")[0]) == (ffn, hidden)


@pytest.mark.parametrize("text", ["h10", "0", "ffn=", "ffn=0", "=32", "32;64", "", -8, 1 << 21])
def test_another_divisor_is_refused(text):
    with expect_error(InputError, name="align"):
        Settings(align=text)


def test_a_family_has_a_divisor_of_its_own(small):
    def find_ladders(align: str) -> dict[str, tuple[int, ...]]:
        return legalize.find_graph_widths(small[0], read_alignment(align)).ladders

    own = find_ladders("ffn=80,hidden=16")
    assert (own["ffn"], own["hidden"]) == ((80, 160), (16, 32, 48))
    assert find_ladders("ffn=96")["ffn"] == tuple(range(1, 161))  # 160 is no multiple either
    assert find_ladders("h100")["ffn"] == (32, 64, 96, 128, 160)  # 5 · 32


def test_heads_stay_divisible_by_the_devices_that_share_them():
    analysis = analyze(trace(llama(num_attention_heads=24, num_key_value_heads=8)))

    def widths(devices: int, every: int = 1) -> dict[str, tuple[int, ...]]:
        return dict(legalize.find_graph_widths(analysis, Alignment(every, devices=devices)).ladders)

    assert widths(4)["kv_groups"] == (4, 8)
    assert widths(4)["q_heads"] == (1, 2, 3)  # of each of 8 groups
    assert widths(4)["ffn"] == tuple(range(4, 161, 4))
    assert widths(4)["hidden"] == widths(1)["hidden"]  # every device has it whole
    assert widths(8)["kv_groups"] == widths(16)["kv_groups"] == (8,)
    assert widths(5, 16)["ffn"] == (80, 160)  # 16 on each of five
    assert widths(2, 16)["ffn"] == (32, 64, 96, 128, 160)


def test_layers_of_one_width_are_named_together():
    widths = {"q_heads": 2, "ffn.0": 64, "ffn.1": 32, "ffn.2": 32, "ffn.4": 32, "ffn.3": 16}
    assert legalize.describe_widths(widths) == "q_heads=2, ffn.0=64, ffn.1-2,4=32, ffn.3=16"


def written() -> torch.Tensor:
    made = torch.zeros(12)
    made[3:].copy_(torch.arange(9.0))
    return made


@pytest.mark.parametrize(
    ("constant", "refused"),
    [
        (lambda: torch.zeros(12), False),
        (lambda: torch.full((1, 12), 2.0).expand(2, 12).transpose(0, 1).transpose(0, 1), False),
        (lambda: torch.arange(12.0), True),
        (written, True),
    ],
    ids=["zeros", "views of one number", "a table", "zeros that are written to"],
)
def test_a_constant_of_one_number_is_no_table_that_the_class_would_compute_anew(constant, refused):
    """A recurrence begins with zeros; of those a class makes as many as it has channels."""
    net = Small(lambda h, down: (h.relu() + constant()) @ down, 12, down=(12, 6))
    analysis = analyze(trace(net.eval(), [torch.randn(2, 7)]))
    (family,) = analysis.families
    assert (family.name in find_derived_families(analysis)) == refused


def test_norms_whose_epsilon_the_class_fixes_are_not_cut():
    """Zamba2 has a number for its recurrences' norms, which its config does not say."""
    model = tiny_model("causal-lm", "zamba2").model
    legal = find_target("stock").find_legal(analyze(trace(model)), model, Alignment(1))
    assert any("fixes its norm's epsilon" in why for why in legal.refused.values())


def test_the_channels_of_a_recurrence_are_offered_for_the_stock_class():
    model = tiny_model("causal-lm", "mamba").model
    analysis = analyze(trace(model, dynamic=True))
    inner = next(f for f in analysis.families if f.size == model.config.intermediate_size)
    legal = find_target("stock").find_legal(analysis, model, Alignment(1))
    config = legal.stock.build_config({inner.name: 100}).config
    assert config.intermediate_size == 100
