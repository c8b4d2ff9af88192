"""Predicted beside measured latency: SmolLM2-135M cut to widths at which no operator was timed, in ONNX Runtime.

    python -m benchmarks.latency [--json FILE] [--quick] [--threads N] [--quantize int8,int4]

Single operators (``mptk.cost.operator_times``) and whole ONNX graphs are timed in turn. Each graph is the dense model's first rows
and columns, since which ones does not matter for speed. ``--quick``: four layers, two held-out shapes, two rounds.
``--quantize``: these graphs in place of the float32 one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from benchmarks.common import result_header, write_result
from benchmarks.onnx import MODEL, export, resized
from mptk.api import compiler as api
from mptk.cost.budgets import OBJECTIVES
from mptk.cost.operator_times import Operator, measure_typical_ms, time_once
from mptk.features.latency.predict import Latency, Measure
from mptk.io import models
from mptk.ort.decoder import OrtDecoder
from mptk.ort.steps import Case, bind_decoder_step
from passes.pipelines import quantize_onnx
from passes.targets import legalize

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

ROUNDS = 9
"""In each, every operator and then every graph is timed in a session of its own, so that all see the same neighbours."""


def narrowed(model: PreTrainedModel, shape: Mapping[str, int]) -> PreTrainedModel:
    return resized(
        model,
        num_attention_heads=shape["kv_groups"] * shape["q_heads"],
        num_key_value_heads=shape["kv_groups"],
        intermediate_size=shape["ffn"],
    )


def predictors(model: PreTrainedModel, schemes: Sequence[str], measure: Measure) -> dict[tuple[str, str], Latency]:
    """Each type's and phase's prediction."""
    analysis = api.analyze(model)
    ladders = {name: legalize.list_aligned_widths(analysis.family(name)) for name in FAMILIES}
    return {
        (scheme, phase): Latency(analysis, ladders, phase, measure, scheme)
        for scheme in schemes
        for phase in OBJECTIVES
    }


def operators_of(model: PreTrainedModel, schemes: Sequence[str]) -> list[Operator]:
    """All operators that the predictions need."""
    found: list[Operator] = []

    def remember(operators: Sequence[Operator]) -> Mapping[Operator, float]:
        found.extend(operators)
        return dict.fromkeys(operators, 1.0)

    predictors(model, schemes, remember)
    return list(dict.fromkeys(found))


def time_graph(decoder: OrtDecoder, phase: str, threads: int) -> float:
    tokens, past = OBJECTIVES[phase]
    return measure_typical_ms(
        bind_decoder_step(decoder, Case(phase, max(tokens, past), 1, threads)), threads, seconds=1.0
    )


def main(
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    quick: Annotated[bool, typer.Option("--quick")] = False,
    threads: Annotated[int, typer.Option("--threads")] = 1,
    quantize: Annotated[str, typer.Option("--quantize")] = "",
) -> None:
    dense = models.load(MODEL).model
    shapes = SHAPES[:3] if quick else SHAPES
    if quick:
        dense = resized(dense, num_hidden_layers=4)
    schemes = quantize.split(",")
    operators = operators_of(dense, schemes)
    single: dict[Operator, list[float]] = {operator: [] for operator in operators}
    cases = [(scheme, phase, i) for scheme in schemes for phase in OBJECTIVES for i in range(len(shapes))]
    whole: dict[tuple[str, str, int], list[float]] = {case: [] for case in cases}
    sweep_s = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        files: dict[tuple[str, str, int], Path] = {}
        for phase in OBJECTIVES:
            for i, shape in enumerate(shapes):
                source = export(narrowed(dense, shape), Path(temporary) / f"{phase}-{i}", "all", phase)
                files |= {(s, phase, i): quantize_onnx(source, s) if s else source for s in schemes}
        for _ in range(2 if quick else ROUNDS):
            start = time.perf_counter()
            for operator in operators:
                single[operator].append(time_once(operator, threads))
            sweep_s = time.perf_counter() - start
            for (scheme, phase, i), file in files.items():
                whole[scheme, phase, i].append(time_graph(OrtDecoder(file, threads=threads), phase, threads))
    predicted = predictors(dense, schemes, lambda found: {o: median(single[o]) for o in found})
    rows = [row(scheme, phase, shapes, i, predicted[scheme, phase], whole) for scheme, phase, i in whole]
    for line in rows:
        print(line, flush=True)
    worst = max(abs(line["error"]) for line in rows if line["held_out"])
    print(f"{len(operators)} operators, {sweep_s:.0f} s a round; largest held-out error: {worst:.1%}", flush=True)
    if json_file is not None:
        about = {
            "model": MODEL,
            "quick": quick,
            "threads": threads,
            "operators": len(operators),
            "round_s": round(sweep_s, 1),
        }
        write_result(json_file, {**result_header(), **about}, rows)


def row(
    scheme: str,
    phase: str,
    shapes: Sequence[Mapping[str, int]],
    i: int,
    latency: Latency,
    measured: Mapping[tuple[str, str, int], Sequence[float]],
) -> dict[str, Any]:
    """One shape in one phase. ``spread``: half the range of the measured rounds over their median."""
    times = measured[scheme, phase, i]
    guess, ms = latency(shapes[i]), median(times)
    return {
        **({"type": scheme} if scheme else {}),
        "phase": phase,
        **shapes[i],
        "held_out": i > 0,
        "predicted_ms": round(guess, 2),
        "measured_ms": round(ms, 2),
        "spread": round((max(times) - min(times)) / 2 / ms, 3),
        "error": round(guess / ms - 1, 4),
        "predicted_ratio": round(guess / latency({}), 4),
        "measured_ratio": round(ms / median(measured[scheme, phase, 0]), 4),
    }


if __name__ == "__main__":
    typer.run(main)
