"""unaligned: what a width costs that is no multiple of the kernels' block (``ir/alignment.py``), in matrix products."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from mptk.ir.alignment import KERNEL_BLOCK
from mptk.ort.sessions import CPU, open_session


@dataclass(frozen=True)
class Unaligned:
    """A product of float32 inputs [rows, inputs] with a weight [inputs, outputs] of a graph.

    ``ms``: milliseconds at these widths; ``aligned_ms``: at the next multiples of the block.
    """

    graph: str
    rows: int
    inputs: int
    outputs: int
    ms: float
    aligned_ms: float

    @property
    def aligned(self) -> tuple[int, int]:
        """The next aligned widths."""
        return round_up(self.inputs), round_up(self.outputs)


def round_up(width: int) -> int:
    """The next multiple of the kernels' block."""
    return -(-width // KERNEL_BLOCK) * KERNEL_BLOCK


def list_unaligned_weights(file: Path) -> list[tuple[int, int]]:
    """The sizes [inputs, outputs] of the float weights in a graph of which one is not aligned, each once."""
    graph = onnx.load(file, load_external_data=False).graph
    sizes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    found = {sizes[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in sizes}
    return sorted(size for size in found if len(size) == 2 and any(width != round_up(width) for width in size))


def build_matrix_product(
    rows: int, inputs: int, outputs: int, threads: int, device: torch.device = CPU
) -> Callable[[], object]:
    """A call that multiplies [rows, inputs] with a constant weight [inputs, outputs] in ONNX Runtime."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inputs])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, outputs])
    weight = numpy_helper.from_array(np.ones((inputs, outputs), dtype=np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", [given], [result], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = open_session(bytes(model.SerializeToString()), device, threads=threads)
    feeds = {"x": np.ones((rows, inputs), dtype=np.float32)}
    return lambda: session.run(None, feeds)


def time_unaligned(
    name: str,
    file: Path,
    rows: Sequence[int],
    threads: int,
    device: torch.device,
    alternate: Callable[[list[Callable[[], object]]], list[list[float]]],
) -> list[Unaligned]:
    """Time each unaligned weight of the graph ``name`` beside the aligned one.

    ``rows``: the numbers of tokens. ``alternate`` gives milliseconds of each step in each round.
    """
    found = []
    for inputs, outputs in list_unaligned_weights(file):
        for count in rows:
            sizes = ((inputs, outputs), (round_up(inputs), round_up(outputs)))
            own, aligned = alternate([build_matrix_product(count, *size, threads, device) for size in sizes])
            ms, aligned_ms = (round(statistics.median(each), 4) for each in (own, aligned))
            found.append(Unaligned(name, count, inputs, outputs, ms, aligned_ms))
    return found
