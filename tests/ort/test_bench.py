"""bench and onnx_work: counts against the model's own sizes, turns, and what comes out."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_decoders import FUSED, GROUPED, graphs_of, tiny_decoder

from mptk import export
from mptk.errors import FileError, InputError
from mptk.files.outputs import check_file
from mptk.ort.bench import Bench, bench_graphs, list_unaligned_weights, time_alternately
from mptk.ort.roofline import compute_graph_work, measure_peak_memory, run_work
from mptk.ort.steps import Case
from mptk.reading import make_typed
from mptk.report.page.charts import write_bench_plot
from mptk.report.sections import build_bench_view
from mptk.report.view import render_markdown
from mptk.testing import MODEL_KINDS, expect_error
from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import emit_onnx, quantize_onnx

HIDDEN, FFN, VOCAB, HEADS, GROUPS, DIM = 48, 80, 97, 6, 2, 10
PROJECTIONS = HIDDEN * DIM * (2 * HEADS + 2 * GROUPS) + 3 * HIDDEN * FFN
"""Multiply-adds of a token in a layer."""
pytestmark = pytest.mark.usefixtures("quick_bench")


@pytest.fixture(scope="module")
def dense(decoder_graphs):
    return graphs_of(decoder_graphs(GROUPED))["float"]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    model = tiny_decoder(GROUPED, num_hidden_layers=1, intermediate_size=40)
    return emit_onnx(trace_decoder(model, logits="last"), tmp_path_factory.mktemp("narrow"))


@pytest.mark.parametrize(("sequence", "past", "batch"), [(13, 0, 1), (1, 29, 1), (5, 7, 3)])
def test_work_is_what_the_sizes_say(dense, sequence, past, batch):
    work = compute_graph_work(dense, sequence=sequence, past=past, batch=batch)
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
        assert compute_graph_work(narrow, sequence=sequence, past=0).flops == expected


def test_a_table_that_is_also_the_projection_counts_once(tmp_path):
    model = tiny_decoder(FUSED, n_layer=1)
    file = emit_onnx(trace_decoder(model), tmp_path)
    read = sum(p.numel() for name, p in model.named_parameters() if name != "transformer.wpe.weight")
    assert 0 <= compute_graph_work(file, sequence=1, past=0).bytes - 4 * read < 400


@pytest.fixture(scope="module")
def compared(dense, narrow):
    calls = []
    graphs = {"dense": dense.parent, "narrow": narrow, "narrow int8": quantize_onnx(narrow, "int8")}
    how = {"lengths": (16, 33), "batches": (1, 3), "rounds": 2, "sessions": 2}
    return bench_graphs(graphs, **how, progress=lambda *call: calls.append(call)), calls


def test_rows_hold_every_graph_in_every_case_and_the_ideal(compared, dense, narrow):
    result, calls = compared
    cases = list(dict.fromkeys(str(row.case) for row in result.rows))
    assert cases == [f"{p} {n}{b}" for p in ("prefill", "decode") for b in ("", " ×3") for n in (16, 33)]
    assert [row.graph for row in result.rows] == ["dense", "narrow", "narrow int8"] * len(cases)
    assert [call[1:] for call in calls if call[0] == "bench"] == [(done, 16) for done in range(17)]
    for first, *others in (result.rows[i : i + 3] for i in range(0, len(result.rows), 3)):
        assert (first.ratio, first.ideal) == (1, 1)
        for row in (first, *others):
            assert row.ideal == round(row.work / first.work, 4)
            seconds = row.case.tokens / row.tokens_s
            assert row.ms == pytest.approx(1000 * seconds, rel=0.01, abs=0.001)  # both are rounded
            peak = result.peaks[1].flops if row.case.phase == "prefill" else result.peaks[1].bandwidth
            assert row.roofline == pytest.approx(row.work / seconds / peak, rel=0.01, abs=0.001)
    assert result.graphs[0].bytes == sum(f.stat().st_size for f in dense.parent.glob("model.onnx*"))
    at = {(row.graph, str(row.case)): row.work for row in result.rows}
    assert at["dense", "prefill 33 ×3"] == compute_graph_work(dense, sequence=33, past=0, batch=3).flops
    assert at["narrow", "decode 16"] == compute_graph_work(narrow, sequence=1, past=16).bytes
    for case in cases:  # quantised products are as many operations, and fewer bytes
        float32, int8 = at["narrow", case], at["narrow int8", case]
        assert int8 == float32 if case.startswith("prefill") else int8 < float32


def test_who_begins_changes_from_session_to_session_and_times_stay_with_their_graph(dense, narrow, inside):
    """One side has two layers, so a step of it is known by the sizes that it takes and gives."""
    turns = []

    def taken(_, steps, rounds):
        turns.append(steps)
        return [[10.0 * (1 + len(turns)) + place] * rounds for place in range(len(steps))]

    how = {"lengths": (8,), "rounds": 2, "sessions": 2, "phases": ("decode",)}
    inside.around("mptk.ort.bench.time_alternately", taken)
    result = bench_graphs({"dense": dense, "narrow": narrow}, **how)
    assert len(turns) > 2
    # In the second set of sessions the sides are given the other way around, and so is what is found.
    assert [row.ms for row in result.rows] == [(20 + 31) / 2, (21 + 30) / 2]


def test_widths_that_kernels_pad_are_timed_beside_the_next_ones_that_they_do_not(compared, tmp_path):
    found = [each for each in compared[0].unaligned if each.graph == "narrow"]
    sizes = {(48, 60), (48, 20), (60, 48), (48, 40), (40, 48), (48, 97)}
    assert {(each.inputs, each.outputs) for each in found} == sizes
    assert {each.rows for each in found} == {1, 33}
    assert all(each.ms >= 0 and each.aligned_ms >= 0 for each in found)
    assert {each.aligned for each in found} == {(64, 64), (64, 32), (64, 128)}
    lines = render_markdown(build_bench_view(compared[0])).splitlines()
    assert any("33 × 48 × 97" in line and "64 × 128" in line for line in lines)
    aligned = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 32, "vocab_size": 128}
    model = tiny_decoder(GROUPED, num_hidden_layers=1, **aligned)
    assert list_unaligned_weights(emit_onnx(trace_decoder(model), tmp_path)) == []


def test_the_result_goes_through_json_into_a_table_and_into_a_plot(compared, tmp_path):
    result, _ = compared
    assert make_typed(Bench, json.loads(json.dumps(result.to_json()))) == result
    lines = render_markdown(build_bench_view(result)).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 9
    assert sum("narrow int8" in line for line in lines) == 8 + 1
    assert any("GFLOP/s" in line for line in lines)
    for suffix in ("svg", "png"):
        write_bench_plot(result, tmp_path / f"bench.{suffix}")
        check_file(tmp_path / f"bench.{suffix}", "plot")
    drawn = (tmp_path / "bench.svg").read_text()
    assert all(word in drawn for word in ("narrow int8", "ideal"))


def test_sides_take_turns_and_the_order_changes():
    seen = []
    times = time_alternately([lambda: seen.append("a"), lambda: seen.append("b")], rounds=4, shortest=0.0)
    assert "".join(seen) == "ab" + "abbaabba"
    assert [len(side) for side in times] == [4, 4]


def test_a_graph_with_two_names_is_timed_once_and_one_round_is_refused(dense, narrow, tmp_path):
    (tmp_path / "link").symlink_to(dense.parent)
    graphs = {"dense": dense.parent, "narrow": narrow, "file": dense, "link": tmp_path / "link"}
    result = bench_graphs(graphs, lengths=(8,), rounds=2, sessions=1, phases=("prefill",))
    assert [graph.name for graph in result.graphs] == [row.graph for row in result.rows] == ["dense", "narrow"]
    with expect_error(InputError, name="rounds"):
        bench_graphs({"dense": dense}, rounds=1)


@pytest.fixture(scope="module")
def other_kinds(laboratory):
    """Kind → the folder of its graphs, in float32 and in int8."""

    def export_kind(out):
        torch.manual_seed(0)
        export(MODEL_KINDS[out.name].make().eval(), out, quantize=["int8"])

    return {kind: laboratory.keep(f"bench/{kind}", export_kind) for kind in ("image classifier", "speech")}


@pytest.mark.features
@pytest.mark.parametrize(
    ("kind", "cases"),
    [("image classifier", ["run"]), ("speech", ["prefill 8", "prefill 16", "decode 8", "decode 16", "encoder"])],
)
def test_each_graph_of_a_model_that_is_no_plain_decoder_is_run(other_kinds, kind, cases):
    main = other_kinds[kind] / ("decoder_model_merged.onnx" if kind == "speech" else "model.onnx")
    graphs = {"float": other_kinds[kind], "int8": main.with_stem(f"{main.stem}_quantized")}
    result = bench_graphs(graphs, lengths=(8, 16), rounds=2, sessions=1)
    assert [str(row.case) for row in result.rows] == [case for case in cases for _ in graphs]
    assert all(row.ideal == 1 for row in result.rows if row.case.phase != "decode"), "as many operations"
    assert all(row.ideal < 1 for row in result.rows if (row.graph, row.case.phase) == ("int8", "decode")), "fewer bytes"
    whole, small = (graph.bytes for graph in result.graphs)
    assert small < whole == sum(f.stat().st_size for f in main.parent.glob("*.onnx*") if "_quantized" not in f.name)


@pytest.mark.features
def test_operations_of_an_encoder_of_speech_are_what_its_sizes_say(other_kinds):
    """Two convolutions over 8 channels and 100 frames, of which the second halves these, then two blocks."""
    config = MODEL_KINDS["speech"].make().config
    width, ffn, frames = config.d_model, config.encoder_ffn_dim, 50
    convolutions = 3 * width * (8 * 2 * frames + width * frames)
    block = frames * (4 * width * width + 2 * width * ffn + 2 * frames * width)
    work = run_work(other_kinds["speech"] / "encoder_model.onnx", Case("encoder", 0, 1, 1))
    assert work.flops == 2 * (convolutions + config.encoder_layers * block)


@pytest.mark.features
def test_models_of_two_kinds_and_a_length_that_a_graph_does_not_take_are_refused(other_kinds, dense):
    folder = other_kinds["speech"]
    with expect_error(FileError, name="speech"):
        bench_graphs({"dense": dense, "speech": folder})
    with expect_error(FileError, name=folder / "decoder_model_merged.onnx"):
        bench_graphs({"speech": folder}, lengths=(900,), rounds=2, sessions=1)


def test_memory_is_that_of_a_new_process(narrow):
    assert 0 < measure_peak_memory(narrow, 8) < 1 << 30


class Frames(torch.nn.Module):
    """A convolution over the frames of all samples, whose number the graph does not tell."""

    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Conv2d(3, 5, 2)

    def forward(self, x):
        return self.kernel(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def test_sizes_that_a_graph_does_not_tell_are_those_of_a_run(tmp_path):
    folder = export(Frames().eval(), tmp_path, example_inputs=torch.randn(2, 4, 3, 6, 6))
    work = run_work(folder / "model.onnx", Case("run", 6, 7, 1))
    assert work.flops == 2 * 7 * 6 * 5 * (5 * 5) * (3 * 2 * 2)
