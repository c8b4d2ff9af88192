"""Quantised graphs are held against the float graph, weight by weight; what was done to one is found."""

from __future__ import annotations

import shutil

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graph_damage import Damage, damaged, garbage_block, one_code
from tiny_decoders import FUSED, GROUPED, graphs_of, tiny_decoder

from mptk import ProofError
from mptk.testing import expect_error
from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import ONNX_SCHEMES, emit_onnx, quantize_onnx
from passes.targets.onnx import check_quantized as checked
from passes.targets.onnx.check_quantized import DIVERGENCES, check_quantized, compute_token_divergence
from passes.targets.onnx.equalize import get_product_weight
from passes.targets.onnx.names import ENDINGS

TEXT = np.random.default_rng(0).integers(3, 97, (16, 32))


@pytest.mark.parametrize("kind", [GROUPED, FUSED])
@pytest.mark.parametrize("scheme", ONNX_SCHEMES)
def test_quantised_weights_are_near(decoder_graphs, kind, scheme):
    graphs = graphs_of(decoder_graphs(kind))
    assert 0.3 < check_quantized(graphs["float"], graphs[scheme], scheme) <= 1


def test_what_was_rounded_for_a_text_is_too(decoder_graphs, tmp_path):
    shutil.copytree(decoder_graphs(FUSED), tmp_path, dirs_exist_ok=True)
    source = graphs_of(tmp_path)["float"]
    assert 0.3 < check_quantized(source, quantize_onnx(source, "int4", TEXT), "int4") <= 1


@pytest.fixture(scope="module")
def graphs(decoder_graphs, tmp_path_factory):
    """Float, int8, int4 and float16 graphs of one decoder, int4 rounded for a text."""
    folder = tmp_path_factory.mktemp("graphs")
    shutil.copytree(decoder_graphs(GROUPED), folder, dirs_exist_ok=True)
    quantize_onnx(graphs_of(folder)["float"], "int4", TEXT)
    return folder


def nan_once(scales: np.ndarray) -> np.ndarray:
    scales = scales.copy()
    scales.flat[7] = np.nan
    return scales


DAMAGES: dict[str, tuple[str, str, Damage]] = {
    "int8 block of noise": ("int8", "linear_2.smooth.1_Q8", garbage_block),
    "int8 code one off": ("int8", "linear_2.smooth.1_Q8", one_code),
    "int8 scales doubled": ("int8", "linear_2.smooth.1_scales", lambda a: a * 2),
    "int8 scale of NaN": ("int8", "linear_2.smooth.1_scales", nan_once),
    "int8 embedding row": ("int8", "embed_tokens.weight_row_scales", lambda a: np.roll(a, 1, 0)),
    "int8 norm": ("int8", "model.norm.weight", lambda a: a * 1.01),
    "int4 block of noise": ("int4", "linear_2.smooth.1_Q4", garbage_block),
    "int4 scales doubled": ("int4", "linear_2.smooth.1_scales", lambda a: a * 2),
    "int4 zero points": ("int4", "linear_2.smooth.1_zero_points", lambda a: a ^ 0x77),
    "int4 rows swapped": ("int4", "linear_2.smooth.1_Q4", lambda a: np.roll(a, 1, 0)),
    "fp16 weight": ("fp16", "val_140", lambda a: a * np.float16(1.01)),
    "fp16 NaN": ("fp16", "val_140", lambda a: np.where(a == a.max(), np.float16(np.nan), a)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(name, graphs, tmp_path):
    scheme, ending, damage = DAMAGES[name]
    shutil.copytree(graphs, tmp_path, dirs_exist_ok=True)
    file = tmp_path / f"model{ENDINGS[scheme]}.onnx"
    check_quantized(tmp_path / "model.onnx", file, scheme)
    with expect_error(ProofError, name=f"{scheme} weights"):
        check_quantized(tmp_path / "model.onnx", damaged(file, ending, damage), scheme)


def test_the_graph_of_another_model_is_found(graphs, tmp_path):
    other = emit_onnx(trace_decoder(tiny_decoder(GROUPED, intermediate_size=96)), tmp_path)
    with expect_error(ProofError, name="int8 weights"):
        check_quantized(graphs / "model.onnx", quantize_onnx(other, "int8"), "int8")


class ReorderPass(ir.passes.InPlacePass):
    """The first two channels of gated products in each other's place."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in model.graph:
            for parts in filter(None, [checked.match_gated_product(node)]):
                gate, up, down = (get_product_weight(part) for part in parts)
                order = np.r_[1, 0, 2 : gate.shape[1]]
                for part, array in zip(parts, (gate[:, order], up[:, order], down[order]), strict=True):
                    part.inputs[1].const_value = ir.Tensor(np.ascontiguousarray(array), name=part.inputs[1].name)
        return ir.passes.PassResult(model, True)


def test_channels_in_another_order_are_the_same_weights(graphs, inside):
    """As on a processor whose rounding puts equally large channels in another order."""
    inside.spoil("passes.targets.onnx.check_quantized.list_evening_passes", lambda found: [*found, ReorderPass()])
    for scheme in ("int8", "int4"):
        assert check_quantized(graphs / "model.onnx", graphs / f"model{ENDINGS[scheme]}.onnx", scheme) <= 1


def test_divergence_is_in_nats_and_infinite_with_nan():
    reference = torch.log(torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]))
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.1, 0.9]]])) + 3
    assert compute_token_divergence(logits, reference) == pytest.approx(0.8 * np.log(9) / 2)
    assert compute_token_divergence(reference, reference) == 0
    assert compute_token_divergence(reference * float("nan"), reference) == float("inf")
    assert DIVERGENCES.keys() == set(ONNX_SCHEMES)
