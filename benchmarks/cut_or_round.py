"""Where cutting pays: decoders dense and cut, in float32, int8 and int4, timed in ONNX Runtime.

    python -m benchmarks.cut_or_round [--models smollm2-135m,gemma3-270m,llama-1b,llama-3b] [--cuts 0.1,0.2,0.3,0.5]
        [--threads 1,2] [--batches 1,8] [--lengths 512,4096] [--quick] [--json FILE]

A cut narrows the feed-forward layers to a multiple of 32, as every method of mptk does of its own accord in these models.
Which channels go does not matter for time, so the first ones stay. The three types of a cut take turns with the dense
float32 graph. The Llama shapes have random weights; graphs of ``LAYERS`` layers are timed, and a layer more costs the same
each time: t(n) = t(a) + (n − a) · (t(b) − t(a)) / (b − a); so do bytes. Prefill is of one prompt: eight of 4,096 tokens do
not fit into memory in float32. Cases that the file has are not measured again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import result_header, write_result
from benchmarks.onnx import export, resized
from mptk.io import models
from mptk.ort.bench import time_graphs
from mptk.ort.steps import Case
from passes.pipelines import quantize_onnx

DENSE, FLOAT32, TYPES = "dense", "float32", ("int8", "int4")
LLAMA: Mapping[str, LlamaConfig] = {
    "llama-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "llama-3b": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
}
"""The sizes of Llama 3.2."""
LAYERS = (4, 8)
STEP = 32


@dataclass(frozen=True)
class Timed:
    """The graphs of a model's first ``layers`` layers: milliseconds by type and case, bytes by type.

    The type ``DENSE`` is the dense float32 graph, which took turns with them.
    """

    layers: int
    ms: Mapping[tuple[str, Case], float]
    bytes: Mapping[str, int]


def main(
    chosen: Annotated[str, typer.Option("--models")] = "smollm2-135m,gemma3-270m,llama-1b,llama-3b",
    cuts: str = "0.1,0.2,0.3,0.5",
    threads: str = "1,2",
    batches: str = "1,8",
    lengths: str = "512,4096",
    quick: Annotated[bool, typer.Option("--quick", help="Two layers, one cut, one short case.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    if quick:
        cuts, threads, batches, lengths = "0.3", "1", "1", "64"
    cases = [
        Case(phase, length, batch, count)
        for count in map(int, threads.split(","))
        for phase, sizes in (("prefill", "1"), ("decode", batches))
        for batch in map(int, sizes.split(","))
        for length in map(int, lengths.split(","))
    ]
    rows = json.loads(json_file.read_text())["rows"] if json_file is not None and json_file.exists() else []
    for name in chosen.split(","):
        for cut in [0.0, *map(float, cuts.split(","))]:
            done = {case_of(row) for row in rows if (row["model"], row["cut"]) == (name, cut)}
            if not (left := [case for case in cases if case not in done]):
                continue
            rows += measure_cut(name, cut, left, quick)
            if json_file is not None:
                write_result(json_file, result_header() | {"quick": quick}, rows)
    print(table(rows))


def case_of(row: Mapping[str, Any]) -> Case:
    """What a row timed."""
    return Case(row["phase"], row["length"], row["batch"], row["threads"])


def measure_cut(name: str, cut: float, cases: Sequence[Case], quick: bool) -> list[dict[str, Any]]:
    """A row for each type and case: milliseconds, their ratio to the dense float32 graph's in the same turns, bytes."""
    whole = LLAMA[name].num_hidden_layers if name in LLAMA else None
    depths: Sequence[int | None] = (2,) if quick else (None,) if whole is None else LAYERS
    found = [time_depth(open_model(name, depth), cut, cases) for depth in depths]
    rows = []
    for case in cases:
        dense = extend([(part.layers, part.ms[DENSE, case]) for part in found], whole)
        for kind in (FLOAT32, *TYPES):
            ms = extend([(part.layers, part.ms[kind, case]) for part in found], whole)
            size = extend([(part.layers, part.bytes[kind]) for part in found], whole)
            where = {"phase": case.phase, "length": case.length, "batch": case.batch, "threads": case.threads}
            measured = {"ms": round(ms, 3), "ratio": round(ms / dense, 4), "megabytes": round(size / 1e6, 1)}
            rows.append({"model": name, "cut": cut, "type": kind, **where, **measured})
            print(rows[-1], flush=True)
    return rows


