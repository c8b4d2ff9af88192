"""quantize_onnx: an ONNX decoder in float32 → the same decoder with smaller numbers, beside it.

| scheme | weights of products | kernel |
|---|---|---|
| ``int8`` | 8 bits, a scale a block of 128 inputs | MatMulNBits, activations in blocks, too |
| ``int4`` | 4 bits, a scale and a zero point a block of 32; the output projection 8 bits | MatMulNBits, alike |
| ``fp16`` | float16, and so the KV cache | float16 where there is one; rotary angles stay float32 |

The numbers are those of ONNX Runtime's own quantiser, but for ``int4`` with a text (``gptq.py``). It leaves
two things in float32 that are the larger part of a small model, and which are quantised here: an output projection that
is the transposed embedding, and the embedding. It is looked up in the output projection's blocks where both are one
table, so that the table is stored once.

ONNX Runtime's dynamic int8 (one scale for a whole tensor of activations) is not among them: padding changes its logits,
and it cost SmolLM2-135M two thirds of its perplexity (``docs/onnx.md``).
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxruntime.transformers.float16 import convert_float_to_float16

from mptk.compat.onnxruntime import matmul_quantizer
from mptk.errors import MptkError
from mptk.files import write_together
from passes.targets.onnx.balance import balance_onnx
from passes.targets.onnx.gptq import ACCURACY_LEVEL, gptq_onnx
from passes.targets.onnx.measure import Text
from passes.targets.onnx.smooth import smooth_onnx

BLOCK = 32
"""Inputs that share a scale in ``int4``, where each is too coarse for more."""

WIDE, LEAST = 128, 16
"""Inputs that share a scale in ``int8``: ``WIDE``, which is the fastest even where the last block is padded, or, where
there are fewer, the least power of two that holds them; the kernel takes none below ``LEAST``."""

BLOCKS = {"int8": 32, "int4": BLOCK}
"""What the sums of products in a quantised graph should be multiples of. A remainder of ``WIDE`` is padded: 928
channels still take less time than 1024, and steps of 128 would leave most budgets without legal widths."""

ZERO = 128
"""What 8-bit symmetric weights are stored above."""


def quantize_onnx(source: Path, scheme: str, text: Text | None = None) -> Path:
    """Write ``model_SCHEME.onnx`` and its weights beside ``source``, a ``model.onnx`` of ``emit_onnx``; returns it.

    Inputs and outputs keep their names and shapes; only with ``fp16`` is the KV cache of another type.

    Args:
        text: token ids [windows, length] that ``int4`` rounds for; each weight is rounded by itself if there are none.

    Raises:
        MptkError: there is no such scheme.
    """
    check_schemes([scheme])
    model = read_float(source)
    with _quiet():
        quantized = SCHEMES[scheme](model, source, text)
    quantized.graph.sort()
    quantized.metadata_props.update({**model.metadata_props, "quantization": scheme})
    return _save(quantized, source.with_name(f"{source.stem}_{scheme}.onnx"))


def read_float(source: Path) -> ir.Model:
    """The model in ``source`` with weights in memory and a name for every node."""
    model = common.ClearMetadataAndDocStringPass()(ir.load(source)).model
    ir.external_data.load_to_model(model)
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
    return model


def check_schemes(names: Iterable[str]) -> None:
    """Raise MptkError for a name that is none of ``SCHEMES``."""
    for name in names:
        if name not in SCHEMES:
            raise MptkError(f"no scheme {name!r} to quantise by; choose one of {', '.join(SCHEMES)}")


def plain_products(model: ir.Model) -> None:
    """Every product with a weight becomes ``MatMul(x, weight [inputs, outputs])``: quantisers look at nothing else.

    1. ``Transpose(weight)`` becomes a weight. 2. ``Gemm(x, weight, bias)`` becomes ``MatMul`` and ``Add``.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Transpose" and _is_constant(node.inputs[0]):
            folded = _transposed(graph, node.inputs[0])  # type: ignore[arg-type]
            ir.convenience.replace_all_uses_with(node.outputs[0], folded)
            graph.remove(node, safe=True)
        elif node.op_type == "Gemm" and _is_constant(node.inputs[1]):
            _split_gemm(graph, node)
    common.RemoveUnusedNodesPass()(model)


