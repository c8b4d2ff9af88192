"""operator_times: milliseconds of single ONNX Runtime operators on this machine, measured once and stored.

Each operator is timed in a small graph, in its form in a decoder. In decode, enough copies of the weights and of the
cached keys are cycled that every run misses the processor's cache, but no more than ``MOST_COPIES``. The copies also
evict the operators' other data from the nearer caches.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from mptk.compat.onnxruntime import ACCURACY_LEVEL
from mptk.files import format_json
from mptk.io import cache_dir, keep, read_kept
from mptk.plain import hash_text
from mptk.progress import Progress

Float32s = npt.NDArray[np.float32]
Constants = Mapping[str, npt.NDArray[np.float32] | npt.NDArray[np.uint8]]

MATMUL, BLOCK_MATMUL, ATTENTION, ELEMENTWISE = "MatMul", "MatMulNBits", "Attention", "Mul"
TIMED_OPSET, IR_VERSION = 23, 10
"""Attention is one operator since opset 23."""
GRAPHS_VERSION = 4
"""Raise it if an operator is timed in another form. Stored times are then measured again."""

COLD_BYTES = 256 << 20
"""Bytes that all copies of an operator read in a step of one row: many times the size of a large last-level cache. If
data is only a little larger, a part stays in the cache: 32 MiB of cache made a product over 64 MiB a quarter faster."""

LEAST_SESSIONS, MOST_SESSIONS = 2, 5
"""Sessions in which each operator is timed. They are far apart in time, so a disturbance seldom affects two."""

AGREE = 1.06
"""An operator is timed again while its times differ by more than this ratio. To open a session takes longer than to
time in it, and on a machine with more work than cores two sessions were 3 % apart (the median of 47 operators)."""

SECONDS = 0.08
"""Seconds for which a session repeats its runs."""

NEAR_BYTES = 24 << 20
"""Bytes that all copies of an element-wise operator read and write. They fit the last-level cache only."""

MOST_COPIES = 2048
"""Most copies of an operator, which may be tiny. A decoder has hundreds of operators. Among the 23,000 copies that fill
``COLD_BYTES``, a product of 32 columns in int4 took 2.6 times as long as among 2,048, and its session took 21 s to open
in place of 0.5."""


@dataclass(frozen=True, order=True)
class Operator:
    """One operator of batch 1 and its sizes. All but the weights of MatMulNBits are float32.

    ``MatMul``: (rows, k, n), [rows, k] · [k, n] with a constant right side. ``MatMulNBits``: (rows, k, n, bits, block),
    the same with weights of ``bits`` bits, of which ``block`` inputs share a scale. ``Attention``: (new tokens, cached
    tokens, query heads, KV heads, channels of a query, channels of a value). ``Mul``: (elements,).
    """

    kind: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.sizes))}"


Sweep = Callable[[Sequence[Operator], int, Progress], Mapping[Operator, float]]
"""(operators, threads, progress) → milliseconds of each."""


def find_operator_times(
    operators: Sequence[Operator], threads: int, progress: Progress, sweep: Sweep | None = None
) -> dict[Operator, float]:
    """Milliseconds of each operator, from the cache folder; missing ones are measured on this machine.

    Args:
        threads: threads of one operator; 0: one for each core.
        sweep: measures operators; ``time_operators`` by default.
    """
    about = {**describe_machine(), "threads": threads}
    file = cache_dir() / "latency" / f"{hash_text(format_json(about), 16)}.json"
    kept, note = read_kept(file)
    known = _select_times(kept.get("ms"))
    missing = [operator for operator in operators if str(operator) not in known]

    # Only what was never timed on this machine is timed. If the cache cannot be written, the run goes on with the
    # times.
    if missing:
        times = (sweep or time_operators)(missing, threads, progress)
        known |= {str(operator): round(ms, 6) for operator, ms in times.items()}
        if note := keep(file, {"machine": about, "ms": known}) or note:
            progress(f"operators were timed ({note})", 0, 0)
    return {operator: known[str(operator)] for operator in operators}


def _select_times(kept: object) -> dict[str, float]:
    """The times in what was kept. A damaged file may hold something else; that is measured again."""
    times = kept.items() if isinstance(kept, dict) else ()
    return {name: ms for name, ms in times if isinstance(ms, int | float) and ms >= 0}


def describe_machine() -> dict[str, str | int | None]:
    """What operator times depend on: processor, cores, version of ONNX Runtime, and ``GRAPHS_VERSION``."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "onnxruntime": ort.__version__, "graphs": GRAPHS_VERSION}


