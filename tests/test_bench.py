"""bench and onnx_work: counts against the model's own sizes, turns, and what comes out."""

from __future__ import annotations

import json

import pytest
from tiny_decoders import FUSED, GROUPED, tiny_decoder

from mptk.bench import Bench, alternate, bench_decoders
from mptk.onnx_work import graph_work
from passes.emit_onnx import emit_onnx
from passes.trace_decoder import trace_decoder

HIDDEN, FFN, VOCAB, HEADS, GROUPS, DIM = 48, 80, 97, 6, 2, 10
PROJECTIONS = HIDDEN * DIM * (2 * HEADS + 2 * GROUPS) + 3 * HIDDEN * FFN
"""Multiply-adds of a token in a layer."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return emit_onnx(trace_decoder(tiny_decoder(GROUPED)), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    model = tiny_decoder(GROUPED, num_hidden_layers=1, intermediate_size=40)
    return emit_onnx(trace_decoder(model, logits="last"), tmp_path_factory.mktemp("narrow"))


@pytest.mark.parametrize(("sequence", "past", "batch"), [(13, 0, 1), (1, 29, 1), (5, 7, 3)])
def test_work_is_what_the_sizes_say(dense, sequence, past, batch):
    work = graph_work(dense, sequence=sequence, past=past, batch=batch)
    attention = HEADS * 2 * DIM * (past + sequence)
    assert work.flops == 2 * batch * sequence * (2 * (PROJECTIONS + attention) + HIDDEN * VOCAB)
    norms, frequencies = 5 * HIDDEN, DIM // 2
    cache = batch * 2 * 2 * GROUPS * past * DIM
    weights = 2 * PROJECTIONS + HIDDEN * VOCAB + norms + frequencies
    assert 0 <= work.bytes - 4 * (weights + cache) < 400, "what is above: scalars and shape constants"


def test_last_logits_cost_one_position(narrow):
    per_token = PROJECTIONS - 3 * HIDDEN * 40
    for sequence in (1, 11):
        expected = 2 * (sequence * (per_token + HEADS * 2 * DIM * sequence) + HIDDEN * VOCAB)
        assert graph_work(narrow, sequence=sequence, past=0).flops == expected


def test_a_table_that_is_also_the_projection_counts_once(tmp_path):
    model = tiny_decoder(FUSED, n_layer=1)
    file = emit_onnx(trace_decoder(model), tmp_path)
    read = sum(p.numel() for name, p in model.named_parameters() if name != "transformer.wpe.weight")
    assert 0 <= graph_work(file, sequence=1, past=0).bytes - 4 * read < 400


def test_rows_hold_both_sides_and_the_ideal(dense, narrow):
    calls = []
    result = bench_decoders(dense.parent, narrow, prompts=(16, 33), rounds=3, progress=lambda *call: calls.append(call))
    assert [row.phase for row in result.rows] == ["prefill 16", "prefill 33", "decode 16", "decode 33"]
    assert [call[1:] for call in calls] == [(done, 12) for done in range(13)]
    for row in result.rows:
        assert row.dense_ms > 0
        assert row.pruned_ms > 0
        assert row.ideal == round(row.pruned_work / row.dense_work, 4) < 1
    assert result.rows[1].dense_work == graph_work(dense, sequence=33, past=0).flops
    assert result.rows[2].pruned_work == graph_work(narrow, sequence=1, past=16).bytes
    assert Bench.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_sides_take_turns_and_the_order_changes(monkeypatch):
    monkeypatch.setattr("mptk.bench.ROUND_S", 0.0)
    seen = []
    times = alternate([lambda: seen.append("a"), lambda: seen.append("b")], rounds=4)
    assert "".join(seen) == "ab" + "abbaabba"
    assert [len(side) for side in times] == [4, 4]
