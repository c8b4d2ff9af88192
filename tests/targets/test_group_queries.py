"""Query heads of a group as rows: the same results, where the form is there; else the heads stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes.targets.onnx.attention import FoldKVPass, GroupQueriesPass
from passes.targets.onnx.simplify import FusePass

RNG = np.random.default_rng(0)
HEADS, GROUPS, DIM, WIDTH, BATCH, TOKENS, PAST = 6, 2, 4, 9, 2, 3, 5


BOOL = TensorProto.BOOL


def attention(*, flat=True, bias=False, rotary=False, extra=False, per_head=False, kind=BOOL, groups=GROUPS):
    """``x``, a mask and a past → Attention → projection. ``extra``: what the query comes from is an output as well."""
    sizes = {"q": HEADS, "k": groups, "v": groups}
    weights = {f"w{name}": RNG.standard_normal((WIDTH, heads * DIM), dtype=np.float32) for name, heads in sizes.items()}
    weights["wo"] = RNG.standard_normal((HEADS * DIM, WIDTH), dtype=np.float32)
    nodes = [helper.make_node("MatMul", ["x", f"w{name}"], [name]) for name in sizes]
    query = "q"
    if bias:
        weights["b"] = RNG.standard_normal(HEADS * DIM, dtype=np.float32)
        nodes.append(helper.make_node("Add", ["b", query], [query := "biased"]))
    if rotary:
        angles = RNG.standard_normal((BATCH, TOKENS, DIM // 2), dtype=np.float32)
        weights |= {"cos": np.cos(angles), "sin": np.sin(angles)}
        nodes.append(helper.make_node("RotaryEmbedding", [query, "cos", "sin"], [query := "turned"], num_heads=HEADS))
    numbers = {"q_num_heads": HEADS, "kv_num_heads": groups}
    operands = [query, "k", "v"]
    if not flat:
        numbers = {}
        for index, (name, heads) in enumerate(zip(operands, sizes.values(), strict=True)):
            weights[f"s{name}"] = np.array([0, 0, heads, DIM])
            nodes.append(helper.make_node("Reshape", [name, f"s{name}"], [f"{name}4"]))
            nodes.append(helper.make_node("Transpose", [f"{name}4"], [f"{name}t"], perm=[0, 2, 1, 3]))
            operands[index] = f"{name}t"
    nodes.append(helper.make_node("Attention", [*operands, "mask", "pk", "pv"], ["a", "nk", "nv"], **numbers))
    result = "a"
    if not flat:
        weights["merge"] = np.array([0, 0, -1])
        nodes.append(helper.make_node("Transpose", ["a"], ["at"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", ["at", "merge"], [result := "am"]))
    nodes.append(helper.make_node("MatMul", [result, "wo"], ["y"]))
    shapes = {"x": [BATCH, TOKENS, WIDTH], "mask": [BATCH, HEADS if per_head else 1, TOKENS, PAST + TOKENS]}
    shapes |= {name: [BATCH, groups, PAST, DIM] for name in ("pk", "pv")}
    kinds = {"mask": kind}
    inputs = [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s) for n, s in shapes.items()]
    names = ["y", "nk", "nv", *(["q"] if extra else [])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    held = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def feeds(model):
    seen = RNG.random((BATCH, 1, TOKENS, PAST + TOKENS)) < 0.6
    seen[0, 0, 1] = False
    given = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    result = {name: RNG.standard_normal(shape, dtype=np.float32) for name, shape in given.items()}
    seen = np.broadcast_to(seen, given["mask"]).copy()
    is_bool = model.graph.input[1].type.tensor_type.elem_type == BOOL
    result["mask"] = seen if is_bool else np.where(seen, result["mask"], np.finfo(np.float32).min)
    return result


def run(model, given):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, given)


@pytest.mark.parametrize(
    ("grouped", "form", "rows"),
    [
        (True, {}, True),
        (True, {"bias": True}, True),
        (True, {"rotary": True}, True),
        (True, {"bias": True, "rotary": True, "kind": TensorProto.FLOAT}, True),
        (True, {"flat": False}, True),
        (True, {"flat": False, "extra": True}, True),
        (False, {"extra": True}, True),
        (False, {"per_head": True}, True),
        (False, {"groups": HEADS}, True),
        (False, {}, False),
    ],
)
def test_results_stay_and_heads_are_grouped_where_the_form_is_there(grouped, form, rows):
    model = attention(**form)
    given, changed = feeds(model), ir.from_proto(model)
    expected = run(model, given)
    GroupQueriesPass(rows)(changed)
    proto = ir.to_proto(changed)
    onnx.checker.check_model(proto, full_check=True)
    for before, after in zip(expected, run(proto, given), strict=True):
        assert np.isfinite(after).all()
        np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    node = next(node for node in proto.graph.node if node.op_type == "Attention")
    assert ("Reshape" in {n.op_type for n in proto.graph.node if node.input[0] in n.output}) == grouped
    counts = {a.name: a.i for a in node.attribute}
    assert counts.get("q_num_heads", GROUPS) == (GROUPS if grouped else HEADS)


def test_the_mask_is_made_once_for_all_layers():
    model = attention()
    merged = onnx.compose.merge_models(model, onnx.compose.add_prefix(model, "second."), io_map=[("y", "second.x")])
    for node in merged.graph.node:
        node.input[:] = ["mask" if name == "second.mask" else name for name in node.input]
    del merged.graph.input[[i.name for i in merged.graph.input].index("second.mask")]
    changed = ir.from_proto(onnx.shape_inference.infer_shapes(merged, data_prop=True))
    GroupQueriesPass()(changed)
    assert len({node.inputs[3].name for node in changed.graph if node.op_type == "Attention"}) == 1
    assert sum(node.op_type == "Where" for node in changed.graph) == 1


def test_a_node_that_nothing_uses_is_refused_and_so_is_a_graph_without_attention():
    changed = ir.from_proto(attention())
    changed.graph.append(ir.node("Neg", [changed.graph.inputs[0]], name="unused"))
    with pytest.raises(ir.passes.PreconditionError):
        GroupQueriesPass()(changed)
    changed.opset_imports[""] = 22
    for step in (FoldKVPass(), FusePass()):
        with pytest.raises(ir.passes.PreconditionError):
            step(changed)
