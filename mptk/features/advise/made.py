"""made: ways of an advice that are really made: cut, written in their type, timed and measured.

Times are taken as ``mptk bench`` takes them, and losses in ONNX Runtime on the windows of the advice. Nothing is
trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mptk.config import Settings
from mptk.cost.budgets import list_phase_tokens
from mptk.features.advise.advice import FLOAT_TYPE, Advice, Ceiling, Figures, Way
from mptk.features.advise.sweep import Windows, compare_windows
from mptk.features.advise.types import MeasuredGraph, measure_graph, name_graph
from mptk.files import make_scratch
from mptk.io import check_positions, find_position_limit
from mptk.ir import Log, Samples
from mptk.methods.division.trials import Trials
from mptk.ort.bench import time_graphs
from mptk.ort.roofline import measure_decode_memory
from mptk.ort.steps import Case
from mptk.protocols import Context, Prepared
from mptk.targets.onnx import export_compiled

WAYS_AT_ONCE = 3
"""Ways that are made at once: the best, and others that may turn out to be better."""
PREDICTED_WITHIN = 1.1
"""Most times are predicted within a tenth (benchmarks/latency.md): what seems too slow by less may meet the limit."""
CHECKED = 2
"""Cuts in a type that are made at least: only these show whether the rises of cut and type add up."""


def check_measurable(prepared: Prepared, limits: Ceiling) -> None:
    """Raise MptkError if the model has too few positions for the steps that would be timed, or for the context."""
    for phase in [*limits.phases, *["decode"] * limits.decodes]:
        tokens = sum(list_phase_tokens(phase, limits.context))
        check_positions(find_position_limit(prepared.loaded.model.config), tokens, f"{tokens} tokens of {phase}")


def measure_ways(
    found: Advice, trials: Trials, texts: Mapping[str, Samples], dense: Mapping[str, MeasuredGraph], context: Context
) -> Advice:
    """Make and measure the best ways, until the best by what is known is a measured one.

    ``dense``: type → the dense model's graph.
    """
    while chosen := choose_further_ways(found):
        with make_scratch() as scratch:
            graphs = make_graphs(chosen, trials, texts, dense, scratch.folder, context)
            ms = time_ways(graphs, found.limits, trials.prepared.settings, context)
            memory = [measure_memory(graph.file, found.limits) for graph in graphs]
        measured = [
            replace(way, bytes=graph.bytes, ms=own, texts=compare_graph(graph, dense[FLOAT_TYPE]), memory=held)
            for way, graph, own, held in zip(chosen, graphs, ms, memory, strict=True)
        ]
        known = {(way.type, way.cut): way for way in measured}
        ways = [replace(way, measured=known.get((way.type, way.cut), way.measured)) for way in found.ways]
        found = replace(found, ways=tuple(ways))
    return found


def choose_further_ways(found: Advice) -> list[Way]:
    """The best ways that were not made, and as many cuts in a type as are missing; none if the best was made.

    Better ways whose predicted time is just above the limit count, too. If none is within the limits, the cheapest:
    predictions may be too high.
    """
    ranked = found.rank_ways() or sorted(found.ways, key=lambda way: way.price)
    best, *rest = ranked
    nearly = replace(found, limits=found.limits.scale_times(PREDICTED_WITHIN)).rank_ways()
    better = [way for way in itertools.takewhile(lambda way: way != best, nearly) if way.measured is None]
    unknown = better
    if best.measured is None:
        unknown = [best, *better, *(way for way in rest if way.measured is None and way not in better)]
    if not unknown:
        return []
    chosen, later = unknown[:WAYS_AT_ONCE], [way for way in unknown[WAYS_AT_ONCE:] if way.is_sum]
    there = len(found.checked) + sum(way.is_sum for way in chosen)
    return [*chosen, *later[: max(0, CHECKED - there)]]


def make_graphs(
    ways: Sequence[Way],
    trials: Trials,
    texts: Mapping[str, Samples],
    dense: Mapping[str, MeasuredGraph],
    folder: Path,
    context: Context,
) -> list[MeasuredGraph]:
    """The graph of each way. Each cut is made once, in the types of all its ways."""
    made = dict[tuple[tuple[str, int], ...], Path]()
    graphs = list[MeasuredGraph]()
    with context.stage(stage := "make ways"):
        for done, way in enumerate(ways):
            context.progress(stage, done, len(ways), f"{way.type}, {way.sparsity:.1%} removed")
            if not way.sparsity:
                graphs.append(dense[way.type])
                continue
            if way.cut not in made:
                made[way.cut] = folder / str(len(made))
                types = [each.type for each in ways if each.cut == way.cut and each.type != FLOAT_TYPE]
                write_cut(trials, way.widths, types, made[way.cut])
            graphs.append(measure_graph(trials.prepared, name_graph(made[way.cut], way.type), texts))
    return graphs


def write_cut(trials: Trials, widths: Mapping[str, int], types: Sequence[str], folder: Path) -> None:
    """Write the model, cut to ``widths`` and fitted, in float32 and in ``types``."""
    compiled, form = trials.cut(trials.choose_for(widths)), trials.prepared.task.onnx
    assert form is not None
    settings = replace(trials.prepared.settings, quantize=tuple(types), onnx=True, strict=True)
    export_compiled(compiled, form, settings, trials.sets.calibration, folder, Log())


def time_ways(
    graphs: Sequence[MeasuredGraph], limits: Ceiling, settings: Settings, context: Context
) -> list[dict[str, float]]:
    """Phase → milliseconds of each graph, timed in turns."""
    # The length of a case is the cache's in decode, and the prompt's in prefill.
    lengths = {phase: max(list_phase_tokens(phase, limits.context)) for phase in limits.phases}
    cases = [Case(phase, length, 1, settings.threads) for phase, length in lengths.items()]
    if not cases:
        return [{} for _ in graphs]
    files = {str(number): graph.file for number, graph in enumerate(graphs)}
    rows = time_graphs(files, cases, progress=context.progress)
    return [{row.case.phase: row.ms for row in rows if row.graph == name} for name in files]


def measure_memory(file: Path, limits: Ceiling) -> float | None:
    """Bytes that decoding takes at the most, if they are limited, and this system tells them."""
    return None if limits.memory is None else measure_decode_memory(file, limits.context).peak or None


def compare_graph(graph: MeasuredGraph, whole: MeasuredGraph) -> dict[str, Figures]:
    """The figures of a graph on each text, beside the dense float graph's."""
    return {
        text: compare_windows(Windows(losses, ()), Windows(whole.losses[text], ()), "perplexity")
        for text, losses in graph.losses.items()
    }
