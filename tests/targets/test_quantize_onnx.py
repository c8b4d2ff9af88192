"""Quantised decoders: how near to float32, how small, and as indifferent to padding."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_checks import padded
from onnx_ir.passes import common
from tiny_decoders import BIASED, FUSED, GROUPED, graphs_of, tiny_decoder

from mptk.errors import InputError
from mptk.ort.decoder import OrtDecoder
from mptk.testing import expect_error
from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import ONNX_SCHEMES, emit_onnx, quantize_onnx
from passes.targets.onnx.block_weights import BLOCK, LEAST_BLOCK, BlockWeightsPass, LookUpInBlocksPass, quantize_rows
from passes.targets.onnx.equalize import BalancePass, SmoothPass, balance_channels, compute_smoothing
from passes.targets.onnx.gptq import compute_inverse_root, fit_grid, round_blocks, round_to_grid
from passes.targets.onnx.measure import measure_onnx
from passes.targets.onnx.plain_products import PlainProductsPass
from passes.targets.onnx.quantize import read_float
from passes.targets.onnx.tensors import read_lazily

RNG = np.random.default_rng(0)
ERROR = {"int8": 0.1, "int4": 0.9, "fp16": 0.01}
"""Of the logits, root mean square over their deviation: weights here are as spread as can be, without outliers."""


@pytest.fixture(scope="module", params=[GROUPED, FUSED])
def graphs(request, decoder_graphs):
    return graphs_of(decoder_graphs(request.param))


@pytest.fixture(scope="module")
def source(graphs):
    return graphs["float"]


@pytest.fixture(scope="module")
def plain(source):
    return OrtDecoder(source, threads=1)


@pytest.fixture(scope="module", params=list(ONNX_SCHEMES))
def quantized(request, graphs):
    return request.param, OrtDecoder(graphs[request.param], threads=1)


def error(found, expected) -> float:
    return float(np.sqrt(np.square(found - expected).mean()) / expected.std())


def test_prefill_and_decoding_stay_near_float32(plain, quantized):
    scheme, decoder = quantized
    ids = RNG.integers(3, 97, (2, 11))
    expected, expected_cache = plain.prefill(ids[:, :8])
    logits, cache = decoder.prefill(ids[:, :8])
    assert logits.dtype == np.float32
    assert 0 < error(logits, expected) < ERROR[scheme]
    for step in range(8, 11):
        expected, expected_cache = plain.decode(ids[:, step : step + 1], expected_cache)
        logits, cache = decoder.decode(ids[:, step : step + 1], cache)
        assert error(logits, expected) < ERROR[scheme]


def test_a_left_padded_prompt_gets_the_logits_it_gets_alone(quantized):
    """But for an activation that falls on the other side of a rounding boundary, which float32 noise can bring about."""
    _, decoder = quantized
    apart = []
    for _ in range(4):
        prompts = [torch.from_numpy(RNG.integers(3, 97, length)) for length in (9, 2, 5, 1, 7, 3, 8, 4)]
        together, _ = decoder.prefill(*padded(prompts, "left"))
        for prompt, row in zip(prompts, together, strict=True):
            alone, _ = decoder.prefill(prompt[None].numpy())
            apart.append(np.abs(row[9 - len(prompt) :] - alone[0]).max() / np.abs(alone).max())
    assert max(apart) < 0.02
    assert np.mean(np.array(apart) <= 1e-4) >= 0.9


def test_no_table_or_product_stays_float32(graphs):
    """Neither the embedding, nor the output projection, nor a product with a weight, for each kind of decoder."""
    for scheme in ("int8", "int4"):
        graph = onnx.load(graphs[scheme]).graph
        large = [w for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT and w.dims[1:] == [48]]
        assert all(w.dims[0] in (64, 66) for w in large), "tables of positions"
        weights = {w.name for w in graph.initializer}
        assert not [n for n in graph.node if n.op_type in ("MatMul", "Gemm") and set(n.input) & weights]


def test_a_tied_table_is_stored_once_and_names_stay(tmp_path):
    model = tiny_decoder(GROUPED, tie_word_embeddings=True, vocab_size=2048)
    source = emit_onnx(trace_decoder(model), tmp_path, metadata={"plan_sha256": "0a1b"})
    file = quantize_onnx(source, "int8")
    size = sum(f.stat().st_size for f in tmp_path.glob(f"{file.name}*"))
    table = 2048 * 64 * (1 + 2 * 4 / 64)  # 48 columns take one block of 64; the scales are stored for either use
    assert table < size < 1.6 * table, "once, and the two layers"
    plain, quantized = (onnx.load(f, load_external_data=False) for f in (source, file))
    for values in ("input", "output"):
        assert [v.name for v in getattr(plain.graph, values)] == [v.name for v in getattr(quantized.graph, values)]
    metadata = {entry.key: entry.value for entry in quantized.metadata_props}
    assert (metadata["plan_sha256"], metadata["quantization"]) == ("0a1b", "int8")
    assert source.is_file()


def test_a_product_with_few_inputs_has_one_block_that_holds_them(graphs):
    nodes = onnx.load(graphs["int8"], load_external_data=False).graph.node
    products = [{a.name: a.i for a in node.attribute} for node in nodes if node.op_type == "MatMulNBits"]
    assert products
    for p in products:
        assert max(LEAST_BLOCK, p["K"]) <= p["block_size"] <= max(LEAST_BLOCK, 2 * p["K"] - 1)


def weights(model) -> dict[int, np.ndarray]:
    products = [node for node in model.graph if node.op_type == "MatMul" and node.inputs[1].const_value is not None]
    return {id(node): node.inputs[1].const_value.numpy().copy() for node in products}


def count_changes(model, before) -> int:
    after = weights(model)
    return sum(not np.array_equal(array, after[node]) for node, array in before.items())


def assert_same_logits(model, source, tmp_path) -> None:
    common.RemoveUnusedNodesPass()(model)
    ir.save(model, tmp_path / "model.onnx")
    ids = RNG.integers(3, 97, (2, 11))
    expected, found = (OrtDecoder(file, threads=1).compute_logits(ids) for file in (source, tmp_path / "model.onnx"))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def loaded(source):
    model = read_lazily(source)
    PlainProductsPass()(model)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def test_smoothing_changes_no_logits_and_is_done_for_all_norms_that_products_alone_read(source, tmp_path):
    """Two a layer of two, whatever norm and however its result is reshaped; not the last, which gives the logits."""
    model = loaded(source)
    before = weights(model)
    assert SmoothPass(source)(model).modified
    smoothed = [".smooth." in n.inputs[1].name for n in model.graph if n.op_type.endswith("Normalization")]
    assert sum(smoothed) == 4
    assert not smoothed[-1]
    products = [node for node in model.graph if node.op_type == "MatMul" and ".smooth." in node.inputs[1].name]
    assert count_changes(model, before) == len(products)
    assert_same_logits(model, source, tmp_path)
    assert not list(source.parent.glob(".*"))


def test_smoothed_channels_are_as_large_in_activations_as_in_weights_and_are_rounded_with_less_error():
    spread = RNG.lognormal(0, 1.5, 48)
    data, left, right = RNG.standard_normal((500, 48)) * spread, *RNG.standard_normal((2, 48, 30))
    left[3], right[3] = 0, 0
    scale = compute_smoothing(np.sqrt(np.square(data).mean(0)), [left, right])
    assert scale[3] == 1
    alive = np.arange(48) != 3
    both = np.concatenate([left, right], axis=1) * scale[:, None]
    ratio = np.sqrt(np.square(data / scale).mean(0))[alive] / np.sqrt(np.square(both).mean(1))[alive]
    np.testing.assert_allclose(ratio, ratio[0])

    def rounded(array, axis):
        steps = np.abs(array).max(axis=axis, keepdims=True) / 127
        return np.rint(array / steps) * steps

    expected = data @ left
    plain, smooth = (rounded(x, 1) @ rounded(w, 0) for x, w in ((data, left), (data / scale, left * scale[:, None])))
    assert np.linalg.norm(smooth - expected) < 0.7 * np.linalg.norm(plain - expected)


def test_balancing_changes_no_logits_and_is_done_for_gated_products_alone(source, tmp_path):
    model = loaded(source)
    before = weights(model)
    gated = any(node.op_type == "RMSNormalization" for node in model.graph)
    assert BalancePass()(model).modified == gated
    assert count_changes(model, before) == (6 if gated else 0)
    assert_same_logits(model, source, tmp_path)


def test_balanced_channels_are_sorted_and_rounded_with_less_error():
    gate, up = (RNG.standard_normal((48, 256)) * RNG.lognormal(0, 1, 256) for _ in range(2))
    down, data = RNG.standard_normal((256, 40)), RNG.standard_normal((500, 48))
    gate[:, 7] = 0
    expected = (np.maximum(data @ gate, 0) * (data @ up)) @ down

    def rounded_error(gate, up, down) -> float:
        inner = np.maximum(data @ gate, 0) * (data @ up)
        np.testing.assert_allclose(inner @ down, expected, atol=1e-9 * np.abs(expected).max())
        steps = np.abs(inner.reshape(500, 2, 128)).max(axis=2, keepdims=True) / 127
        rounded = (np.rint(inner.reshape(500, 2, 128) / steps) * steps).reshape(500, 256)
        return float(np.linalg.norm(rounded @ down - expected))

    balance = balance_channels(*map(ir.tensor, (gate, up, down)))
    arrays = balance.scale_gate(gate), balance.scale_up(up), balance.scale_down(down)
    sizes = np.linalg.norm(arrays[0], axis=0) * np.linalg.norm(arrays[1], axis=0)
    assert (np.diff(sizes) >= -1e-9).all()
    assert rounded_error(*arrays) < 0.8 * rounded_error(gate, up, down)


def test_sums_do_not_depend_on_how_much_is_run_at_once(source):
    graph = onnx.load(source, load_external_data=False).graph
    norms = [n for n in graph.node if n.op_type in ("RMSNormalization", "LayerNormalization")]
    channels = {str(n.output[0]): 48 for n in norms[:1] + norms[-1:]}
    text = RNG.integers(3, 97, (10, 12))
    squares, products = (dict(measure_onnx(source, channels, text, what)) for what in ("squares", "products"))
    assert squares.keys() == products.keys() == channels.keys()
    for what, expected in (("squares", squares), ("products", products)):
        for name, found in measure_onnx(source, channels, text, what, tokens_at_once=36, most_bytes=1):
            np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(products[name].diagonal(), squares[name], rtol=1e-4)


def test_rounding_for_a_text_loses_less_on_it_than_rounding_each_weight_by_itself(source, plain, tmp_path):
    for part in source.parent.glob("model.onnx*"):
        shutil.copy(part, tmp_path)
    text = RNG.integers(3, 97, (40, 12))
    expected = plain.compute_logits(text)
    file = tmp_path / "model.onnx"
    by_itself = error(OrtDecoder(quantize_onnx(file, "int4"), threads=1).compute_logits(text), expected)
    for_text = error(OrtDecoder(quantize_onnx(file, "int4", text), threads=1).compute_logits(text), expected)
    assert for_text < 0.9 * by_itself
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("inputs", [96, 80])
def test_rounding_errors_are_made_up_for(inputs):
    data = RNG.standard_normal((400, 20)) @ RNG.standard_normal((20, inputs)) + RNG.standard_normal((400, inputs)) / 3
    data[:, 5] = 0
    weight = RNG.standard_normal((inputs, 30)).astype(np.float32)
    weight[:, 7] = 0
    moments = (data.T @ data).astype(np.float32)
    blocks = round_blocks(weight, moments.diagonal(), compute_inverse_root(moments), BLOCK)
    assert blocks.codes.max() == 15
    alone = np.empty_like(weight)
    for start in range(0, inputs, BLOCK):
        part = weight[start : start + BLOCK]
        scale, zero = fit_grid(part, np.ones(len(part), dtype=np.float32))
        alone[start : start + BLOCK] = scale * (round_to_grid(part, scale, zero) - zero)
    found, other = (np.linalg.norm(data @ (array - weight)) for array in (blocks.to_float(), alone))
    assert found < 0.5 * other
    assert not blocks.to_float()[:, 7].any()


def test_ranges_are_shrunk_where_an_outlier_would_coarsen_what_counts():
    part = np.random.default_rng(0).standard_normal((32, 50)).astype(np.float32)
    part[0] = 8
    rows = np.arange(32)
    whole, _ = fit_grid(part, np.where(rows, 1, 1e4).astype(np.float32))
    shrunk, _ = fit_grid(part, np.where(rows, 1, 1e-4).astype(np.float32))
    assert shrunk.mean() < 0.9 * whole.mean()


def test_rows_are_rounded_to_the_nearest_step():
    table = RNG.standard_normal((5, 40)).astype(np.float32)
    table[2] = 0
    blocks, scales = quantize_rows(table)
    assert blocks.shape == (5, 2, BLOCK)
    back = ((blocks.astype(np.float32) - 128) * scales).reshape(5, -1)
    assert np.abs(back[:, :40] - table).max() <= scales.max() * 0.5001
    assert not back[:, 40:].any()


def test_an_unknown_scheme_is_named_and_nothing_is_written_and_logging_is_left_as_it_was(decoder_graphs, tmp_path):
    shutil.copytree(decoder_graphs(BIASED), tmp_path, dirs_exist_ok=True)
    source, before = graphs_of(tmp_path)["float"], sorted(tmp_path.iterdir())
    with expect_error(InputError, name="int3", nearest=["int8", "int4", "fp16"]):
        quantize_onnx(source, "int3")
    assert sorted(tmp_path.iterdir()) == before
    logs = logging.root.level, logging.root.handlers[:], logging.root.manager.disable
    quantize_onnx(source, "int4")
    assert (logging.root.level, logging.root.handlers[:], logging.root.manager.disable) == logs


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    model = tiny_decoder(GROUPED, num_hidden_layers=1, tie_word_embeddings=True)
    return emit_onnx(trace_decoder(model), tmp_path_factory.mktemp("tied"))


@pytest.mark.parametrize("step", [BlockWeightsPass(8, Path()), LookUpInBlocksPass(Path()), PlainProductsPass()])
def test_what_a_pass_leaves_in_float32_is_refused(tied, step):
    model = read_float(tied)
    if not isinstance(step, PlainProductsPass):
        PlainProductsPass()(model)
    with pytest.raises(ir.passes.PostconditionError):
        step.ensures(model)
    step.ensures(step(model).model)
