"""OrtDecoder: the cache as a value, and what it says about wrong files and wrong shapes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tiny_decoders import GROUPED, tiny_decoder

from mptk.errors import FileError
from mptk.ort.decoder import OrtDecoder
from mptk.testing import expect_error
from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import emit_onnx

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    program = trace_decoder(tiny_decoder(GROUPED, num_hidden_layers=1))
    return emit_onnx(program, tmp_path_factory.mktemp("onnx")).parent


@pytest.fixture(scope="module")
def decoder(folder):
    return OrtDecoder(folder, threads=1)


def tokens(batch: int, length: int) -> np.ndarray:
    return RNG.integers(3, 97, (batch, length))


def test_a_step_leaves_the_cache_before_it_usable(decoder):
    """Two continuations of one prompt, and one of them again."""
    _, prompt = decoder.prefill(tokens(2, 7))
    first, second = tokens(2, 1), tokens(2, 1)
    expected, after = decoder.decode(first, prompt)
    other, _ = decoder.decode(second, prompt)
    again, _ = decoder.decode(first, prompt)
    np.testing.assert_array_equal(again, expected)
    assert np.abs(other - expected).max() > 0.1
    assert (prompt.length, after.length) == (7, 8)


def test_steps_over_a_long_run_equal_the_prefill_of_the_whole(decoder):
    ids = tokens(3, 24)
    _, cache = decoder.prefill(ids[:, :1])
    steps = []
    for position in range(1, 24):
        logits, cache = decoder.decode(ids[:, position : position + 1], cache)
        steps.append(logits[:, 0])
    np.testing.assert_allclose(np.stack(steps, 1), decoder.compute_logits(ids)[:, 1:], atol=1e-4)


def test_what_a_step_gave_stays_as_it_is_when_its_binding_is_used_again(decoder):
    logits, cache = decoder.prefill(tokens(2, 7))
    before = logits.copy(), {name: value.numpy().copy() for name, value in cache.values.items()}
    for _ in range(5):
        _, later = decoder.decode(tokens(2, 1), cache)
        decoder.decode(tokens(2, 3), later)
        decoder.prefill(tokens(3, 9))
    np.testing.assert_array_equal(logits, before[0])
    for name, value in cache.values.items():
        np.testing.assert_array_equal(value.numpy(), before[1][name])


def test_a_filled_cache_has_the_length_asked_for_and_ids_any_integer_type_and_layout(decoder):
    logits, cache = decoder.decode(tokens(2, 1), decoder.make_filled(2, 17))
    assert (logits.shape, cache.length) == ((2, 1, 97), 18)
    assert np.isfinite(logits).all()
    ids = tokens(2, 6)
    expected = decoder.compute_logits(ids)
    np.testing.assert_array_equal(decoder.compute_logits(ids.astype(np.int32)), expected)
    np.testing.assert_array_equal(decoder.compute_logits(np.asfortranarray(ids)), expected)


def test_shapes_that_do_not_fit_are_named(decoder):
    _, cache = decoder.prefill(tokens(2, 5))
    with pytest.raises(ValueError, match="do not fit"):
        decoder.decode(tokens(3, 1), cache)
    with pytest.raises(ValueError, match="do not fit"):
        decoder.prefill(tokens(2, 5), np.ones((2, 4), dtype=np.int64))


def test_missing_broken_and_other_files(folder, tmp_path):
    with expect_error(FileError, name=tmp_path / "model.onnx"):
        OrtDecoder(tmp_path)
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:200])
    pixels = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("pixels", "same")]
    graph = helper.make_graph([helper.make_node("Identity", ["pixels"], ["same"])], "g", pixels[:1], pixels[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "x.onnx")
    for name in ("model.onnx", "x.onnx"):
        with expect_error(FileError, name=tmp_path / name):
            OrtDecoder(tmp_path / name)
