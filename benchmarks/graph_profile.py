"""Where a step of ONNX Runtime spends its time, by operator: a decoder's graphs in float32, int8 and int4, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.graph_profile FOLDER [--types float32,int8,int4] [--phases decode,prefill]
        [--length 128] [--rounds 12] [--threads 1] [--json FILE]

    OMP_NUM_THREADS=1 python -m benchmarks.graph_profile --products

FOLDER is one of `mptk export MODEL --quantize int8,int4 --out FOLDER`. The time of a node is the least of all rounds, since
a busy machine only adds to it. ``bytes``: of the weights that a kind of operator reads in a step, once. ``--products``: SmolLM2-135M's products by themselves, with
weights in 8 and 4 bits and several sizes of blocks.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import onnx
import onnxruntime as ort
import typer

from benchmarks.common import result_header, write_result
from mptk.cost.operator_times import Operator, time_operators
from mptk.ort.decoder import OrtDecoder
from mptk.ort.sessions import CPU
from mptk.ort.steps import Case, bind_decoder_step
from mptk.progress import show_nothing
from passes.targets.onnx.names import name_quantized_file

FLOAT32 = "float32"
LEAST_SHARE = 0.01
"""Kinds of operators that take less of a step are summed up."""


SHAPES = {"up": (576, 1536), "down": (1536, 576), "logits": (576, 49152)}
"""Inputs and outputs of products of SmolLM2-135M."""
FORMATS = [(8, 32), (8, 64), (8, 128), (4, 32), (4, 64), (4, 128)]
"""Bits of a weight, and inputs that share a scale."""
ROWS = (1, 128)


def main(
    folder: Annotated[Path | None, typer.Argument()] = None,
    types: str = "float32,int8,int4",
    phases: str = "decode,prefill",
    length: int = 128,
    rounds: int = 12,
    threads: int = 1,
    products: Annotated[bool, typer.Option("--products")] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    if folder is None or products:
        print(build_products_table(time_products(threads)))
        return
    rows = []
    for phase in phases.split(","):
        case = Case(phase, length, 1, threads)
        files = {name: find_file(folder, name) for name in types.split(",")}
        nodes: dict[str, dict[str, float]] = {name: {} for name in files}
        for _ in range(rounds):
            for name, file in files.items():
                for node, seconds in profile_steps(file, case).items():
                    nodes[name][node] = min(seconds, nodes[name].get(node, seconds))
        for name, file in files.items():
            rows += [{"type": name, "phase": phase, "length": length} | row for row in sum_up(file, nodes[name])]
    print(table(rows))
    if json_file is not None:
        write_result(json_file, result_header() | {"threads": threads, "rounds": rounds}, rows)


def time_products(threads: int) -> dict[tuple[str, int], list[float]]:
    """Name of a product, and rows of its left side → milliseconds in each of ``FORMATS``."""
    cases = [(name, rows) for name in SHAPES for rows in ROWS]
    operators = {
        case: [Operator("MatMulNBits", (case[1], *SHAPES[case[0]], *form)) for form in FORMATS] for case in cases
    }
    times = time_operators([each for some in operators.values() for each in some], threads, show_nothing)
    return {case: [times[each] for each in some] for case, some in operators.items()}


def build_products_table(times: Mapping[tuple[str, int], list[float]]) -> str:
    heads = [f"{bits} bits, blocks of {block}" for bits, block in FORMATS]
    lines = [f"| product, ms | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for (name, rows), found in times.items():
        lines.append(f"| {name}, {rows} row{'s' * (rows > 1)} | {' | '.join(f'{ms:.3f}' for ms in found)} |")
    return "\n".join(lines)


def find_file(folder: Path, scheme: str) -> Path:
    file = next(f for f in (folder / "model.onnx", folder / "onnx" / "model.onnx") if f.exists())
    return file if scheme == FLOAT32 else name_quantized_file(file, scheme)


def profile_steps(file: Path, case: Case, steps: int = 3) -> Mapping[str, float]:
    """Node → the least milliseconds of a few steps of a new session."""
    with tempfile.TemporaryDirectory() as work:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
        options.enable_profiling, options.profile_file_prefix = True, f"{work}/steps"
        decoder = OrtDecoder(file, CPU, threads=case.threads)
        decoder.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        step = bind_decoder_step(decoder, case)
        for _ in range(steps):
            step()
        events = json.loads(Path(decoder.session.end_profiling()).read_text())
    found: dict[str, float] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = f"{event['args']['op_name']} {event['name'].removesuffix('_kernel_time')}"
            found[name] = min(event["dur"] / 1e3, found.get(name, float("inf")))
    return found


def sum_up(file: Path, nodes: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each kind of operator, the dearest first. A product that gives the logits is a kind of its own."""
    graph = onnx.load(str(file), load_external_data=False).graph
    shapes = {tensor.name: tensor for tensor in graph.initializer}
    last = {node.name for node in graph.node if set(node.output) & {graph.output[0].name}}
    weights = {
        node.name: sum(count_bytes(shapes[name]) for name in node.input if name in shapes) for node in graph.node
    }
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for key, ms in nodes.items():
        operator, _, name = key.partition(" ")
        kind = f"{operator} (logits)" if name in last else operator
        times[kind] += ms
        counts[kind] += 1
        if "Gather" not in operator:  # a look-up reads a row
            sizes[kind] += weights.get(name, 0)
    total = sum(times.values())
    for kind in [kind for kind, ms in times.items() if ms < LEAST_SHARE * total]:
        for table_ in (times, counts, sizes):
            table_["others"] += table_.pop(kind, 0)
    return [
        {
            "operator": kind,
            "nodes": counts[kind],
            "ms": round(ms, 3),
            "share": round(ms / total, 3),
            "bytes": sizes[kind],
        }
        for kind, ms in sorted(times.items(), key=lambda item: -item[1])
    ]


def count_bytes(tensor: onnx.TensorProto) -> int:
    size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    for n in tensor.dims:
        size *= n
    return int(size)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| type | phase | operator | nodes | ms | share | weights MB | GB/s |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        rate = f"{r['bytes'] / r['ms'] / 1e6:.1f}" if r["bytes"] else ""
        cells = [r["type"], r["phase"], r["operator"], r["nodes"], f"{r['ms']:.3f}", f"{r['share']:.1%}"]
        cells += [f"{r['bytes'] / 1e6:.1f}", rate]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
