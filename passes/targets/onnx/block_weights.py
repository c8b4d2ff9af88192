"""block_weights: store weights in blocks of 8 or 4 bits: those of products, and the embedding.

``BlockWeightsPass`` rounds products with weights to MatMulNBits with ONNX Runtime's own quantiser, one weight at a
time. That quantiser leaves the embedding in float32, so ``LookUpInBlocksPass`` rounds it with NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mptk.compat.onnxruntime import ACCURACY_LEVEL, import_matmul_quantizer
from mptk.progress import step_through
from passes.targets.onnx.equalize import get_product_weight
from passes.targets.onnx.plain_products import (
    add_constant,
    find_logit_products,
    find_weight_products,
    is_token_lookup,
    put,
)
from passes.targets.onnx.tensors import (
    Array,
    Spill,
    get_constant_tensor,
    make_lazy_tensor,
    read_tensor_shape,
    slice_in_parts,
)

BLOCK = 32
"""Inputs that share a scale in 4 bits. More of them would be too coarse."""
WIDE_BLOCK, LEAST_BLOCK = 128, 16
"""Inputs that share a scale in 8 bits: ``WIDE_BLOCK``, the fastest block even if the last one is padded. Fewer inputs
get the least power of two that holds them, but at least ``LEAST_BLOCK``, the kernel's minimum."""

ZERO_POINT = 128
"""The zero point of 8-bit symmetric weights: MatMulNBits' codes are unsigned."""


@dataclass(frozen=True)
class BlockWeightsPass(ir.passes.InPlacePass):
    """Round the weights of products to blocks of 8 or 4 bits. With 4, the output projection has 8.

    ``source``: the file of the graph. Rounded weights wait in a temporary file beside it. ``numbers``: False if only
    the graph's structure counts; then no weight is rounded, and the constants are zeros.
    """

    bits: Literal[8, 4]
    source: Path
    numbers: bool = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        formats, spill = self._choose_formats(model), Spill(self.source.parent)
        nodes = {str(node.name): node for node in model.graph if node.name in formats}
        order = sorted(formats.items(), key=lambda item: item[1])
        for name, (bits, block) in step_through(order, f"weights in {self.bits}-bit blocks"):
            names = [f"Q{bits}", "scales", "zero_points"]
            if self.numbers:
                kept: list[ir.TensorProtocol] = [
                    *map(spill.keep, round_to_blocks(get_product_weight(nodes[name]), bits, block))
                ]
            else:
                kept = make_zero_blocks(read_tensor_shape(get_constant_tensor(nodes[name].inputs[1])), bits, block)
            set_blocks(model.graph, nodes[name], bits, block, dict(zip(names, kept, strict=False)))
        return ir.passes.PassResult(model, bool(formats))

    def ensures(self, model: ir.Model) -> None:
        """No product has a float weight."""
        left = sorted(find_weight_products(model))
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} has a float weight")

    def _choose_formats(self, model: ir.Model) -> dict[str, tuple[int, int]]:
        """Bits and block size by product."""
        head = find_logit_products(model)
        return {
            name: choose_format(self.bits, read_tensor_shape(weight)[0], name in head)
            for name, weight in find_weight_products(model).items()
        }


def choose_format(bits: Literal[8, 4], inputs: int, logits: bool) -> tuple[int, int]:
    """Bits and block size of a product of ``inputs`` inputs. ``logits``: whether it gives the logits."""
    # The embedding shares the codes of the output projection (``LookUpInBlocksPass``), and 4 bits are too few for it.
    if bits == 4 and not logits:
        return 4, BLOCK
    return 8, max(LEAST_BLOCK, min(WIDE_BLOCK, 1 << (inputs - 1).bit_length()))


def round_to_blocks(weight: Array, bits: int, block: int) -> list[Array]:
    """Codes [outputs, blocks, bytes], scales [outputs, blocks] and, for 4 bits, zero points [outputs, bytes].

    ``weight``: [inputs, outputs]. Each output is rounded by itself.
    """
    ort = import_matmul_quantizer()
    symmetric = bits == 8
    config = ort.DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=symmetric, accuracy_level=ACCURACY_LEVEL, bits=bits
    )
    quantizer = ort.DefaultWeightOnlyQuantizer(config)
    done = [
        quantizer.qbits_block_quant(np.ascontiguousarray(weight[:, outputs]))
        for outputs in slice_in_parts(weight.shape, 1)
    ]
    return [np.concatenate(arrays) for arrays in zip(*done, strict=True)][: 2 if symmetric else 3]