def _split_gemm(graph: ir.Graph, gemm: ir.Node) -> None:
    settings = {name: attribute.value for name, attribute in gemm.attributes.items()}
    if settings.get("transA", 0) or settings.get("alpha", 1.0) != 1 or settings.get("beta", 1.0) != 1:
        return
    data, weight, *bias = gemm.inputs
    steps = ir.tape.Tape()
    result = steps.op("MatMul", [data, _transposed(graph, weight) if settings.get("transB", 0) else weight])  # type: ignore[arg-type]
    if bias and bias[0] is not None:
        result.shape, result.type = gemm.outputs[0].shape, gemm.outputs[0].type
        result = steps.op("Add", [result, bias[0]])
    _put(graph, gemm, steps, result)


def _put(graph: ir.Graph, old: ir.Node, steps: ir.tape.Tape, result: ir.Value) -> None:
    """``steps``, of which ``result`` comes, in place of ``old``."""
    graph.insert_before(old, steps.nodes)
    result.shape, result.type = old.outputs[0].shape, old.outputs[0].type
    ir.convenience.replace_all_uses_with(old.outputs[0], result)
    graph.remove(old, safe=True)


def _transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """The transpose of a matrix as a weight of its own, once."""
    name = f"{weight.name}.T"
    if name in graph.initializers:
        return graph.initializers[name]
    assert weight.const_value is not None
    return _constant(graph, name, np.ascontiguousarray(weight.const_value.numpy().T))


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.shape.rank() == 2


# ---- the schemes ----


def _int8(model: ir.Model, source: Path, _text: Text | None) -> ir.Model:
    products, _ = evened(model, source)
    blocks = {n: min(WIDE, 1 << (weight.shape[0] - 1).bit_length()) for n, weight in products.items()}
    return _blocks(model, {name: (8, max(LEAST, block)) for name, block in blocks.items()})


def _int4(model: ir.Model, source: Path, text: Text | None) -> ir.Model:
    products, head = evened(model, source)
    if text is not None:
        with tempfile.TemporaryDirectory(dir=source.parent, prefix=".onnx-") as temporary:
            file = Path(temporary) / source.name
            ir.save(model, file, external_data=f"{file.name}.data")
            gptq_onnx(model, file, products.keys() - head, BLOCK, text)
        common.RemoveUnusedNodesPass()(model)
    return _blocks(model, {name: (8 if name in head else 4, BLOCK) for name in _products(model)})


def evened(model: ir.Model, source: Path) -> tuple[dict[str, npt.NDArray[np.float32]], set[str]]:
    """Even out channels before they are rounded, in place. Returns the products' weights and which give logits.

    ``model`` is what ``read_float`` gave of ``source``.
    """
    plain_products(model)
    vocabulary = model.graph.outputs[0].shape
    head = {n for n, weight in _products(model).items() if vocabulary and weight.shape[1] == vocabulary[-1]}
    smooth_onnx(model, source, without=head)
    balance_onnx(model)
    common.RemoveUnusedNodesPass()(model)
    return _products(model), head


def _float16(model: ir.Model, source: Path, _text: Text | None) -> ir.Model:
    """All but what the rotary angles are computed from: a position above 2048 is no float16."""
    angles = _ancestors([node for node in model.graph if node.op_type in ("Cos", "Sin")])
    proto = convert_float_to_float16(
        ir.to_proto(model), keep_io_types=["logits"], node_block_list=[node.name for node in angles]
    )
    converted: ir.Model = ir.from_proto(proto)
    return converted


SCHEMES: dict[str, Callable[[ir.Model, Path, Text | None], ir.Model]] = {
    "int8": _int8,
    "int4": _int4,
    "fp16": _float16,
}


# ---- weight-only ----


def _products(model: ir.Model) -> dict[str, npt.NDArray[np.float32]]:
    """Names of the products with a weight → the weight, [inputs, outputs]."""
    constants = {
        node.name: node.inputs[1].const_value.numpy()
        for node in model.graph
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].const_value is not None
    }
    return {str(name): array for name, array in constants.items() if array.ndim == 2}


