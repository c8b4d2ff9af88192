"""stage: the advice within a run of ``mptk prune --quantize auto``, which chooses type and sparsity by a limit.

In each type the smallest cuts that meet the limit, as predicted, are measured as an advice measures them, beside the
dense model. The way that loses least is made by the run itself, with its own method and training.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from types import MappingProxyType

from mptk.config import COMPARED_TYPES, MOST_SPARSITY, Settings
from mptk.cost.budgets import PROMPT
from mptk.cost.estimate import ModelSizes, Pass
from mptk.cost.fixed import ONNX_S
from mptk.distributed.processes import connect_processes
from mptk.errors import BudgetError, DataError, InputError
from mptk.features.advise.advice import FLOAT_TYPE, Advice, Ceiling, Way
from mptk.features.advise.sweep import (
    TRIED_DIVISIONS,
    Cuts,
    find_divisions,
    give_advice,
    list_cut_families,
    open_trials,
    split_into_rows,
)
from mptk.features.advise.types import check_types, list_ways, measure_types, open_predictor
from mptk.features.advise.view import describe_limits, describe_price, describe_way
from mptk.files import make_scratch
from mptk.ir import Plan, resolve_plan
from mptk.methods.division.budget import describe_levers
from mptk.protocols import Chosen, Context, Prepared, Rows, SampleSets, Stage
from mptk.report.summary import SAFE_CHANGE
from passes.targets.legalize import Candidate

COMPARED_WINDOWS = 8
"""Held-out windows on which ways are compared: as many as an advice measures on."""
PERCENTS = range(1, 100)
"""Sparsities among which the smallest that meets the limit is found."""
ALL_TYPES = (FLOAT_TYPE, *COMPARED_TYPES)


class TypeStage(Stage):
    """Chooses the type of the graph and how much is cut."""

    shorter = MappingProxyType({"dense types": "the types, as --quantize int8"})
    chooses_type = True

    def check(self, settings: Settings) -> None:
        if settings.chooses_type and connect_processes().num_processes > 1:
            raise InputError(
                "a type is chosen in one process; run `mptk advise` in one, and give prune what it prints",
                name="quantize",
            )

    def count_held_out(self, settings: Settings, samples: int) -> int:
        return min(COMPARED_WINDOWS, max(1, samples // 4)) if settings.chooses_type else 0

    def estimate(self, settings: Settings, sizes: ModelSizes, kept: float) -> Mapping[str, Pass]:
        if not settings.chooses_type:
            return {}
        s, tokens = settings, COMPARED_WINDOWS * settings.length
        cuts = len(ALL_TYPES) * TRIED_DIVISIONS
        return {
            "moments": Pass(s.windows * s.length, s.length),
            "cuts": Pass((1 + cuts) * tokens, s.length, flops=cuts * sizes.fit),
            "dense types": Pass(len(ALL_TYPES) * tokens, s.length, fixed=ONNX_S),
        }

    def divide(self, prepared: Prepared, sets: SampleSets, context: Context) -> tuple[Prepared, Rows]:
        if not prepared.settings.chooses_type:
            return prepared, {}
        check_types(prepared, COMPARED_TYPES)
        cuts, found = compare_ways_within(prepared, sets, context)
        way = found.find_way()
        if way is None:  # as predicted, some way meets the limit, so only figures that are not finite lead here
            raise BudgetError(
                f"no way that was measured meets {describe_limits(found.limits)}; raise it", name="max_ms"
            )
        return settle_way(prepared, cuts, way, found.limits), {"advice": asdict(found)}


TYPE_STAGE = TypeStage()


def compare_ways_within(prepared: Prepared, sets: SampleSets, context: Context) -> tuple[Cuts, Advice]:
    """The cuts that meet the limit in some type, and the advice on them. Raises MptkError if nothing meets it."""
    s = prepared.settings
    decodes, cached = s.objective == "decode", s.context or PROMPT
    limits = Ceiling(s.max_ms if decodes else None, None if decodes else s.max_ms, context=cached)
    if sets.held_out is None:
        raise DataError(
            "a type is chosen on text that is held out, and there is one sample; give more --data", name="data"
        )
    cuts = Cuts({}, [[cut] for cut in find_smallest_cuts(prepared, limits, context)])
    # The run trains what is chosen; the advice trains nothing.
    plain = replace(prepared, settings=replace(s, learning=replace(s.learning, steps=0)))
    texts = {s.data: sets.held_out[:COMPARED_WINDOWS]}
    trials = open_trials(plain, cuts, sets, context)
    rows = {name: split_into_rows(plain, samples) for name, samples in texts.items()}
    found = give_advice(trials, cuts, rows, SAFE_CHANGE)
    with make_scratch() as scratch:
        dense = measure_types(plain, sets, texts, COMPARED_TYPES, limits, scratch.folder, context)
        ways = list_ways(plain, (found.dense, *found.division), dense, limits, context)
    return cuts, replace(found, ways=ways, limits=limits)


def find_smallest_cuts(prepared: Prepared, limits: Ceiling, context: Context) -> list[Candidate]:
    """The divisions of the smallest cut that meets the limit in each type; none of a type that meets it uncut.

    Raises MptkError if no type meets the limit.
    """
    (phase,), most = limits.phases, prepared.settings.max_ms
    assert most is not None
    names, every = list_cut_families(prepared)
    found, least, whole = list[Candidate](), list[float](), False
    for scheme in ALL_TYPES:
        predict = open_predictor(prepared, every, phase, scheme, limits, context)
        whole = whole or predict({}) <= most
        if predict({}) <= most:
            continue
        fitting = partial(find_fitting, prepared, names, every, predict, most)
        first = bisect_left(PERCENTS, True, key=lambda percent: bool(fitting(percent)))
        found += fitting(PERCENTS[first]) if first < len(PERCENTS) else []
        least += [predict(cut.widths) for cut in find_divisions(prepared, names, every, MOST_SPARSITY)]
    if not found and not whole:
        raise BudgetError(
            f"no cut in any type is predicted to {phase} in {most:g} ms; the fastest takes "
            f"{min(least, default=0):.2f} ms. Ask for more, or {describe_levers(prepared, prepared.legal, names)}",
            name="max_ms",
            nearest=(min(least, default=0.0),),
        )
    return found


def find_fitting(
    prepared: Prepared,
    families: Sequence[str],
    every: Sequence[str],
    predict: Callable[[Mapping[str, float]], float],
    most: float,
    percent: int,
) -> list[Candidate]:
    """The divisions of about this size that take at most so many milliseconds."""
    cuts = find_divisions(prepared, families, every, percent / 100)
    return [cut for cut in cuts if predict(cut.widths) <= most]


def settle_way(prepared: Prepared, cuts: Cuts, way: Way, limits: Ceiling) -> Prepared:
    """``prepared`` with only this way left. The dense model is a plan that removes nothing, and is not trained."""
    s = replace(prepared.settings, quantize=() if way.type == FLOAT_TYPE else (way.type,))
    if way.sparsity:
        (chosen,) = (cut for cut in cuts.candidates if dict(cut.widths).items() <= dict(way.widths).items())
        settings = replace(s.with_widths(chosen.widths), sparsity=chosen.sparsity)
        return replace(prepared, settings=settings, candidates=(chosen,))
    learning, plan = replace(s.learning, steps=0), Plan({})
    settings = replace(s, sparsity=0.0, reconstruct=False, distil_epochs=0, minutes=None, learning=learning)
    note = f"no cut is needed: {describe_way(way)} takes {describe_price(way)}, within {describe_limits(limits)}"
    planned = Chosen(plan, resolve_plan(prepared.analysis, plan), notes=(note,))
    return replace(prepared, settings=settings, candidates=(), planned=planned)
