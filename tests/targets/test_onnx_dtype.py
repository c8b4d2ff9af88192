"""``--onnx-dtype``: the type of the graph, its proof, and what ONNX Runtime does not run.

It reaches for mptk.ort.decoder: a graph is run by itself.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from inside import Inside
from onnx_checks import padded
from tiny_decoders import BIASED, FUSED, GROUPED, SLIDING, tiny_decoder

import mptk
from mptk import MptkError, ProofError, Settings, testing
from mptk.api.graphs import export_folder
from mptk.ort.decoder import OrtDecoder
from passes.pipelines import quantize_onnx

SETTINGS = Settings(
    sparsity=0.314,
    method="magnitude",
    samples=4,
    length=32,
    align=4,
    eval_windows=2,
    eval_length=32,
    onnx_dtype="float16",
)


@pytest.mark.parametrize(
    "kind", [GROUPED, FUSED, *(pytest.param(kind, marks=pytest.mark.long) for kind in (SLIDING, BIASED))]
)
def test_a_float16_graph_is_the_one_that_the_float32_graph_is_converted_to(kind: str, tmp_path: Path) -> None:
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
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bfloat16")
    testing.save_model(testing.make_llama().to(torch.bfloat16), folder, testing.make_tokenizer(begin=True))
    return str(folder)


def test_a_float16_graph_is_proven_and_verified(checkpoint: str, tmp_path: Path) -> None:
    report = mptk.prune(checkpoint, tmp_path / "out", SETTINGS).report
    assert OrtDecoder(tmp_path / "out", threads=1).half
    cases = {f"ONNX Runtime {case}" for case in ("prefill", "padded left", "padded right", "decode", "sizes")}
    stages = {*cases, "fp16 weights", "fp16 logits"}
    assert stages <= {d["stage"] for d in report.proof}
    verified = mptk.verify(tmp_path / "out")
    assert stages <= {d.stage for d in verified}
    assert all(d.ok and d.relative > 0 for d in verified if d.stage in stages)


def test_weights_that_are_a_thousandth_off_are_found(checkpoint: str, tmp_path: Path, inside: Inside) -> None:
    target = "passes.targets.onnx.float16.convert_np_to_float16"
    inside.around(target, lambda convert, array: convert(array * np.float32(1.001)))
    with pytest.raises(ProofError, match=r"the proof fails at 'fp16 weights'"):
        mptk.prune(checkpoint, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_what_onnx_runtime_does_not_run_is_refused_by_name(checkpoint: str, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float64"):
        message = rf"onnx_dtype: '{dtype}' is not known; .*choose one of auto, float32, float16"
        with pytest.raises(MptkError, match=message):
            Settings(onnx_dtype=dtype)
        with pytest.raises(MptkError, match=message):
            export_folder(checkpoint, tmp_path / "out", Settings(onnx_dtype=dtype))
    with pytest.raises(MptkError, match="int8 needs a float32 graph; leave out --onnx-dtype or --quantize"):
        Settings(onnx_dtype="float16", quantize=("int8",))
    with pytest.raises(MptkError, match=r"a float16 graph needs a float32 model, not torch.bfloat16; call model.float"):
        mptk.export(tiny_decoder(GROUPED, num_hidden_layers=1).bfloat16(), tmp_path / "out", onnx_dtype="float16")
    assert not list(tmp_path.glob("out/*"))


def test_angles_of_far_positions_are_not_rounded(tmp_path: Path) -> None:
    """float16 has steps of 2 beyond 2048, a third of a turn."""
    model = tiny_decoder(GROUPED, max_position_embeddings=8192)
    half, whole = (
        OrtDecoder(mptk.export(model, tmp_path / d, onnx_dtype=d), threads=1) for d in ("float16", "float32")
    )
    ids = np.arange(3, 9)[None]
    found, expected = (decoder.decode(ids, decoder.make_filled(1, 3001))[0] for decoder in (half, whole))
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
