"""roofline: what a run of an ONNX graph must do at least, and the machine's peaks (Williams et al. 2009)."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from mptk.errors import AnalysisError
from mptk.ort.decoder import PAST_KEYS
from mptk.ort.sessions import CPU, open_session
from mptk.ort.steps import PHASES, Case, choose_axis_sizes, find_phase_graphs, measure_shapes, open_stepper

SIDE = 1024
"""Side of the matrices. Three of them take 12 MB, which a cache holds, so the product is bound by compute."""
READ_BYTES = 512 << 20
"""Bytes of one read: far more than a cache holds, so it is bound by memory."""


@dataclass(frozen=True)
class Peaks:
    """``flops``: operations a second of a float32 matrix product. ``bandwidth``: bytes read from memory a second."""

    flops: float
    bandwidth: float


class Roofline:
    """The highest peaks of all calls of ``measure``, with ``threads`` threads (0: one for each core), on ``device``.

    ONNX Runtime computes the product, since it runs the graphs; torch sums over the memory.
    """

    def __init__(self, threads: int, device: torch.device = CPU) -> None:
        self.threads = threads
        session = open_session(_build_product(), device, threads=threads)
        feeds = dict.fromkeys(("left", "right"), np.ones((SIDE, SIDE), dtype=np.float32))
        self._multiply = lambda: session.run(None, feeds)
        self._memory = torch.ones(READ_BYTES // 4, device=device)
        self.peaks = Peaks(0.0, 0.0)
        self.measure()

    def measure(self) -> None:
        """Measure once more; takes a fraction of a second."""
        # ``item`` waits for a device.
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            bandwidth = READ_BYTES / _time_run(lambda: self._memory.sum().item())
        finally:
            torch.set_num_threads(before)
        flops = 2 * SIDE**3 / _time_run(self._multiply)
        self.peaks = Peaks(max(self.peaks.flops, flops), max(self.peaks.bandwidth, bandwidth))


def measure_peak_memory(file: Path, length: int, device: torch.device = CPU) -> int:
    """Peak growth in bytes of a new process that runs ``file`` and the graphs of its model on ``device``, once each.

    A decoder runs a prompt of ``length`` tokens, another graph that many tokens if it reads any. A device's own memory
    is not counted.
    """
    return _call_apart(measure_growth, file, length, str(device))[0]


@dataclass(frozen=True)
class Growth:
    """Bytes by which a process grows: in all (``peak``), and what it still holds at the end (``held``)."""

    peak: int
    held: int


def measure_decode_memory(file: Path, context: int) -> Growth:
    """Growth of a new process that opens a decoder on the CPU and runs one step after ``context`` cached tokens.

    Linux only, else 0.
    """
    return Growth(*_call_apart(measure_decode_growth, file, context))


def _call_apart(function: Callable[..., Sequence[int]], file: Path, *arguments: object) -> list[int]:
    """What a function of this module gives for ``file`` in a new process."""
    # Not by ``multiprocessing``, which would import the caller's script again. The numbers are the last line that is
    # printed: libraries may print before.
    name, given = function.__name__, "".join(f", {each!r}" for each in arguments)
    code = f"import sys; from pathlib import Path; from {__name__} import {name}; "
    code += f"print(*{name}(Path(sys.argv[1]){given}))"
    command = [sys.executable, "-c", code, str(file.resolve())]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [int(number) for number in said.splitlines()[-1].split()]


def measure_decode_growth(file: Path, context: int) -> tuple[int, int]:
    """What ``measure_decode_memory`` says of a new process, of this one."""
    before = _read_resident("VmRSS")
    run = open_stepper(file, True, 1).step(Case("decode", context, 1, 1))
    run()
    return _read_resident("VmHWM") - before, _read_resident("VmRSS") - before


def measure_growth(file: Path, length: int, device: str) -> tuple[int]:
    """What ``measure_peak_memory`` says of a new process, of this one."""
    # Decode takes no more than a prefill of as many tokens.
    before = _read_resident("VmRSS")
    for phase, graph in find_phase_graphs(file).items():
        if phase != "decode":
            open_stepper(graph, phase in PHASES, 1, torch.device(device)).step(Case(phase, length, 1, 1))()
    return (_read_resident("VmHWM") - before,)


def _read_resident(field: str) -> int:
    """Resident memory of this process in bytes, now (``VmRSS``) or at its peak (``VmHWM``). Linux only, else 0."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def _time_run(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _build_product() -> bytes:
    names = ("left", "right", "product")
    left, right, product = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIDE, SIDE]) for name in names)
    graph = helper.make_graph([helper.make_node("MatMul", names[:2], names[2:])], "product", [left, right], [product])
    # An older opset and format, which any ONNX Runtime reads.
    opset = [helper.make_opsetid("", 21)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


PASS_THEIR_INPUT = {"Transpose", "Identity", "Cast"}
"""Operators through which a weight counts as read by what reads their result, not by them."""


@dataclass(frozen=True)
class StepWork:
    """One run's lower bounds.

    ``flops``: operations in products, convolutions, recurrent layers and attention, 2 for a multiply-add. Attention
    counts in full, since no runtime here skips the masked triangle. ``bytes``: weights and KV cache, read once. A table
    that is only looked up counts as 0; if it is also the output projection, it counts once.
    """

    flops: int
    bytes: int


def compute_graph_work(file: Path, *, sequence: int, past: int, batch: int = 1) -> StepWork:
    """Work of a decoder: ``sequence`` new tokens after ``past`` cached ones, for each of ``batch`` sequences.

    Sizes come from the graph's shapes at these lengths. So if a graph gives logits of the last position, only these
    count.
    """
    lengths = {
        "batch_size": batch,
        "sequence_length": sequence,
        "past_sequence_length": past,
        "total_sequence_length": past + sequence,
    }
    return _work(_set_lengths(onnx.load(file, load_external_data=False), lengths), {}, past + sequence)


COUNTED = ("Attention", "Conv", "GRU", "Gemm", "GroupQueryAttention", "LSTM", "MatMul", "MatMulNBits", "RNN")
"""Operators whose operations are counted."""


def run_work(file: Path, case: Case) -> StepWork:
    """Work of a run of a graph on made-up inputs. Sizes that it does not tell are those of a run."""
    # Shape inference tells most sizes. A run shows the others, of values around counted operators.
    model = _set_lengths(onnx.load(file, load_external_data=False), choose_axis_sizes(file, case))
    told, read = _list_shapes(model), (node for node in model.graph.node if node.op_type in COUNTED)
    values = dict.fromkeys(name for node in read for name in (*node.input, *node.output) if name)
    found = measure_shapes(file, [name for name in values if 0 in told.get(name, (0,))], case)
    for node in [node for node in model.graph.node if 0 in found.get((*node.output, "")[0], ())]:
        model.graph.node.remove(node)  # its result is empty, so it has nothing to compute
    return _work(model, found, None)


def _work(model: ModelProto, more: Mapping[str, Sequence[int]], positions: int | None) -> StepWork:
    """``more``: shapes that the graph does not tell. ``positions``: that attention reads; None: by its keys' shape."""
    # Operations; then bytes, of the cache's inputs and of the weights.
    graph, shapes = model.graph, {**_list_shapes(model), **more}
    flops = sum(_count_flops(node, shapes, positions) for node in graph.node if node.op_type in COUNTED)
    cache = sum(
        math.prod(shapes[v.name]) * _count_bits(v.type.tensor_type.elem_type)
        for v in graph.input
        if v.name.startswith(PAST_KEYS)
    )
    return StepWork(flops, (cache + _count_weight_bits(model)) // 8)


def _list_shapes(model: ModelProto) -> dict[str, list[int]]:
    """Value of a graph → its shape; 0 for a size that the graph does not tell."""
    graph = model.graph
    shapes = {w.name: list(w.dims) for w in graph.initializer}
    return shapes | {v.name: _shape(v) for v in (*graph.input, *graph.value_info, *graph.output)}


def _set_lengths(model: ModelProto, lengths: Mapping[str, int]) -> ModelProto:
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in lengths:
                dim.dim_value = lengths[dim.dim_param]
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _count_flops(node: NodeProto, shapes: Mapping[str, Sequence[int]], positions: int | None) -> int:
    # 2 for a multiply-add, and for each number of the result as many of these as the sum is long.
    if node.op_type == "Attention":  # queries times keys, then shares times values
        read = positions or shapes[node.input[1]][-2]
        flops = 2 * read * (math.prod(shapes[node.input[0]]) + math.prod(shapes[node.output[0]]))
    elif node.op_type == "MatMulNBits":
        inputs, outputs = (next(a.i for a in node.attribute if a.name == name) for name in ("K", "N"))
        flops = 2 * inputs * outputs * math.prod(shapes[node.input[0]][:-1])
    elif node.op_type == "GroupQueryAttention":
        assert positions is not None  # a decoder's
        flops = 4 * positions * math.prod(shapes[node.output[0]])
    elif node.op_type == "Conv":
        flops = 2 * math.prod(shapes[node.input[1]][1:]) * math.prod(shapes[node.output[0]])
    elif node.op_type in ("LSTM", "GRU", "RNN"):
        weights = sum(math.prod(shapes[name]) for name in node.input[1:3])
        flops = 2 * weights * math.prod(shapes[node.input[0]][:2])
    else:  # MatMul, Gemm
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        flops = 2 * shapes[node.input[0]][0 if transposed else -1] * math.prod(shapes[node.output[0]])
    if not flops:
        raise AnalysisError(
            f"cannot count the operations of {node.name}: its shape is unknown; export the model again", name=node.name
        )
    return flops


def _count_weight_bits(model: ModelProto) -> int:
    """Bits of the initialisers that a node reads in full, directly or through a transpose or a cast."""
    graph = model.graph
    weights = {w.name: math.prod(w.dims) * _count_bits(w.data_type) for w in graph.initializer}
    behind = {node.output[0]: node.input[0] for node in graph.node if node.op_type in PASS_THEIR_INPUT}
    read: set[str] = set()
    for node in graph.node:
        if node.op_type not in PASS_THEIR_INPUT:  # of a table that is looked up, a run reads only some rows
            read.update(_find_origins(node.input[1:] if node.op_type == "Gather" else node.input, behind))
    return sum(size for name, size in weights.items() if name in read)


def _find_origins(names: Iterable[str], behind: Mapping[str, str]) -> Iterable[str]:
    for name in names:
        while name in behind:
            name = behind[name]
        yield name


def _shape(value: ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _count_bits(data_type: int) -> int:
    return ir.DataType(data_type).bitwidth