def time_operators(operators: Sequence[Operator], threads: int, progress: Progress) -> dict[Operator, float]:
    """Milliseconds of each operator: the median over its sessions, of which it gets more until its times agree."""
    times: dict[Operator, list[float]] = {operator: [] for operator in operators}
    done, total = 0, LEAST_SESSIONS * len(operators)
    stage = f"time {len(operators)} operators ({total * SECONDS:.0f} s or more)"
    # Sessions outside, operators inside: the sessions of one operator are far apart in time.
    for session in range(MOST_SESSIONS):
        again = [o for o in operators if session < LEAST_SESSIONS or max(times[o]) > AGREE * min(times[o])]
        total = max(total, done + len(again))
        for operator in again:
            progress(stage, done, total)
            times[operator].append(time_once(operator, threads))
            done += 1
    progress(stage, done, total)
    return {operator: statistics.median(found) for operator, found in times.items()}


def time_once(operator: Operator, threads: int) -> float:
    """Milliseconds of an operator in a session of its own."""
    return GRAPHS[operator.kind](threads, *operator.sizes)


def measure_typical_ms(run: Callable[[], object], threads: int, seconds: float = SECONDS) -> float:
    """Milliseconds of ``run``: the median of at least three runs, after a warm-up run.

    If it uses one thread, its processor time is measured, which other processes do not affect.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times) * 1000


# ---- the graphs ----


def _time_matmul(threads: int, rows: int, k: int, n: int) -> float:
    count = count_copies(4 * k * n, rows)
    # Copy i starts at number i: all copies differ, and together take hardly more memory than one.
    numbers = _draw_random(k * n + count)
    weights = {f"w{i}": numbers[i : i + k * n].reshape(k, n) for i in range(count)}
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{i}"]) for i, name in enumerate(weights)]
    outputs = [_declare_value(f"y{i}", 1, rows, n) for i in range(count)]
    return _time_graph(threads, nodes, [_declare_value("x", 1, rows, k)], outputs, weights) / count


def _time_block_matmul(threads: int, rows: int, k: int, n: int, bits: int, block: int) -> float:
    """As the quantised graphs have it: 8 bits are symmetric, 4 bits have a zero point for each block."""
    blocks, packed = -(-k // block), 8 // bits
    width = block // packed
    count = count_copies(n * blocks * (width + 4), rows)
    # Copy i starts at number i, as above. Any code is a weight.
    codes = np.random.default_rng(0).integers(0, 256, n * blocks * width + count, dtype=np.uint8)
    scales, zeros = _draw_random(n * blocks + count), n * -(-blocks // packed)
    weights: dict[str, Float32s | npt.NDArray[np.uint8]] = {}
    nodes = []
    sizes: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": ACCURACY_LEVEL}
    for i in range(count):
        weights[f"w{i}"] = codes[i : i + n * blocks * width].reshape(n, blocks, width)
        weights[f"s{i}"] = scales[i : i + n * blocks]
        names = ["x", f"w{i}", f"s{i}"]
        if bits == 4:
            weights[f"z{i}"] = codes[i : i + zeros]
            names.append(f"z{i}")
        nodes.append(helper.make_node(BLOCK_MATMUL, names, [f"y{i}"], domain="com.microsoft", **sizes))
    outputs = [_declare_value(f"y{i}", 1, rows, n) for i in range(count)]
    return _time_graph(threads, nodes, [_declare_value("x", 1, rows, k)], outputs, weights) / count


def _time_attention(threads: int, tokens: int, past: int, heads: int, groups: int, dim: int, value_dim: int) -> float:
    """Attention after ``GroupQueriesPass``: in decode (one token) the queries of a group are rows of one head."""
    count = count_copies(4 * groups * (dim + value_dim) * past, tokens)
    total, repeat = past + tokens, heads // groups if tokens == 1 else 1
    heads //= repeat
    inputs = [_declare_value("q", 1, tokens * repeat, heads * dim), _declare_value("k", 1, tokens, groups * dim)]
    inputs += [_declare_value("v", 1, tokens, groups * value_dim), _declare_value("mask", 1, 1, tokens * repeat, total)]
    outputs, nodes = [], []
    for i in range(count):
        inputs += [_declare_value(f"pk{i}", 1, groups, past, dim), _declare_value(f"pv{i}", 1, groups, past, value_dim)]
        outputs += [_declare_value(f"y{i}", 1, tokens * repeat, heads * value_dim)]
        outputs += [
            _declare_value(f"k{i}", 1, groups, total, dim),
            _declare_value(f"v{i}", 1, groups, total, value_dim),
        ]
        read, made = ["q", "k", "v", "mask", f"pk{i}", f"pv{i}"], [f"y{i}", f"k{i}", f"v{i}"]
        nodes.append(helper.make_node("Attention", read, made, q_num_heads=heads, kv_num_heads=groups))
    return _time_graph(threads, nodes, inputs, outputs) / count


def _time_elementwise(threads: int, elements: int) -> float:
    # Two inputs and an output, 4 bytes each.
    count = max(2, min(MOST_COPIES, NEAR_BYTES // (12 * elements)))
    inputs = [_declare_value(f"{name}{i}", elements) for i in range(count) for name in "ab"]
    nodes = [helper.make_node("Mul", [f"a{i}", f"b{i}"], [f"y{i}"]) for i in range(count)]
    return _time_graph(threads, nodes, inputs, [_declare_value(f"y{i}", elements) for i in range(count)]) / count


GRAPHS: dict[str, Callable[..., float]] = {
    MATMUL: _time_matmul,
    BLOCK_MATMUL: _time_block_matmul,
    ATTENTION: _time_attention,
    ELEMENTWISE: _time_elementwise,
}


def count_copies(size: int, rows: int) -> int:
    """Number of copies in the graph of an operator that reads ``size`` bytes besides its ``rows`` of input."""
    # Many rows use each weight often, so reading it costs little: two copies will do.
    return min(MOST_COPIES, max(1, -(-COLD_BYTES // size))) if rows == 1 and size else 2


def _declare_value(name: str, *shape: int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _draw_random(count: int) -> Float32s:
    """Numbers that all differ, since equal weights would share memory."""
    return np.random.default_rng(0).random(count, dtype=np.float32) - np.float32(0.5)


def _time_graph(
    threads: int,
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    weights: Constants | None = None,
) -> float:
    """Milliseconds of one run, with inputs and outputs bound beforehand."""
    held = weights or {}
    graph = helper.make_graph(nodes, "operators", inputs, outputs, [_declare_weight(*item) for item in held.items()])
    opsets = [helper.make_opsetid("", TIMED_OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Errors only.
    options.log_severity_level = 3
    # The weights stay outside of the serialised model, which protobuf limits to 2 GB.
    options.add_external_initializers(list(held), [ort.OrtValue.ortvalue_from_numpy(array) for array in held.values()])
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    # Bound once, so that a run does not allocate or copy.
    binding = session.io_binding()
    for value in session.get_inputs():
        binding.bind_cpu_input(value.name, _feed(value.name, value.shape))
    for output in session.get_outputs():
        binding.bind_ortvalue_output(
            output.name, ort.OrtValue.ortvalue_from_shape_and_type(output.shape, np.float32, "cpu")
        )
    return measure_typical_ms(lambda: session.run_with_iobinding(binding), threads)


def _declare_weight(name: str, array: npt.NDArray[np.generic]) -> TensorProto:
    """An initialiser without data. The session gets the data separately."""
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="memory")
    return tensor


def _feed(name: str, shape: Sequence[int]) -> Float32s:
    """Ones, since values do not matter. The mask lets the last row see all tokens, and each earlier row one less."""
    if name != "mask":
        return np.ones(shape, dtype=np.float32)
    rows, total = shape[-2:]
    return np.where(np.tri(rows, total, total - rows, dtype=bool), 0, np.finfo(np.float32).min).astype(np.float32)[
        None, None
    ]


def interpolate(knots: Sequence[float], values: npt.NDArray[np.float64], x: float) -> npt.NDArray[np.float64]:
    """Interpolate linearly along the first dimension, whose entries belong to ``knots``; extrapolate from the ends."""
    if len(knots) == 1:
        return np.asarray(values[0])
    # The clamp takes the first or last interval beyond the ends, which extrapolates.
    i = min(max(int(np.searchsorted(knots, x)) - 1, 0), len(knots) - 2)
    share = (x - knots[i]) / (knots[i + 1] - knots[i])
    return np.asarray((1 - share) * values[i] + share * values[i + 1])
