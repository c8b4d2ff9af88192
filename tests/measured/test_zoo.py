"""A part of the zoo sweep that shows every kind of structure: each type proven by cutting every family."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks import zoo, zoo_depth, zoo_heads
from benchmarks.tiny_models import tiny_model
from benchmarks.zoo_plans import random_plan
from mptk import Plan, analyze, rewrite, trace
from mptk.ir import Analysis, Program

TYPES = [
    ("causal-lm", "falcon"),  # multi-query, index by a list
    ("causal-lm", "mamba2"),  # state space: convolution, cumulative sums
    ("causal-lm", "deepseek_v3"),  # latent attention, grouped experts
    ("masked-lm", "deberta-v2"),  # disentangled attention by gather
    ("seq2seq", "t5"),  # a shared relative bias ties all layers' heads
    ("image-classification", "resnet"),
]


@pytest.mark.parametrize(("mapping", "model_type"), TYPES, ids=[name for _, name in TYPES])
def test_type_is_proven(mapping, model_type):
    tiny = tiny_model(mapping, model_type)
    zoo.calibrate(tiny)
    results = dict(zoo.prove(analyze(trace(tiny.wrapper, tiny.inputs)), tiny.inputs))
    assert [why for why in results.values() if why] == []
    assert len(results) > 3  # "all" beside the families


def test_a_wrong_cut_is_caught(inside):
    """Were the cut program another one (here: units drawn anew), no family but those of few choices would pass."""

    def other_units(real: object, analysis: Analysis, plan: Plan, *, check: bool) -> Program:
        families = [analysis.family(n) for n in plan.families]
        return rewrite(analysis, random_plan(families, random.Random(99)), check=check)

    inside.around("benchmarks.zoo.rewrite", other_units)
    tiny = tiny_model("causal-lm", "llama")
    results = dict(zoo.prove(analyze(trace(tiny.wrapper, tiny.inputs)), tiny.inputs))
    assert results["ffn"].startswith("wrong by")
    assert results["all"].startswith("wrong by")


def test_plans_draw_units_anew_for_each_layer_and_row():
    tiny = tiny_model("causal-lm", "llama")
    analysis = analyze(trace(tiny.wrapper, tiny.inputs))
    plan = random_plan(analysis.families, random.Random(0))
    ffn = plan.families["ffn"]
    assert len({units for rows in ffn.keep.values() for units in rows}) == len(ffn.keep) > 1
    scoped = next(f for f in analysis.families if f.scopes > 1)
    assert all(len(rows) == scoped.scopes for rows in plan.families[scoped.name].keep.values())


def test_a_type_that_cannot_be_built_gives_its_reason():
    row = zoo.run_type("causal-lm", "jetmoe")
    assert row["stage"] != "proven"
    assert "depends on data" in row["reason"]


def test_stock_column_names_the_validator_and_reloads():
    """LlamaConfig wants hidden_size to be a multiple of the heads, MixtralConfig does not ask."""
    row = zoo.run_type("causal-lm", "llama")
    assert row["stage"] == "proven", row["reason"]
    assert row["families"] == row["proven"] > 2
    llama = row["stock"]
    assert 0 < llama["hidden"]["accepted"] < llama["hidden"]["of"]
    assert llama["hidden"]["refusal"].startswith("LlamaConfig.validate_architecture")
    assert llama["ffn"] | {"reloaded": ""} == llama["ffn"]
    assert llama["ffn"]["accepted"] == llama["ffn"]["of"] > 1
    assert llama["rotary_pairs"]["accepted"] == 0
    assert llama["rotary_pairs"]["by"] == "numeric"
    assert "rotary tables" in llama["rotary_pairs"]["refusal"]
    gpt2 = zoo.run_type("causal-lm", "gpt2")["stock"]
    assert gpt2["heads"]["with"] == ["hidden"]
    assert gpt2["heads"]["reloaded"] == ""


def test_the_depth_sweep_says_what_a_class_holds_and_why_a_type_has_no_blocks():
    gpt2 = zoo_depth.run_type("causal-lm", "gpt2")
    assert (gpt2["stage"], gpt2["reason"]) == ("held", "")
    assert gpt2["depths"]["layers"]["proof"] == ""
    assert gpt2["depth"]["layers"]["accepted"] == gpt2["depth"]["layers"]["of"] > 0
    albert = zoo_depth.run_type("masked-lm", "albert")
    assert (albert["stage"], albert["reason"]) == ("analysed", "model.albert.encoder.albert_layer_groups has one block")
    resnet = zoo_depth.run_type("image-classification", "resnet")
    assert resnet["reason"].endswith("encoder.stages is not an input plus what it adds, of the same axes")


def test_the_depth_sweep_catches_a_wrong_cut(inside):
    def other_blocks(real: object, analysis: Analysis, plan: Plan, **options: bool) -> Program:
        kept = {name: analysis.family(name).size - 1 for name in plan.families}
        last = {name: {m: (tuple(range(kept[name])),) for m in f.keep} for name, f in plan.families.items()}
        return rewrite(analysis, Plan({n: replace(f, width=kept[n], keep=last[n]) for n, f in plan.families.items()}))

    inside.around("benchmarks.zoo.rewrite", other_blocks)
    row = zoo_depth.run_type("causal-lm", "gpt2")
    assert row["stage"] == "found"
    assert "wrong by" in row["reason"]


def test_kv_heads_of_a_type_are_merged():
    row = zoo_heads.run_type("causal-lm", "qwen3")
    assert (row["stage"], row["keys"], row["values"]) == ("merged", "mean", "fit"), row
