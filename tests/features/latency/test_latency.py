"""Latency as a budget, with operators of made-up times: nothing here depends on how fast the machine is.

It reaches for mptk.cost: operators of made-up times stand for the machine.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from commands import done
from lab import legalise_bare
from made_up_times import milliseconds, times
from toy_checkpoints import llama_config
from transformers import LlamaForCausalLM

import mptk
from mptk import FamilyPlan, Plan, analyze, testing, trace
from mptk.cost.budgets import OBJECTIVES
from mptk.cost.model import CostModel
from mptk.cost.operator_times import (
    ATTENTION,
    BLOCK_MATMUL,
    COLD_BYTES,
    ELEMENTWISE,
    MATMUL,
    MOST_COPIES,
    Operator,
    count_copies,
    find_operator_times,
    interpolate,
    time_operators,
)
from mptk.errors import AnalysisError, BudgetError, InputError
from mptk.features.latency.predict import Latency, find_parts
from mptk.io import Loaded
from mptk.protocols import Analysed, Prepared
from mptk.tasks import CAUSAL_LM
from mptk.testing import expect_error
from passes.targets import legalize

HIDDEN, FFN, LAYERS, GROUPS, SHARED, DIM, VOCAB = 48, 80, 3, 3, 2, 10, 97
LADDERS = {"kv_groups": (1, 2, 3), "q_heads": (1, 2), "ffn": tuple(range(8, 81, 8))}
SETTINGS = mptk.Settings(
    method="random", sparsity=0.25, budget="latency", samples=2, length=32, align=8, tolerance=0.02, onnx=False
)


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return LlamaForCausalLM(llama_config())


@pytest.fixture(scope="module")
def analysis(model):
    return analyze(trace(model))


@pytest.fixture
def machine(set_cache, made_up_times, tmp_path):
    """A machine whose operators take made-up times, and its empty cache folder."""
    set_cache(tmp_path / "cache")
    return tmp_path / "cache"


# ---- the equation ----


@pytest.mark.parametrize(("objective", "tokens", "past"), [("decode", 1, 512), ("prefill", 512, 0)])
@pytest.mark.parametrize("widths", [{}, {"ffn": 44}, {"kv_groups": 2, "q_heads": 1, "ffn": 24}, {"ffn": 30.5}])
def test_latency_is_the_sum_over_the_operators_of_a_model_of_these_widths(analysis, objective, tokens, past, widths):
    full = {"kv_groups": GROUPS, "q_heads": SHARED, "ffn": FFN, **widths}
    groups, heads, ffn = full["kv_groups"], full["kv_groups"] * full["q_heads"], full["ffn"]
    products = [
        (HIDDEN, heads * DIM),
        (heads * DIM, HIDDEN),
        *[(HIDDEN, groups * DIM), (HIDDEN, ffn)] * 2,
        (ffn, HIDDEN),
    ]
    layer = sum(milliseconds(Operator(MATMUL, (tokens, k, n))) for k, n in products)
    layer += milliseconds(Operator(ATTENTION, (tokens, past, heads, groups, DIM, DIM)))
    head = milliseconds(Operator(MATMUL, (tokens, HIDDEN, VOCAB)))
    latency = Latency(analysis, LADDERS, objective, times)
    assert latency(widths) == pytest.approx(LAYERS * layer + head)


def test_what_is_no_product_counts_by_its_elements(analysis):
    def elementwise(operators):
        return {o: 0.5 + 2 * o.sizes[0] if o.kind == ELEMENTWISE else 0.0 for o in operators}

    latency = Latency(analysis, LADDERS, "decode", elementwise)
    silu_and_product = 2
    assert latency({}) - latency({"ffn": 40}) == pytest.approx(LAYERS * silu_and_product * 2 * 40)
    count = sum(p.count for p in find_parts(analysis, *OBJECTIVES["decode"]) if p.kind == ELEMENTWISE)
    assert latency({"ffn": 8}) > 0.5 * count


def test_between_measured_widths_it_is_linear_and_outside_as_at_the_ends():
    knots, values = [2, 4, 8], np.array([10.0, 20.0, 60.0])
    found = [float(interpolate(knots, values, x)) for x in (2, 3, 4, 5, 8, 1, 9)]
    assert found == [10, 15, 20, 30, 60, 5, 70]


def test_a_long_ladder_is_timed_at_few_widths_with_both_ends(analysis):
    asked = []

    def remember(operators):
        asked.extend(operators)
        return times(operators)

    Latency(analysis, {"ffn": tuple(range(1, 81))}, "decode", remember)
    widths = {o.sizes[2] for o in asked if o.kind == MATMUL and o.sizes[1] == HIDDEN}
    ffn = widths - {GROUPS * SHARED * DIM, GROUPS * DIM, VOCAB}
    assert {1, 80} <= ffn
    assert len(ffn) == 6
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_products_of_a_quantised_graph_are_those_of_its_file(scheme, tmp_path):
    mptk.export(LlamaForCausalLM(llama_config()), tmp_path, quantize=[scheme])
    (file,) = [file for file in tmp_path.glob("*.onnx") if file.name != "model.onnx"]
    names = ("K", "N", "bits", "block_size")
    graph = onnx.load(file, load_external_data=False).graph
    nodes = [{a.name: a.i for a in node.attribute} for node in graph.node if node.op_type == BLOCK_MATMUL]
    program = analyze(trace(LlamaForCausalLM(llama_config())))
    parts = [p for p in find_parts(program, *OBJECTIVES["decode"], scheme) if p.kind == BLOCK_MATMUL]
    found = [p.make_operator({}).sizes[1:] for p in parts for _ in range(p.count)]
    assert sorted(found) == sorted(tuple(node[name] for name in names) for node in nodes)


# ---- what is measured is kept ----


def test_operators_are_timed_once_for_a_machine_a_thread_count_and_a_runtime(machine, inside):
    asked = []

    def sweep(found, threads, progress):
        asked.append(list(found))
        return {o: threads + float(o.sizes[0]) for o in found}

    def ask(found, threads):
        return find_operator_times(found, threads, lambda *_: None, sweep)

    small, large = Operator(ELEMENTWISE, (1,)), Operator(ELEMENTWISE, (99,))
    assert ask([small], 1) == {small: 2}
    for _ in range(2):
        assert ask([small, large], 1) == {small: 2, large: 100}
    assert asked == [[small], [large]]
    assert ask([small], 2) == {small: 3}
    inside.bound("onnxruntime.__version__", "0.0")
    assert ask([small], 1) == {small: 2}
    assert asked[2:] == [[small], [small]]


def test_times_that_are_damaged_or_cannot_be_kept_are_measured_and_said(machine, set_cache):
    one, said = Operator(MATMUL, (1, 2, 3)), []

    def ask():
        return find_operator_times([one], 1, lambda stage, *_: said.append(stage), lambda *_: {one: 7.0})

    ask()
    (kept,) = (machine / "latency").iterdir()
    for content in ("", "[", '{"ms": {"MatMul 1x2x3": "fast"}}', None):
        kept.unlink()
        os.mkfifo(kept) if content is None else kept.write_text(content)
        assert ask() == {one: 7.0}
    set_cache("/proc/x")
    assert ask() == {one: 7.0}
    assert sum("is damaged" in stage for stage in said) == 3
    assert said[-1].endswith("set MPTK_CACHE to a folder with room for it)")


def test_every_kind_of_operator_runs(inside):
    inside.bound("mptk.cost.operator_times.COLD_BYTES", 4096)
    inside.bound("mptk.cost.operator_times.SECONDS", 0.0)
    found = [Operator(MATMUL, (rows, 12, 7)) for rows in (1, 5)]
    found += [Operator(BLOCK_MATMUL, (rows, 72, 7, bits, 32)) for rows in (1, 5) for bits in (4, 8)]
    found += [Operator(ATTENTION, (1, 9, 6, 2, 4, 3)), Operator(ATTENTION, (5, 0, 6, 2, 4, 3))]
    found += [Operator(ELEMENTWISE, (11,))]
    said = []
    result = time_operators(found, 1, lambda stage, *_: said.append(stage))
    assert said[0].startswith(f"time {len(found)} operators ("), "how many, and for how long, before the first"
    assert list(result) == found
    assert all(0 < ms < float("inf") for ms in result.values())


def test_copies_fill_a_cache_but_a_tiny_operator_gets_no_more_than_a_decoder_has():
    assert count_copies(COLD_BYTES // 8, rows=1) == 8
    assert count_copies(1, rows=1) == MOST_COPIES
    assert count_copies(1, rows=512) == 2, "many rows read each weight once"


def test_an_operator_is_timed_until_its_times_agree(inside):
    """Twice, if they do; five times at most. It counts with the median."""
    steady, disturbed, uneven = (Operator(ELEMENTWISE, (size,)) for size in (1, 2, 3))
    left = {steady: [1.0, 1.04], disturbed: [3.0, 1.0, 1.02, 1.01, 0.99], uneven: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    inside.around("mptk.cost.operator_times.time_once", lambda real, operator, threads: left[operator].pop(0))
    steps = []
    found = time_operators(list(left), 1, lambda stage, done, total: steps.append((done, total)))
    assert found == {steady: 1.02, disturbed: 1.01, uneven: 3.0}
    assert [len(times) for times in left.values()] == [0, 0, 1]
    assert steps[-1] == (12, 12)
    assert all(done <= total for done, total in steps)


# ---- ladders and budgets ----


def test_a_width_that_a_wider_one_beats_is_not_proposed(analysis):
    def uneven(operators):
        return {o: milliseconds(o) + (40 in o.sizes and o.kind == MATMUL) for o in operators}

    ladders = {"ffn": (8, 24, 40, 56, 64, 80)}
    cost = CostModel(analysis, "latency", Latency(analysis, ladders, "decode", uneven))
    target = legalize.drop_useless_widths(cost, legalize.LegalWidths(ladders, {}, lambda widths: None), ["ffn"])
    assert target.ladders["ffn"] == (8, 24, 56, 64, 80)
    assert cost.share({"ffn": 40}) == cost.share({"ffn": 48}) == cost.share({"ffn": 56}), "as wide as costs the same"


def test_shares_fall_between_those_of_the_neighbouring_widths_and_experts_have_none_by_shape(analysis):
    cost = CostModel(analysis, "latency", Latency(analysis, LADDERS, "decode", times))
    assert cost.share({}) == 1
    assert cost.share({"ffn": 40.5}) == pytest.approx((cost.share({"ffn": 40}) + cost.share({"ffn": 41})) / 2)
    assert cost.share({"ffn": 40}) < cost.share({"ffn": 40.5}) < cost.share({"ffn": 41})
    with expect_error(AnalysisError):
        Latency(analyze(trace(testing.make_decoder("mixtral", meta=True))), {}, "decode", times)


@pytest.mark.parametrize("method", ["random", "maskprune"])
def test_prune_removes_the_asked_share_of_the_predicted_latency(laboratory, machine, tmp_path, method):
    learning = replace(SETTINGS.learning, steps=4 if method == "maskprune" else 0, rank=2)
    settings = replace(SETTINGS, method=method, learning=learning)
    report = mptk.prune(str(laboratory.open_model()), tmp_path / "out", settings).report
    dense, pruned = (report.cost[side]["latency_ms"] for side in ("dense", "pruned"))
    assert 1 - pruned / dense == pytest.approx(0.25, abs=0.02)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["cost"]["pruned"]["latency_ms"] == pruned


@pytest.mark.parametrize("objective", ["prefill", "decode"])
def test_milliseconds_are_reached_and_not_exceeded(model, analysis, machine, objective):
    settings = replace(SETTINGS, objective=objective)
    dense = prepared(model, analysis, settings).cost.dense.latency_ms
    made = prepared(model, analysis, replace(settings, max_ms=0.7 * dense))
    found = [made.cost(c.widths).latency_ms for c in made.candidates]
    assert found
    assert all(ms is not None and 0.65 * dense <= ms <= 0.7 * dense for ms in found)


def test_a_plan_is_priced_whatever_it_cuts(model, analysis, machine):
    plan = Plan({"hidden": FamilyPlan(24, HIDDEN, {"": (tuple(range(24)),)})})
    made = prepared(model, analysis, replace(SETTINGS, plan="plan.json", max_ms=1e6), plan)
    assert made.cost.share({"hidden": 24}) < 0.8
    assert made.settings.sparsity == SETTINGS.sparsity


def prepared(model, analysis, settings, plan=None) -> Prepared:
    start = Analysed(Loaded(model, None, "model", Path()), CAUSAL_LM, analysis)
    return legalise_bare(start, settings, plan)


# ---- errors ----


def test_milliseconds_out_of_reach_name_the_nearest_and_those_of_the_dense_model_are_no_budget(
    model, analysis, machine
):
    least = prepared(model, analysis, SETTINGS).cost({"kv_groups": 1, "q_heads": 1, "ffn": 8}).latency_ms
    with expect_error(BudgetError, name="max_ms") as refused:
        prepared(model, analysis, replace(SETTINGS, max_ms=0.001))
    assert refused.value.nearest[0] == pytest.approx(least)
    with expect_error(BudgetError, name="max_ms"):
        prepared(model, analysis, replace(SETTINGS, max_ms=1e6))


def test_settings_that_contradict_each_other_are_refused():
    with expect_error(InputError, name="objective", nearest=["prefill", "decode"]):
        mptk.Settings(objective="training")
    with expect_error(InputError, name="max_ms"):
        mptk.Settings(max_ms=3.0)


def test_command_line_says_what_is_budgeted(asked_prune):
    for options, wanted in {
        "--budget latency --objective prefill": ("latency", "prefill", None, 1),
        "--max-prefill-ms 900 --threads 2": ("latency", "prefill", 900, 2),
        "--max-decode-ms 20": ("latency", "decode", 20, 1),
        "--budget flops": ("flops", "decode", None, 1),
    }.items():
        done("prune", "smollm2-135m", "--out", "out", *options.split())
        *_, s = asked_prune[-1]
        assert (s.budget, s.objective, s.max_ms, s.threads) == wanted