def _blocks(model: ir.Model, formats: dict[str, tuple[int, int]]) -> ir.Model:
    """MatMulNBits by ONNX Runtime's quantiser, which takes one (bits, block) a call. ``formats``: by product."""
    proto, ort = ir.to_proto(model), matmul_quantizer()
    for bits, block in sorted(set(formats.values())):
        config = ort.DefaultWeightOnlyQuantConfig(
            block_size=block, is_symmetric=bits == 8, accuracy_level=ACCURACY_LEVEL, bits=bits
        )
        others = [name for name, other in formats.items() if other != (bits, block)]
        quantizer = ort.MatMulNBitsQuantizer(proto, nodes_to_exclude=others, algo_config=config)
        quantizer.process()
        proto = quantizer.model.model
    quantized = ir.from_proto(proto)
    _lookup_in_blocks(quantized)
    return quantized


def _lookup_in_blocks(model: ir.Model) -> None:
    """The embedding's lookup, in 8-bit blocks: those of the output projection if that is its transpose."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Gather" and _is_constant(node.inputs[0]) and node.inputs[1] is graph.inputs[0]:
            blocks, scales = _blocks_of(graph, node.inputs[0])  # type: ignore[arg-type]
            _look_up(graph, node, blocks, scales)
    common.RemoveUnusedNodesPass()(model)


def _blocks_of(graph: ir.Graph, table: ir.Value) -> tuple[ir.Value, ir.Value]:
    """A table [rows, width] as uint8 [rows, blocks, block] and float32 [rows, blocks, 1]."""
    assert table.const_value is not None
    rows = int(table.const_value.shape[0])  # type: ignore[arg-type]
    shared = graph.initializers.get(f"{table.name}.T_Q8")
    if shared is not None and shared.const_value is not None:
        blocks = shared
        scale = graph.initializers[f"{table.name}.T_scales"].const_value
        assert scale is not None
        scales = scale.numpy().reshape(rows, -1, 1)
    else:
        array, scales = quantize_rows(table.const_value.numpy())
        blocks = _constant(graph, f"{table.name}_Q8", array)
    return blocks, _constant(graph, f"{table.name}_row_scales", scales)


def quantize_rows(table: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """8-bit symmetric blocks of each row, rounded to nearest: uint8 [rows, blocks, block] and scales [.., 1].

    The last block is padded with zeros.
    """
    rows, width = table.shape
    padded = np.pad(table, ((0, 0), (0, -width % BLOCK))).reshape(rows, -1, BLOCK)
    scales = np.maximum(np.abs(padded).max(axis=2, keepdims=True) / (ZERO - 1), np.finfo(np.float32).tiny)
    return (np.rint(padded / scales) + ZERO).astype(np.uint8), scales.astype(np.float32)


def _look_up(graph: ir.Graph, gather: ir.Node, blocks: ir.Value, scales: ir.Value) -> None:
    """``reshape((Gather(blocks) − ZERO) · Gather(scales))[..., :width]`` in place of ``gather``."""
    ids, result = gather.inputs[1], gather.outputs[0]
    assert result.shape is not None
    width = int(result.shape[-1])  # type: ignore[arg-type]
    zero = _constant(graph, "embedding_zero", np.array(ZERO, dtype=np.float32))
    merge = _constant(graph, "embedding_merge", np.array([0, 0, -1], dtype=np.int64))
    steps = ir.tape.Tape()
    looked = steps.op("Cast", [steps.op("Gather", [blocks, ids])], {"to": ir.DataType.FLOAT})
    scaled = steps.op("Mul", [steps.op("Sub", [looked, zero]), steps.op("Gather", [scales, ids])])
    merged = steps.op("Reshape", [scaled, merge])
    if blocks.shape is not None and int(blocks.shape[1]) * int(blocks.shape[2]) != width:  # type: ignore[arg-type]
        bounds = [
            _constant(graph, f"embedding_{name}", np.array([value], dtype=np.int64))
            for name, value in (("from", 0), ("to", width), ("axis", -1))
        ]
        merged = steps.op("Slice", [merged, *bounds])
    _put(graph, gather, steps, merged)


def _constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name), shape=ir.Shape(array.shape))
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(value)
    return value


def _ancestors(nodes: list[ir.Node]) -> list[ir.Node]:
    found: dict[ir.Node, None] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting += [p for value in node.inputs if value is not None and (p := value.producer()) is not None]
    return list(found)


def _save(model: ir.Model, file: Path) -> Path:
    """Under its name only when complete and accepted by ``onnx.checker``."""
    data = f"{file.name}.data"
    with write_together(file.parent, data, file.name) as temporary:
        ir.save(model, temporary / file.name, external_data=data)
        onnx.checker.check_model(temporary / file.name)
    return file


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's quantisers log every node."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
