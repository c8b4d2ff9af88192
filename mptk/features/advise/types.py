"""types: the cuts of an advice in the types of graphs: what each costs, and which meets a limit.

Quality: a type is measured on the dense model, by its graph in ONNX Runtime, on the windows of the advice. Rounding and
cutting do not disturb each other, so the rises of the loss add up. Weights that are rounded in torch would not say what
the graph does: without the equalisation of channels before it, int8 costs five times as much.

Time: predicted from the operators' times, as for ``--budget latency``. Size: that of the dense graph, less what a cut
takes from its products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mptk.cost.budgets import LATENCY
from mptk.cost.operator_times import Operator, find_operator_times
from mptk.errors import InputError
from mptk.features.advise.advice import FLOAT_TYPE, Ceiling, Figures, Point, Way
from mptk.files import make_scratch
from mptk.ir import Log, Samples
from mptk.plugins import load_parts
from mptk.protocols import Context, Dense, Prepared, SampleSets
from mptk.tasks import CAUSAL_LM
from mptk.tasks.onnx_export import export_form
from mptk.tasks.onnx_proof import make_runner
from passes.targets.onnx.block_weights import BLOCK, WIDE_BLOCK
from passes.targets.onnx.names import ONNX_FILE, count_graph_bytes, name_quantized_file

WEIGHT_BYTES = {FLOAT_TYPE: 4.0, "int8": 1 + 4 / WIDE_BLOCK, "int4": 0.5 + 4.5 / BLOCK}
"""Type → bytes of a weight in a product, with its share of a block's scale and, in int4, of its zero point."""


def check_types(prepared: Prepared, types: Sequence[str]) -> None:
    """Raise MptkError if there are no graphs of these types to compare."""
    if unknown := [name for name in types if name not in WEIGHT_BYTES or name == FLOAT_TYPE]:
        raise InputError(
            f"an advice compares int8 and int4, not {unknown[0]!r}; give --types int8,int4", name=unknown[0]
        )
    if prepared.task.onnx is not CAUSAL_LM.onnx:
        raise InputError(
            "an advice compares types and limits of text decoders, and this is a "
            f"{prepared.task.summary}; leave them out",
            name="types",
        )


@dataclass(frozen=True)
class DenseType:
    """The dense model's graph in a type: its size, and the loss of each window by text."""

    bytes: int
    losses: Mapping[str, Tensor]


def measure_types(
    prepared: Prepared, sets: SampleSets, texts: Mapping[str, Samples], types: Sequence[str], context: Context
) -> dict[str, DenseType]:
    """Write the dense model's graphs, float32 and ``types``, to a temporary folder and run them on every window."""
    settings, task = replace(prepared.settings, quantize=tuple(types), onnx=True, strict=True), prepared.task
    dense = Dense(prepared.compared, settings, prepared.reference, prepared.executor)
    assert task.onnx is not None
    found = {}
    with make_scratch() as scratch, context.stage(stage := "dense types"):
        export_form(task.onnx, dense, None, sets.calibration, scratch.folder, Log())
        whole = scratch.folder / ONNX_FILE
        files = {FLOAT_TYPE: whole, **{name: name_quantized_file(whole, name) for name in types}}
        for done, (name, file) in enumerate(files.items()):
            context.progress(stage, done, len(files), name)
            run = make_runner(task.onnx, file, prepared.executor.device)
            losses = {
                text: torch.tensor(
                    [float(task.compute_loss(run(row), row)) / task.count_predictions(row) for row in samples.split(1)],
                    dtype=torch.float64,
                )
                for text, samples in texts.items()
            }
            found[name] = DenseType(count_graph_bytes([file]), losses)
    return found


def list_ways(
    prepared: Prepared, points: Sequence[Point], types: Mapping[str, DenseType], limits: Ceiling, context: Context
) -> tuple[Way, ...]:
    """Every cut of ``points``, the dense model first, in every type. Only the phases that ``limits`` name are timed."""
    dense, ways = points[0], list[Way]()
    for name, found in types.items():
        times = {phase: predict_times(prepared, points, phase, name, context) for phase in limits.phases}
        for number, point in enumerate(points):
            size = found.bytes - (dense.parameters - point.parameters) * WEIGHT_BYTES[name]
            texts = {text: add_rounding(each, found, types[FLOAT_TYPE], text) for text, each in point.texts.items()}
            ms = {phase: each[number] for phase, each in times.items()}
            ways.append(Way(name, point.sparsity, point.widths, size, ms, texts))
    return tuple(ways)


def predict_times(
    prepared: Prepared, points: Sequence[Point], phase: str, scheme: str, context: Context
) -> list[float]:
    """Milliseconds of each cut in a phase and a type, from operators that are timed now or were earlier."""
    predictors = load_parts("predictors")
    if LATENCY not in predictors:
        raise InputError("nothing here predicts a latency; give --max-size in place of milliseconds", name="max_ms")
    p = prepared
    ladders = {
        name: ladder
        for name, ladder in p.legal.ladders.items()
        if name in points[0].widths and p.analysis.variable(name).uniform
    }
    measure = partial(_time_operators, p, context)
    latency = predictors[LATENCY](p.analysis, ladders, phase, measure, "" if scheme == FLOAT_TYPE else scheme)
    return [latency(point.widths) for point in points]


def _time_operators(prepared: Prepared, context: Context, operators: Sequence[Operator]) -> Mapping[Operator, float]:
    return find_operator_times(operators, prepared.settings.threads, context.progress)


def add_rounding(cut: Figures, rounded: DenseType, whole: DenseType, text: str) -> Figures:
    """The figures of a cut in a type: the rises of the loss add up, and their standard errors in squares."""
    rises = rounded.losses[text] - whole.losses[text]
    rise = cut.rise + float(rises.mean())
    ratio = math.exp(min(rise, 700.0))
    own = float(rises.std()) / math.sqrt(len(rises)) if len(rises) > 1 else 0.0
    error = ratio * math.hypot(cut.error / (1 + cut.change), own)
    return Figures(cut.loss + float(rises.mean()), rise, None, ratio - 1, error)
