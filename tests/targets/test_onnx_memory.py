"""ONNX is written and quantised tensor by tensor: few weights in memory at once, and the numbers of the direct way."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_checks import TOLERANCE, alone
from onnxruntime.transformers.float16 import convert_np_to_float16
from tiny_decoders import FUSED, GROUPED, tiny_decoder
from torch import Tensor

from mptk.compat.onnxruntime import import_matmul_quantizer
from mptk.ir import Lazy, Weights
from mptk.ort.decoder import OrtDecoder
from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import ONNX_SCHEMES, emit_onnx, quantize_onnx
from passes.targets.onnx import tensors
from passes.targets.onnx.block_weights import round_to_blocks
from passes.targets.onnx.check_quantized import check_quantized

RNG = np.random.default_rng(0)
LARGE = 4096
"""Numbers of a weight that is read when it is written; smaller ones are read at once."""


class Alive:
    """Counts the arrays that were made and are still referred to."""

    def __init__(self) -> None:
        self.now = self.most = self.made = 0

    def add(self, array: object) -> None:
        self.made, self.now = self.made + 1, self.now + 1
        self.most = max(self.most, self.now)
        weakref.finalize(array, self._end)

    def _end(self) -> None:
        self.now -= 1


class Read(Weights):
    """Weights that are made anew at each request, as if read from a file."""

    def __init__(self, state: Weights) -> None:
        self.alive = Alive()
        super().__init__({n: Lazy(t.detach().to("meta"), partial(self.read, t.detach())) for n, t in state.items()})

    def read(self, tensor: Tensor) -> Tensor:
        array = tensor.numpy().copy()
        if array.size > LARGE:
            self.alive.add(array)
        return torch.from_numpy(array)


def constants(file: Path) -> dict[str, np.ndarray]:
    return {c.name: numpy_helper.to_array(c) for c in onnx.load(file).graph.initializer}


@pytest.mark.parametrize(("kind", "sizes"), [(GROUPED, {"hidden_size": 96}), (FUSED, {"n_inner": 200})])
def test_a_graph_is_written_with_one_weight_in_memory(kind, sizes, tmp_path):
    """And gives the model's logits."""
    model = tiny_decoder(kind, **sizes)
    program = trace_decoder(model)
    state = Read(program.state)
    file = emit_onnx(replace(program, state=state), tmp_path)
    assert state.alive.made >= 6
    assert state.alive.most == 1
    ids = torch.arange(3, 12)
    logits = torch.from_numpy(OrtDecoder(file, threads=1).compute_logits(ids[None].numpy())[0])
    torch.testing.assert_close(logits, alone(model, ids), atol=2 * TOLERANCE, rtol=1e-4)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The graph of a decoder of two layers."""
    return emit_onnx(trace_decoder(tiny_decoder(GROUPED)), tmp_path_factory.mktemp("written"))


@pytest.mark.parametrize("scheme", ONNX_SCHEMES)
def test_it_is_quantised_and_checked_with_few_in_memory(scheme, written, tmp_path, inside):
    """Three: queries, keys and values, which are smoothed by one scale."""
    source = Path(shutil.copytree(written.parent, tmp_path / "copy")) / written.name
    alive = Alive()

    def counted(array: np.ndarray) -> np.ndarray:
        if array.size > 900:
            alive.add(array)
        return array

    inside.spoil("passes.targets.onnx.tensors._read", counted)
    file = quantize_onnx(source, scheme)
    assert alive.made >= 2 * 7
    assert alive.most <= 3
    check_quantized(source, file, scheme)
    assert alive.most <= 3


@pytest.mark.parametrize(("bits", "block", "inputs"), [(8, 16, 96), (8, 128, 80), (4, 32, 80)])
def test_a_weight_rounded_in_parts_is_that_of_onnx_runtime(bits, block, inputs):
    outputs = 2 * tensors.PART // inputs + 5
    weight = RNG.standard_normal((inputs, outputs), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, outputs])],
        [numpy_helper.from_array(weight, "w")],
    )
    ort = import_matmul_quantizer()
    config = ort.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=bits == 8, accuracy_level=4, bits=bits)
    quantizer = ort.MatMulNBitsQuantizer(helper.make_model(graph), algo_config=config)
    quantizer.process()
    expected = [numpy_helper.to_array(c) for c in quantizer.model.model.graph.initializer]
    found = round_to_blocks(weight, bits, block)
    assert len(found) == (2 if bits == 8 else 3)
    assert [array.tobytes() for array in found] == [array.tobytes() for array in expected]


def test_float16_weights_are_those_of_onnx_runtimes_converter(written):
    full, half = constants(written), constants(quantize_onnx(written, "fp16"))
    large = [name for name, array in full.items() if array.size > 2000]
    assert len(large) >= 10
    for name in large:
        assert half[name].tobytes() == convert_np_to_float16(full[name]).tobytes()


def test_a_spilled_array_is_read_back_and_its_file_goes_with_it(tmp_path):
    spill = tensors.Spill(tmp_path)
    arrays = [RNG.integers(0, 255, (7, 5)).astype(np.uint8), RNG.standard_normal((3, 4)).astype(np.float32).T]
    kept = [spill.keep(array) for array in arrays]
    for tensor, array in zip(reversed(kept), reversed(arrays), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.tobytes() == array.tobytes()
    del spill, kept, tensor
    assert not list(tmp_path.iterdir())


def test_a_bfloat16_state_is_written_in_the_type_of_the_graph(tmp_path):
    program = trace_decoder(tiny_decoder(GROUPED, num_hidden_layers=1))
    rounded_state = {n: t.detach().bfloat16() if t.is_floating_point() else t for n, t in program.state.items()}
    full = {n: t.to(program.state[n].dtype) for n, t in rounded_state.items()}
    found, expected = (
        constants(emit_onnx(replace(program, state=Weights(state)), tmp_path / name))
        for name, state in (("stored", rounded_state), ("float32", full))
    )
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].tobytes()) == (array.dtype, array.tobytes()), name
    assert torch.float32 not in {t.dtype for n, t in rounded_state.items() if "weight" in n}
