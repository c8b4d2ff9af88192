"""A slice of rows before a product: the same numbers, also of no rows; other slices stay where they are."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes.targets.onnx.slice_early import SliceEarlyPass

RNG = np.random.default_rng(0)
BATCH, ROWS, WIDTH, HEADS, DIM = 2, 5, 6, 3, 4


def graph_of(*, axis: int = 2, bias: bool = True, flat: bool = False, twice: bool = False) -> onnx.ModelProto:
    """``x`` [batch, rows, width] → product → heads in front → what ``start`` leaves of ``axis``, plus one.

    ``flat``: ``x`` has no batch, and the product itself is sliced. ``twice``: the unsliced value is an output, too.
    """
    weights = {"w": RNG.standard_normal((WIDTH, HEADS * DIM), dtype=np.float32), "axes": np.array([axis])}
    weights |= {"end": np.array([99]), "one": np.ones(1, np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], [value := "product"])]
    if bias:
        weights["b"] = RNG.standard_normal(HEADS * DIM, dtype=np.float32)
        nodes.append(helper.make_node("Add", [value, "b"], [value := "biased"]))
    if not flat:
        weights["shape"] = np.array([BATCH, -1, HEADS, DIM])
        nodes.append(helper.make_node("Reshape", [value, "shape"], ["split"]))
        nodes.append(helper.make_node("Transpose", ["split"], [value := "heads"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Slice", [value, "start", "end", "axes"], ["sliced"]))
    nodes.append(helper.make_node("Add", ["sliced", "one"], ["y"]))
    shape = [ROWS, WIDTH] if flat else [BATCH, ROWS, WIDTH]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    inputs.append(helper.make_tensor_value_info("start", TensorProto.INT64, [1]))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ["y", *[value] * twice]]
    held = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))


def run(model: onnx.ModelProto, start: int) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString())
    shape = next(value.shape for value in session.get_inputs() if value.name == "x")
    x = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    return session.run(["y"], {"x": x, "start": np.array([start])})[0]


@pytest.mark.parametrize("start", [0, 2, ROWS])
@pytest.mark.parametrize("bias", [True, False])
def test_only_the_rows_that_are_left_are_multiplied(bias, start):
    before = graph_of(bias=bias)
    model = ir.from_proto(before)
    assert SliceEarlyPass()(model).modified
    assert [node.op_type for node in model.graph][:3].count("Slice") == 1, "before the product"
    after = ir.to_proto(model)
    assert [node.input[0] for node in after.graph.node if node.op_type == "Slice"] == ["x"]
    np.testing.assert_allclose(run(after, start), run(before, start), atol=1e-5)


@pytest.mark.parametrize("how", [{"axis": 1}, {"axis": 3}, {"axis": 1, "flat": True}, {"twice": True}], ids=str)
def test_other_slices_stay(how):
    """Of heads, of channels, of a product's columns, and of a value that is needed whole."""
    before = graph_of(**how)
    model = ir.from_proto(before)
    assert not SliceEarlyPass()(model).modified
    np.testing.assert_array_equal(run(ir.to_proto(model), 1), run(before, 1))