def make_zero_blocks(shape: Sequence[int], bits: int, block: int) -> list[ir.TensorProtocol]:
    """The constants of ``round_to_blocks``, of zeros that take no memory before they are read."""
    (inputs, outputs), packed = shape, 8 // bits
    blocks = -(-inputs // block)
    codes = make_lazy_zeros(ir.DataType.UINT8, outputs, blocks, block // packed)
    if bits == 8:
        return [codes, make_lazy_zeros(ir.DataType.FLOAT, outputs, blocks)]
    flat = (
        make_lazy_zeros(ir.DataType.FLOAT, outputs * blocks),
        make_lazy_zeros(ir.DataType.UINT8, outputs * -(-blocks // packed)),
    )
    return [codes, *flat]


def make_lazy_zeros(kind: ir.DataType, *shape: int) -> ir.LazyTensor:
    """A constant of zeros, made when it is read."""
    return ir.LazyTensor(lambda: ir.Tensor(np.zeros(shape, kind.numpy())), kind, ir.Shape(shape))


def set_blocks(
    graph: ir.Graph, product: ir.Node, bits: int, block: int, tensors: Mapping[str, ir.TensorProtocol]
) -> None:
    """Replace the weight of ``product`` by blocks of ``block`` inputs.

    ``tensors``: an ending of the constant's name → the constant. In order: ``Q8`` or ``Q4`` uint8 [outputs, blocks,
    bytes], ``scales`` and, if the zero is not the middle code, ``zero_points``, both flat.
    """
    weight = product.inputs[1]
    assert weight is not None
    inputs, outputs = read_tensor_shape(get_constant_tensor(weight))
    sizes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": ACCURACY_LEVEL}
    product.op_type, product.domain = "MatMulNBits", "com.microsoft"
    product.attributes.update({name: ir.AttrInt64(name, size) for name, size in sizes.items()})
    product.resize_inputs(1 + len(tensors))
    for index, (ending, tensor) in enumerate(tensors.items(), 1):
        name = f"{weight.name}_{ending}"  # there already if two products share the weight
        product.replace_input_with(index, graph.initializers.get(name) or add_constant(graph, name, tensor))
    graph.opset_imports.setdefault("com.microsoft", 1)


@dataclass(frozen=True)
class LookUpInBlocksPass(ir.passes.InPlacePass):
    """Look the embedding up in 8-bit blocks: the output projection's, if that is its transpose.

    Then the table is stored once. ``source``, ``numbers``: see ``BlockWeightsPass``, which must run before.
    """

    source: Path
    numbers: bool = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [node for node in graph if is_token_lookup(graph, node)]
        for node in found:
            spill = Spill(self.source.parent) if self.numbers else None
            blocks, scales = _make_table_blocks(graph, node.inputs[0], spill)  # type: ignore[arg-type]
            _look_up(graph, node, blocks, scales)
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No float table is looked up by token ids."""
        left = [n.name for n in model.graph if is_token_lookup(model.graph, n)]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} looks up a float table")


def _make_table_blocks(graph: ir.Graph, table: ir.Value, spill: Spill | None) -> tuple[ir.Value, ir.Value]:
    """A table [rows, width] as uint8 [rows, blocks, block] and float32 [rows, blocks, 1]; without a ``spill`` zeros."""
    # If the output projection is this table, ``PlainProductsPass`` made the weight ``….T`` of it.
    blocks = graph.initializers.get(f"{table.name}.T_Q8")
    if blocks is not None:
        # The projection has its scales as [rows, blocks]. Beside the table's codes they need a last axis.
        shared = get_constant_tensor(graph.initializers[f"{table.name}.T_scales"])
        shape = (*read_tensor_shape(get_constant_tensor(blocks))[:2], 1)
        scales: ir.TensorProtocol = make_lazy_tensor(shared, lambda: shared.numpy().reshape(shape), shape)
    elif spill is None:
        rows, width = read_tensor_shape(get_constant_tensor(table))
        count = -(-width // BLOCK)
        blocks = add_constant(graph, f"{table.name}_Q8", make_lazy_zeros(ir.DataType.UINT8, rows, count, BLOCK))
        scales = make_lazy_zeros(ir.DataType.FLOAT, rows, count, 1)
    else:
        codes, found = quantize_rows(get_constant_tensor(table).numpy())
        blocks, scales = add_constant(graph, f"{table.name}_Q8", spill.keep(codes)), spill.keep(found)
    return blocks, add_constant(graph, f"{table.name}_row_scales", scales)


def quantize_rows(table: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Round each row to 8-bit symmetric blocks: uint8 [rows, blocks, block] and scales float32 [rows, blocks, 1].

    The last block is padded with zeros.
    """
    done = [_quantize_table(table[rows]) for rows in slice_in_parts(table.shape)]
    codes, scales = (np.concatenate(arrays) for arrays in zip(*done, strict=True))
    return codes, scales


def _quantize_table(table: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    # Codes 1 to 255 for −127 to 127 steps. The least scale is not 0, so a block of zeros divides by no zero.
    rows, width = table.shape
    padded = np.pad(table, ((0, 0), (0, -width % BLOCK))).reshape(rows, -1, BLOCK)
    scales = np.maximum(np.abs(padded).max(axis=2, keepdims=True) / (ZERO_POINT - 1), np.finfo(np.float32).tiny)
    return (np.rint(padded / scales) + ZERO_POINT).astype(np.uint8), scales.astype(np.float32)


def _look_up(graph: ir.Graph, gather: ir.Node, blocks: ir.Value, scales: ir.Value) -> None:
    """Replace ``gather`` by ``reshape((Gather(blocks) − ZERO) · Gather(scales))[..., :width]``."""
    ids, result = gather.inputs[1], gather.outputs[0]
    assert result.shape is not None
    width = int(result.shape[-1])  # type: ignore[arg-type]
    zero = add_constant(graph, "embedding_zero", ir.tensor(np.array(ZERO_POINT, dtype=np.float32)))
    merge = add_constant(graph, "embedding_merge", ir.tensor(np.array([0, 0, -1], dtype=np.int64)))
    # Only the rows of the given ids are unpacked.
    steps = ir.tape.Tape()
    looked = steps.op("Cast", [steps.op("Gather", [blocks, ids])], {"to": ir.DataType.FLOAT})
    scaled = steps.op("Mul", [steps.op("Sub", [looked, zero]), steps.op("Gather", [scales, ids])])
    merged = steps.op("Reshape", [scaled, merge])
    if blocks.shape is not None and int(blocks.shape[1]) * int(blocks.shape[2]) != width:  # type: ignore[arg-type]
        # The last block is padded.
        bounds = [
            add_constant(graph, f"embedding_{name}", ir.tensor(np.array([value], dtype=np.int64)))
            for name, value in (("from", 0), ("to", width), ("axis", -1))
        ]
        merged = steps.op("Slice", [merged, *bounds])
    put(graph, gather, steps, merged)
