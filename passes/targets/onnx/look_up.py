"""look_up: store the embedding in 8-bit blocks. If the output projection is the same table, share its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes.targets.onnx.block_weights import BLOCK, ZERO_POINT, make_lazy_zeros
from passes.targets.onnx.plain_products import add_constant, is_token_lookup, put
from passes.targets.onnx.tensors import Spill, get_constant_tensor, make_lazy_tensor, read_tensor_shape, slice_in_parts


@dataclass(frozen=True)
class LookUpInBlocksPass(ir.passes.InPlacePass):
    """Look the embedding up in 8-bit blocks: the output projection's, if that is its transpose.

    ``source``: the file of the graph. The rounded table waits in a temporary file beside it. ``numbers``: as of
    ``BlockWeightsPass``.
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
    blocks = graph.initializers.get(f"{table.name}.T_Q8")
    if blocks is not None:
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
    steps = ir.tape.Tape()
    looked = steps.op("Cast", [steps.op("Gather", [blocks, ids])], {"to": ir.DataType.FLOAT})
    scaled = steps.op("Mul", [steps.op("Sub", [looked, zero]), steps.op("Gather", [scales, ids])])
    merged = steps.op("Reshape", [scaled, merge])
    if blocks.shape is not None and int(blocks.shape[1]) * int(blocks.shape[2]) != width:  # type: ignore[arg-type]
        bounds = [
            add_constant(graph, f"embedding_{name}", ir.tensor(np.array([value], dtype=np.int64)))
            for name, value in (("from", 0), ("to", width), ("axis", -1))
        ]
        merged = steps.op("Slice", [merged, *bounds])
    put(graph, gather, steps, merged)
