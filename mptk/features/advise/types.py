"""types: the cuts of an advice in the types of graphs: what each costs, and which meets a limit.

A type is measured on the dense model: its graph runs in ONNX Runtime on the windows of the advice. Its rise of the loss
is added to a cut's. Weights that are rounded in torch would give another rise, since a graph's channels are equalised
before they are rounded.

Times are predicted as for ``--budget latency``. A size is the dense graph's, minus the weights that the cut removes.

The memory of decoding is what a process takes that opens the dense graph (measured), minus these weights, plus two KV
caches of the context: a step reads one and gives another, which is one token longer. Attention rearranges the keys of a
layer, so these count once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mptk.cost.budgets import KV_CACHE, LATENCY
from mptk.cost.model import CostModel, find_keys_and_values
from mptk.cost.operator_times import find_operator_times
from mptk.errors import AnalysisError, InputError
from mptk.features.advise.advice import FLOAT_TYPE, Ceiling, Figures, Point, Way
from mptk.features.advise.sweep import compute_standard_error
from mptk.ir import Samples
from mptk.ort.roofline import Growth, measure_decode_memory
from mptk.plugins import load_parts
from mptk.protocols import Context, Prepared, SampleSets
from mptk.run.dense_types import write_dense_types
from mptk.tasks import CAUSAL_LM
from mptk.tasks.onnx_proof import make_runner
from passes.targets.onnx.block_weights import BLOCK, WIDE_BLOCK
from passes.targets.onnx.names import ONNX_FILE, count_graph_bytes, name_quantized_file

WEIGHT_BYTES = {FLOAT_TYPE: 4.0, "int8": 1 + 4 / WIDE_BLOCK, "int4": 0.5 + 4.5 / BLOCK}
"""Type → bytes of a weight in a product, with its share of a block's scale and, in int4, of its zero point."""
STEP_CACHES = 2
"""KV caches in a step: the one that it reads, and the one that it gives."""


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
class MeasuredGraph:
    """A graph: its file, its size, and the loss of each window by text.

    ``growth``: memory of one step with a short cache, hence hardly more than of the weights; None if nobody asked.
    """

    file: Path
    bytes: int
    losses: Mapping[str, Tensor]
    growth: Growth | None = None


def measure_types(
    prepared: Prepared,
    sets: SampleSets,
    texts: Mapping[str, Samples],
    types: Sequence[str],
    limits: Ceiling,
    folder: Path,
    context: Context,
) -> dict[str, MeasuredGraph]:
    """Write the dense model's graphs, float32 and ``types``, into ``folder`` and run them on every window.

    If ``limits`` limit the memory, it is measured, too.
    """
    found = dict[str, MeasuredGraph]()
    with context.stage(stage := "dense types"):
        write_dense_types(prepared, types, sets.calibration, folder, strict=True)
        for done, name in enumerate(names := (FLOAT_TYPE, *types)):
            context.progress(stage, done, len(names), name)
            file = name_graph(folder, name)
            growth = None if limits.memory is None else measure_decode_memory(file, 1)
            found[name] = replace(measure_graph(prepared, file, texts), growth=growth)
    return found


def name_graph(folder: Path, type_: str) -> Path:
    """The file of a decoder's graph in a type."""
    whole = folder / ONNX_FILE
    return whole if type_ == FLOAT_TYPE else name_quantized_file(whole, type_)


def measure_graph(prepared: Prepared, file: Path, texts: Mapping[str, Samples]) -> MeasuredGraph:
    """Run a graph on every window in ONNX Runtime."""
    task = prepared.task
    assert task.onnx is not None
    run = make_runner(task.onnx, file, prepared.executor.device)
    losses = {
        text: torch.tensor(
            [float(task.compute_loss(run(row), row)) / task.count_predictions(row) for row in samples.split(1)],
            dtype=torch.float64,
        )
        for text, samples in texts.items()
    }
    return MeasuredGraph(file, count_graph_bytes([file]), losses)


