"""Damage to an ONNX graph on disk: to a constant, or to what flows in and out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import NodeProto, numpy_helper

from passes.targets.onnx.names import name_data_file

Damage = Callable[[np.ndarray], np.ndarray]


def damaged(file: Path, ending: str, damage: Damage) -> Path:
    """The graph with one constant, whose name has ``ending``, damaged."""
    model = ir.load(file)
    ir.external_data.load_to_model(model)
    name = next(n for n in model.graph.initializers if n.endswith(ending))
    value = model.graph.initializers[name]
    array = damage(value.const_value.numpy())
    assert array.shape == tuple(value.const_value.shape.numpy())
    value.const_value = ir.Tensor(np.ascontiguousarray(array), name=name)
    ir.save(model, file, external_data=name_data_file(file.name))
    return file


def garbage_block(codes: np.ndarray) -> np.ndarray:
    """The first block of one output holds noise."""
    codes = codes.copy()
    codes[3, 0] = np.random.default_rng(0).integers(0, 256, codes[3, 0].shape)
    return codes


def one_code(codes: np.ndarray) -> np.ndarray:
    """One code is one off: one byte of a file."""
    codes = codes.copy()
    codes[3, 0, 5] ^= 1
    return codes


# ---- what flows in and out ----

NODE = re.compile(r"(\S+) = (\w+)(?:<(\w+)=(\d+)>)?\((.*)\)")


def rewired(file: Path, value: str, *lines: str) -> Path:
    """The graph with an input or an output replaced by ``damaged``, which the lines compute, as ``a = Add(b, 1.0)``.

    The lines may use every input, and the output as it was.
    """
    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    if value in {each.name for each in graph.input}:
        for node in graph.node:
            node.input[:] = ["damaged" if name == value else name for name in node.input]
        made = [node for line in lines for node in _nodes(line)]
        others = list(graph.node)
        del graph.node[:]
        graph.node.extend([*made, *others])
    else:
        for node in graph.node:
            node.output[:] = ["sound" if name == value else name for name in node.output]
            node.input[:] = ["sound" if name == value else name for name in node.input]
        lines = tuple(re.sub(rf"(?<=[(\s]){re.escape(value)}(?=[,)])", "sound", line) for line in lines)
        graph.node.extend(node for line in lines for node in _nodes(line))
        graph.node.extend([onnx.helper.make_node("Identity", ["damaged"], [value])])
    onnx.save(model, file)
    return file


def exchanged(file: Path, one: str, other: str) -> Path:
    """The graph with two outputs of one shape in each other's place."""
    model = onnx.load(file, load_external_data=False)
    names = {one: other, other: one}
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, file)
    return file


def _nodes(line: str) -> list[NodeProto]:
    """The node that a line writes, and its constants: whole numbers, lists of these, floats."""
    found = NODE.fullmatch(line)
    assert found is not None, line
    output, kind, attribute, value, given = found.groups()
    names, made = [], []
    for i, text in enumerate(re.findall(r"\[[^\]]*\]|[^,\s]+", given)):
        if re.fullmatch(r"-?[\d.]+|\[.*\]", text):
            array = np.array(eval(text))  # noqa: S307
            array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
            names.append(f"{output}.{i}")
            made.append(onnx.helper.make_node("Constant", [], [names[-1]], value=numpy_helper.from_array(array)))
        else:
            names.append(text)
    attributes = {} if attribute is None else {attribute: int(value)}
    return [*made, onnx.helper.make_node(kind, names, [output], **attributes)]
