"""``--onnx-dtype``: the type of the graph, its proof, and what ONNX Runtime does not run.

It reaches for mptk.ort.decoder: a graph is run by itself.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx_checks import padded
from tiny_decoders import FUSED, GROUPED, tiny_decoder

import mptk
from mptk import Settings, testing
from mptk.errors import InputError, ModelError
from mptk.ort.decoder import OrtDecoder
from mptk.testing import expect_error
from passes.pipelines import quantize_onnx

SHORT = {"samples": 4, "length": 32, "eval_windows": 2, "eval_length": 32}
SETTINGS = Settings(sparsity=0.314, method="magnitude", align=4, onnx_dtype="float16", **SHORT)


@pytest.mark.parametrize("kind", [GROUPED, FUSED])
def test_a_float16_graph_is_the_one_that_the_float32_graph_is_converted_to(kind, tmp_path):
    model = tiny_decoder(kind)
    half = OrtDecoder(mptk.export(model, tmp_path / "half", onnx_dtype="float16"), threads=1)
    whole = mptk.export(model, tmp_path / "whole", onnx_dtype="float32") / "model.onnx"
    converted = OrtDecoder(quantize_onnx(whole, "fp16"), threads=1)
    ids, mask = padded([torch.arange(3, 3 + length) for length in (9, 5)], "left")
    (found, cache), (expected, _) = (decoder.prefill(ids, mask) for decoder in (half, converted))
    assert half.half
    assert not OrtDecoder(whole, threads=1).half
    np.testing.assert_array_equal(found, expected)
    assert half.decode(ids[:, :1], cache)[0].dtype == np.float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, text = testing.make_llama(layers=1).to(torch.bfloat16), testing.make_tokenizer(begin=True)
    return testing.save_model(model, tmp_path_factory.mktemp("bfloat16"), text)


def test_a_float16_graph_is_proven_and_verified(checkpoint, tmp_path):
    report = mptk.prune(checkpoint, tmp_path / "out", SETTINGS).report
    assert OrtDecoder(tmp_path / "out", threads=1).half
    cases = {f"ONNX Runtime {case}" for case in ("prefill", "padded left", "padded right", "decode", "sizes")}
    stages = {*cases, "fp16 weights", "fp16 logits"}
    assert stages <= {d["stage"] for d in report.proof}
    verified = mptk.verify(tmp_path / "out")
    assert stages <= {d.stage for d in verified}
    assert all(d.ok and d.relative > 0 for d in verified if d.stage in stages)


def test_what_onnx_runtime_does_not_run_is_refused(tmp_path):
    for dtype, quantize in (("bfloat16", ()), ("float64", ()), ("float16", ("int8",))):
        with expect_error(InputError, name="onnx_dtype"):
            Settings(onnx_dtype=dtype, quantize=quantize)
    with expect_error(ModelError):
        mptk.export(tiny_decoder(GROUPED, num_hidden_layers=1).bfloat16(), tmp_path / "out", onnx_dtype="float16")
    assert not list(tmp_path.glob("out/*"))


def test_angles_of_far_positions_are_not_rounded(tmp_path):
    """float16 has steps of 2 beyond 2048, a third of a turn."""
    model = tiny_decoder(GROUPED, max_position_embeddings=8192)
    types = ("float16", "float32")
    half, whole = (OrtDecoder(mptk.export(model, tmp_path / d, onnx_dtype=d), threads=1) for d in types)
    ids = np.arange(3, 9)[None]
    found, expected = (decoder.decode(ids, decoder.make_filled(1, 3001))[0] for decoder in (half, whole))
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