def open_model(name: str, depth: int | None) -> PreTrainedModel:
    """The model, or its first ``depth`` layers. A Llama shape has random weights."""
    if name not in LLAMA:
        model = models.load(name).model
        return model if depth is None else resized(model, num_hidden_layers=depth)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(LLAMA[name].to_dict() | {"num_hidden_layers": depth}))).eval()


def time_depth(model: PreTrainedModel, cut: float, cases: Sequence[Case]) -> Timed:
    """Write the graphs of a cut and the dense float32 graph, and time them in turns."""
    with tempfile.TemporaryDirectory() as folder:
        dense = export(model, Path(folder) / "dense", "all")
        files = {FLOAT32: export(narrow(model, cut), Path(folder) / "cut", "all") if cut else dense}
        files |= {kind: quantize_onnx(files[FLOAT32], kind) for kind in TYPES}
        rows = time_graphs({DENSE: dense} | {k: f for k, f in files.items() if f != dense}, cases)
        ms = {(row.graph, row.case): row.ms for row in rows}
        ms |= {(FLOAT32, case): ms[DENSE, case] for case in cases if not cut}
        sizes = {k: sum(part.stat().st_size for part in f.parent.glob(f"{f.name}*")) for k, f in files.items()}
        return Timed(model.config.num_hidden_layers, ms, sizes)


def narrow(model: PreTrainedModel, cut: float) -> PreTrainedModel:
    """A share ``cut`` of the blocks' parameters removed from the feed-forward layers.

    Raises:
        ValueError: they have not that many.
    """
    layers = model.base_model.layers
    block = sum(p.numel() for p in layers[0].parameters() if p.dim() > 1)
    width = model.config.intermediate_size
    per_channel = 3 * model.config.hidden_size  # gate, up and down
    left = round((width - cut * block / per_channel) / STEP) * STEP
    if left < STEP:
        raise ValueError(f"the feed-forward layers have no {cut:.0%} of the blocks' parameters")
    return resized(model, intermediate_size=left)


def extend(points: Sequence[tuple[int, float]], whole: int | None) -> float:
    """The value of a model of ``whole`` layers on the line through the values of its first layers."""
    (first, low), (last, high) = points[0], points[-1]
    return low if whole is None or first == last else low + (whole - first) * (high - low) / (last - first)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each model: a line for each case, a column for each type and cut; ratios to the dense float32 graph."""
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        columns = list(dict.fromkeys((row["type"], row["cut"]) for row in sorted(own, key=lambda row: row["cut"])))
        columns.sort(key=lambda column: (FLOAT32, *TYPES).index(column[0]))
        heads = [f"{kind}{f' −{cut:.0%}' if cut else ''}" for kind, cut in columns]
        lines += [f"{name}, ratio to dense float32", "", f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
        by_place = {(r["phase"], r["length"], r["batch"], r["threads"], r["type"], r["cut"]): r for r in own}
        for place in dict.fromkeys(key[:4] for key in by_place):
            phase, length, batch, count = place
            cells = [
                f"{by_place[*place, *column]['ratio']:.2f}" if (*place, *column) in by_place else ""
                for column in columns
            ]
            case = f"{phase} {length}{f' ×{batch}' if batch > 1 else ''}, {count} thread{'s' * (count > 1)}"
            lines.append(f"| {case} | {' | '.join(cells)} |")
        sizes = {(row["type"], row["cut"]): row["megabytes"] for row in own}
        lines += [f"| MB | {' | '.join(f'{sizes[column]:.0f}' for column in columns)} |", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
