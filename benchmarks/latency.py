"""Predicted beside measured latency: SmolLM2-135M cut to widths at which no operator was timed, in ONNX Runtime.

    python -m benchmarks.latency [--json FILE] [--quick] [--threads N]

Operators are timed anew (``mptk.operators``); then whole ONNX graphs with random access to nothing but their own
weights: each is the dense model's first rows and columns, since which ones does not matter for speed. ``--quick``: the
first four layers, two shapes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from benchmarks.common import result_header, write_result
from benchmarks.onnx import MODEL, export, resized
from mptk import api, models
from mptk.bench import decoder_step
from mptk.latency import OBJECTIVES, Latency
from mptk.operators import Operator, measure, typical_ms
from mptk.runtime import OrtDecoder
from passes import legalize

FAMILIES = ("kv_groups", "q_heads", "ffn")
SHAPES: tuple[Mapping[str, int], ...] = (
    {"kv_groups": 3, "q_heads": 3, "ffn": 1536},
    {"kv_groups": 2, "q_heads": 3, "ffn": 1024},
    {"kv_groups": 3, "q_heads": 3, "ffn": 768},
    {"kv_groups": 3, "q_heads": 2, "ffn": 1440},
    {"kv_groups": 3, "q_heads": 1, "ffn": 1152},
    {"kv_groups": 1, "q_heads": 3, "ffn": 544},
)
"""The dense one, then held-out ones: no feed-forward width is one at which operators are timed."""

SESSIONS = 3
"""Each graph is timed in so many sessions of its own, in turn with the others."""


def narrowed(model: PreTrainedModel, shape: Mapping[str, int]) -> PreTrainedModel:
    return resized(
        model,
        num_attention_heads=shape["kv_groups"] * shape["q_heads"],
        num_key_value_heads=shape["kv_groups"],
        intermediate_size=shape["ffn"],
    )


def predictors(model: PreTrainedModel, threads: int) -> tuple[dict[str, Latency], dict[str, Any]]:
    """Each phase's prediction, from operators timed now; how many they were and in how many seconds."""
    analysis = api.analyze(model)
    ladders = {name: legalize.aligned(analysis.family(name), legalize.MULTIPLE) for name in FAMILIES}
    found, spent = {}, {}
    for phase in OBJECTIVES:
        start = time.perf_counter()
        timed: list[Operator] = []

        def sweep(operators: Any, timed: list[Operator] = timed) -> Any:
            timed += operators
            return measure(operators, threads, lambda *_: None)

        found[phase] = Latency(analysis, ladders, phase, sweep)
        spent[phase] = {"operators": len(timed), "seconds": round(time.perf_counter() - start, 1)}
    return found, spent


def measured(folders: list[Path], threads: int, quick: bool) -> dict[tuple[int, str], float]:
    """Milliseconds of each graph and phase: the least of its sessions' medians."""
    best: dict[tuple[int, str], float] = {}
    for _ in range(1 if quick else SESSIONS):
        for i, folder in enumerate(folders):
            decoder = OrtDecoder(folder, threads=threads)
            for phase, (tokens, past) in OBJECTIVES.items():
                step = decoder_step(decoder, phase, max(tokens, past))
                best[i, phase] = min(best.get((i, phase), float("inf")), typical_ms(step, threads, seconds=1.5))
    return best


def main(
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    quick: Annotated[bool, typer.Option("--quick")] = False,
    threads: Annotated[int, typer.Option("--threads")] = 1,
) -> None:
    dense = models.load(MODEL).model
    shapes = SHAPES[:3] if quick else SHAPES
    if quick:
        dense = resized(dense, num_hidden_layers=4)
    predicted, spent = predictors(dense, threads)
    for phase, effort in spent.items():
        print(f"{phase}: {effort['operators']} operators timed in {effort['seconds']} s", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(i) for i in range(len(shapes))]
        for folder, shape in zip(folders, shapes, strict=True):
            export(narrowed(dense, shape), folder, "all")
        times = measured(folders, threads, quick)
    rows = []
    for (i, phase), ms in sorted(times.items(), key=lambda item: (item[0][1], item[0][0])):
        guess, whole = predicted[phase](shapes[i]), predicted[phase]({})
        row = {"phase": phase, **shapes[i], "held_out": i > 0, "predicted_ms": round(guess, 2)}
        row |= {"measured_ms": round(ms, 2), "error": round(guess / ms - 1, 4)}
        row |= {"predicted_ratio": round(guess / whole, 4), "measured_ratio": round(ms / times[0, phase], 4)}
        rows.append(row)
        print(row, flush=True)
    worst = max(abs(row["error"]) for row in rows if row["held_out"])
    print(f"largest held-out error: {worst:.1%}", flush=True)
    if json_file is not None:
        about = {"model": MODEL, "quick": quick, "threads": threads, "sweep": spent}
        write_result(json_file, {**result_header(), **about}, rows)


if __name__ == "__main__":
    typer.run(main)