def list_ways(
    prepared: Prepared, points: Sequence[Point], types: Mapping[str, MeasuredGraph], limits: Ceiling, context: Context
) -> tuple[Way, ...]:
    """Every cut of ``points``, the dense model first, in every type. Only the phases that ``limits`` name are timed."""
    dense, ways = points[0], list[Way]()
    steps = [0.0 for _ in points] if limits.memory is None else count_step_bytes(prepared, points, limits.context)
    for name, found in types.items():
        times = {
            phase: open_predictor(prepared, list(dense.widths), phase, name, limits, context) for phase in limits.phases
        }
        for number, point in enumerate(points):
            gone = (dense.parameters - point.parameters) * WEIGHT_BYTES[name]
            texts = {text: add_rounding(each, found, types[FLOAT_TYPE], text) for text, each in point.texts.items()}
            ms = {phase: predict(point.widths) for phase, predict in times.items()}
            memory = None if found.growth is None else predict_memory(found, gone, steps[number])
            ways.append(Way(name, point.sparsity, point.widths, found.bytes - gone, ms, texts, memory))
    return tuple(ways)


def count_step_bytes(prepared: Prepared, points: Sequence[Point], context: int) -> list[float]:
    """Bytes of the values of a decoding step of each cut, beside the weights.

    Raises MptkError if the keys and values are not known.
    """
    layers = len(find_keys_and_values(prepared.analysis))
    if not layers:
        raise AnalysisError(
            "no memory can be predicted: this model writes its attention out, so the KV cache is not known; leave out "
            "--max-memory",
            name="max_memory",
        )
    # The graphs' caches are float32, whatever the checkpoint stores.
    cost = CostModel(prepared.analysis, KV_CACHE, itemsize=4, context=context)
    caches = [cost(point.widths).kv_cache or 0.0 for point in points]
    return [(STEP_CACHES + 1 / (2 * layers)) * cache for cache in caches]


def predict_memory(dense: MeasuredGraph, gone: float, step: float) -> float:
    """Bytes that decoding takes at the most. ``gone``: of the weights that a cut removes. ``step``: of a step's values.

    The peak may be in loading, in which weights are rearranged, or in a step.
    """
    assert dense.growth is not None
    # Where no process says what it takes (other systems than Linux), the weights count as in the file.
    held, peak = dense.growth.held or dense.bytes, dense.growth.peak or dense.bytes
    return max(peak - gone, held - gone + step)


def open_predictor(
    prepared: Prepared, families: Sequence[str], phase: str, scheme: str, limits: Ceiling, context: Context
) -> Callable[[Mapping[str, float]], float]:
    """What predicts the milliseconds of cuts of ``families`` in a phase and a type.

    Operators are timed now, or were earlier.
    """
    predictors = load_parts("predictors")
    if LATENCY not in predictors:
        raise InputError("nothing here predicts a latency; give --max-size in place of milliseconds", name="max_ms")
    p = prepared
    ladders = {
        name: ladder
        for name, ladder in p.legal.ladders.items()
        if name in families and p.analysis.variable(name).uniform
    }
    found: Callable[[Mapping[str, float]], float] = predictors[LATENCY](
        p.analysis,
        ladders,
        phase,
        lambda operators: find_operator_times(operators, p.settings.threads, context.progress),
        "" if scheme == FLOAT_TYPE else scheme,
        limits.context,
    )
    return found


def add_rounding(cut: Figures, rounded: MeasuredGraph, whole: MeasuredGraph, text: str) -> Figures:
    """The figures of a cut in a type: the rises of the loss add up, and their standard errors in squares."""
    rises = rounded.losses[text] - whole.losses[text]
    rise = cut.rise + float(rises.mean())
    ratio = math.exp(min(rise, 700.0))
    error = ratio * math.hypot(cut.error / (1 + cut.change), compute_standard_error(rises))
    return Figures(cut.loss + float(rises.mean()), rise, None, ratio - 1, error)
