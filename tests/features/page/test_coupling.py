"""The drawing of one layer: which modules a family ties, which way its units go, and where they stand."""

from __future__ import annotations

import pytest
from page_runs import HOSTILE, Parsed
from tiny_decoders import tiny_decoder
from transformers import MixtralConfig, PreTrainedConfig

import mptk
from mptk.features.page import coupling
from mptk.features.page.render import render_analysis_page
from mptk.ir import Alignment
from mptk.report.analysis import build_analysis_json
from mptk.targets import find_target

ROTARY = "grouped heads, rotary"
SIZES = {"hidden_size": 36, "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 97}
EXPERTS = MixtralConfig(**SIZES, num_attention_heads=6, num_key_value_heads=3, num_local_experts=4)


def layer_of(kind: str | PreTrainedConfig) -> coupling.Layer:
    model = tiny_decoder(kind)
    analysis = mptk.analyze(model)
    return coupling.choose_layer(analysis, find_target("graph").find_legal(analysis, model, Alignment(1)))


def test_units_go_from_what_makes_them_to_what_sums_over_them_and_rows_follow():
    graph = coupling.build_flow(layer_of(ROTARY))
    how = {(one, other): data["how"] for one, other, data in graph.edges(data=True)}
    assert how[("module", "mlp.up_proj"), ("family", "ffn")] == coupling.MAKES
    assert how[("family", "ffn"), ("module", "mlp.down_proj")] == coupling.SUMS
    assert how[(coupling.BEFORE, "hidden"), ("module", "mlp.up_proj")] == coupling.SUMS
    assert how[(coupling.BEFORE, "hidden"), ("module", "input_layernorm")] == coupling.HOLDS
    assert how[("module", "mlp.down_proj"), (coupling.AFTER, "hidden")] == coupling.MAKES

    rows = [{name for _, name in row} for row in coupling.order_rows(graph)]
    assert rows[0] == {"hidden"}
    assert {"mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj"} <= rows[1]
    assert "ffn" in rows[2]
    assert {"mlp.down_proj", "self_attn.o_proj"} <= rows[3]
    assert rows[4] == {"hidden"}


def test_experts_are_one_module_and_labels_tell_modules_apart():
    modules = {edge.module for edge in layer_of(EXPERTS).edges}
    assert any("experts" in name for name in modules)
    assert not any(part.isdecimal() for name in modules for part in name.split("."))
    labels = {"attention.output.dense": "attention.output.dense", "output.dense": "output.dense"}
    labels |= {"attention.self.query": "query"}
    assert coupling.shorten_labels([*labels]) == labels
    assert coupling.break_name("post_attention_layernorm") == "post_\nattention_\nlayernorm"


@pytest.mark.parametrize("kind", [ROTARY, "learned positions, fused qkv", "learned positions, biases"])
def test_a_layer_of_any_kind_is_drawn(kind):
    layer = layer_of(kind)
    drawn = coupling.draw_coupling_chart(layer).text
    assert drawn.startswith("<svg")
    for family in layer.units:
        assert family.split("_")[0] in drawn


def test_no_name_becomes_markup():
    model = tiny_decoder(ROTARY)
    analysis = mptk.analyze(model)
    legal = find_target("stock").find_legal(analysis, model, Alignment(1))
    said = build_analysis_json(analysis, legal, HOSTILE)
    said["blocked"].append({"name": HOSTILE, "size": 3, "weights": [HOSTILE], "reasons": [HOSTILE]})
    page = render_analysis_page(said, analysis, legal)
    assert "script" not in Parsed(page).tags
    assert "img" not in Parsed(page).tags
    assert HOSTILE in Parsed(page).text
