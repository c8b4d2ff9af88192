"""api: ``mptk.advise``: say how far a model can be cut, before any cut is made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Unpack

from transformers import PreTrainedTokenizerBase

from mptk.api.pruned import Shown, report_progress
from mptk.api.words import wrap_public
from mptk.compile.cut import with_dense_outputs
from mptk.compile.trace import fit_to_program
from mptk.config import COMPARED_TYPES, IN_MEMORY, MOST_SPARSITY, UNIFORM, Settings, format_command, with_keywords
from mptk.distributed.processes import connect_processes
from mptk.errors import DataError, InputError
from mptk.features.advise.advice import (
    ADVICE,
    CALIBRATION_STEPS,
    FLOAT_TYPE,
    SPARSITIES,
    Advice,
    Ceiling,
    Point,
    Way,
)
from mptk.features.advise.keywords import AdviseKeywords
from mptk.features.advise.made import WAYS_AT_ONCE, check_measurable, measure_ways
from mptk.features.advise.sweep import Measuring, find_cuts, give_advice, open_trials, split_into_rows
from mptk.features.advise.types import check_types, list_ways, measure_types
from mptk.files import make_scratch
from mptk.io import data as text
from mptk.io import list_source_names
from mptk.ir import Log, Samples, concatenate_samples
from mptk.methods.division.trials import Trials
from mptk.protocols import Context, Opened, Prepared, SampleSets
from mptk.report.summary import SAFE_CHANGE
from mptk.run.amounts import count_samples
from mptk.run.given import check_fits, collect_samples, takes_texts
from mptk.run.inputs import Data, GivenInputs, Inputs, is_in_memory, name_given
from mptk.run.open import Model, name_start, take_model
from mptk.run.prepare import prepare
from mptk.run.prune import keep_stages_on_failure
from mptk.run.run import Run, Start, open_run
from mptk.run.samples import draw_evaluation, hold_out

FAMILIES = 1.5
"""Cuts for each sparsity in the estimate, which is made before families are known: a division, and at every second
sparsity a cut of blocks."""
ANY = 1.0
"""The tolerance of the budget until cuts are chosen: a model with only coarse widths must not be refused before."""


@wrap_public
def advise(
    model: Model,
    settings: Settings | None = None,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    tolerance: float = SAFE_CHANGE,
    calibrate: bool = False,
    types: Sequence[str] | None = None,
    max_decode_ms: float | None = None,
    max_prefill_ms: float | None = None,
    max_size: float | None = None,
    max_memory: float | None = None,
    measure: bool = False,
    progress: Shown = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    example_inputs: GivenInputs | None = None,
    data: Data | None = None,
    **keywords: Unpack[AdviseKeywords],
) -> Advice:
    """Say how far a model can be cut: measure cuts of several sizes, and recommend the largest that is safe::

        advice = mptk.advise("smollm2-135m", data="code.jsonl,prose.txt", tolerance=0.1)
        print(advice.recommended, advice.command)

    Units are scored once, consumers are fitted, and nothing is written. Only ``calibrate`` trains.

    Args:
        model, progress, tokenizer, example_inputs: as in ``mptk.prune``.
        settings: the settings; by default ``wanda`` chooses units, and consumers are reconstructed.
        sparsities: shares of the budget to remove; the nearest legal cuts are measured.
        tolerance: the largest change that is safe, as a share: of the perplexity or, of a model without one, of samples
            with another top-1 class, or the largest mean loss.
        calibrate: train two of the cuts, each for ``steps`` (16) steps, to say what each cut costs after recovery.
        types: schemes of quantised graphs in which each cut is compared with float32; by default ``int8`` and ``int4``
            if there is a limit, else none. Only text decoders.
        max_decode_ms, max_prefill_ms, max_size, max_memory: limits, in milliseconds as predicted, in bytes of the
            graph, and in bytes of memory in decoding: the advice then names the best way that meets them, in
            ``find_way`` and ``way_command``. ``context`` (512) is the number of tokens in the KV cache.
        measure: make the best three ways within the limits, time them as ``mptk.bench`` does, and measure them in ONNX
            Runtime; and better ways, if they seem too slow by at most a tenth. The best way is then chosen by these
            figures, ``Way.measured``. Cuts in a type, two at least, show how far the predicted perplexity is off
            (``checked``, ``Way.compute_miss``).
        data: as in ``mptk.prune``. Each source of a name with several, such as ``"A,B"``, is measured by itself.
        keywords: fields of ``Settings``, as in ``mptk.prune``. ``samples``: windows to fit to, of all texts together;
            ``eval_windows``: windows of each text to measure on.

    Raises:
        MptkError: the model cannot be loaded, traced or cut; a sparsity or the tolerance is out of bounds; there is no
            such keyword; there is too little text; a model that is not of transformers is to be trained; types or
            limits are given for a model that is no text decoder; or ``measure`` is given without either.
    """
    check_sparsities(sparsities, tolerance)
    limits = check_limits(Ceiling(max_decode_ms, max_prefill_ms, max_size, max_memory))
    types = (COMPARED_TYPES if limits.is_set else ()) if types is None else tuple(types)
    compares = bool(types) or limits.is_set
    if measure and not compares:
        raise InputError(
            "--measure makes the best ways to round or cut, which are only compared with types or a limit; give "
            "--types int8,int4 or a limit, as --max-decode-ms 10",
            name="measure",
        )
    # A cut must also suit the types in which it is compared: widths are then multiples of their blocks.
    schemes = {"quantize": types} if types else {}
    chosen = with_keywords(settings or ADVICE, {**name_given(data=data), **schemes, **keywords, "onnx": False})
    chosen = replace(chosen.with_widths(chosen.widths), sparsity=max(sparsities), tolerance=ANY)
    check_choice(chosen)
    if calibrate:  # the number of steps belongs to the measurement, so no time limit may choose it
        steps = chosen.steps or CALIBRATION_STEPS
        chosen = with_keywords(chosen, {"steps": steps, "samples": chosen.windows, "minutes": None})
    inputs = Inputs.of(tokenizer=tokenizer, example_inputs=example_inputs, data=data)
    start, chosen, inputs = take_model(model, chosen, inputs)
    if calibrate and isinstance(start, Opened) and start.plain:
        raise InputError("mptk trains only transformers models; leave out calibrate", name="calibrate")
    # For the estimate of what the run needs.
    texts = 1 if is_in_memory(data) else len(list_source_names(chosen.data))
    graphs = compares * (1 + len(types)) + measure * WAYS_AT_ONCE
    measuring = Measuring(round(FAMILIES * len(sparsities)), texts, graphs)
    with (
        make_scratch() as kept,
        report_progress(progress) as say,
        open_run(
            start,
            name_start(model),
            kept.folder / "advice",
            chosen,
            inputs,
            Context(Log(), say),
            instead=measuring,
            trains=calibrate,
        ) as run,
    ):
        limits = replace(limits, context=chosen.context or limits.context)
        asked = TypeComparison(types, limits, measure) if compares else None
        found, settings = measure_cuts(start, run, sorted(set(sparsities)), tolerance, asked)
    return add_commands(found, str(model), settings) if isinstance(model, str | Path) else found


def add_commands(found: Advice, model: str, settings: Settings) -> Advice:
    """The advice with the commands of the cuts that it recommends. ``settings``: of the run."""

    def write_command(own: Settings, best: Point | None) -> str:
        """The command that cuts to ``best``; empty if there is none."""
        if best is None:
            return ""
        return format_command(model, replace(own, sparsity=round(best.sparsity, 4)), best.widths)

    # The types of an advice are no types that its cuts must be written in.
    settings = replace(settings, quantize=()) if found.ways else settings
    # The recommended cut is safe without training; another one may be after it.
    plain = replace(settings, learning=replace(settings.learning, steps=0))
    if found.recovery is not None:  # the settings have its steps
        trained = write_command(settings, found.recommended_after)
        found = replace(found, recovery=replace(found.recovery, command=trained))
    way = found.find_way()
    found = replace(found, way_command="" if way is None else format_way_command(model, plain, way))
    return replace(found, command=write_command(plain, found.recommended))


def format_way_command(model: str, settings: Settings, way: Way) -> str:
    """The command that makes a way: an export if nothing is cut."""
    schemes = () if way.type == FLOAT_TYPE else (way.type,)
    if way.sparsity:
        return format_command(
            model, replace(settings, sparsity=round(way.sparsity, 4), quantize=schemes), dict(way.widths)
        )
    words = ["mptk", "export", model, *(["--quantize", way.type] if schemes else [])]
    # int4 is rounded for a text.
    words += ["--data", settings.data] if way.type == "int4" else []
    return shlex.join([*words, "--out", f"{Path(model).stem}-{way.type}"])


def check_limits(limits: Ceiling) -> Ceiling:
    """The limits. Raises MptkError if one is not above 0."""
    found = {"max_decode_ms": limits.decode_ms, "max_prefill_ms": limits.prefill_ms}
    for name, most in (found | {"max_size": limits.bytes, "max_memory": limits.memory}).items():
        if most is not None and not most > 0:
            raise InputError(f"a limit of {most:g} is not above 0; give more, or leave it out", name=name)
    return limits


def check_sparsities(sparsities: Sequence[float], tolerance: float) -> None:
    """Raise MptkError if a sparsity or the tolerance is out of bounds."""
    if not sparsities or not all(0 < s <= MOST_SPARSITY for s in sparsities):
        raise InputError(
            f"sparsities must lie above 0 and be at most {MOST_SPARSITY}; give some, as 0.1,0.2,0.3", name="sparsities"
        )
    if not 0 < tolerance <= 10:
        raise InputError(
            f"a tolerance of {tolerance} is not above 0 and at most 10; give a share, as 0.05", name="tolerance"
        )


def check_choice(settings: Settings) -> None:
    """Raise MptkError for settings with which there is nothing to compare: cuts are of the dense model's layers alike.

    ``check_layers`` does the same for layers that families name.
    """
    if settings.plan is not None:
        raise InputError("--plan says which units stay, so there is nothing to advise; leave it out", name="plan")
    if settings.larger is not None:
        raise InputError("an advice compares cuts of the dense model; leave out --larger", name="larger")
    if settings.layers != UNIFORM:
        raise InputError(
            f"an advice compares cuts whose layers are alike; leave out --layers {settings.layers}", name="layers"
        )


def check_layers(prepared: Prepared) -> None:
    """Raise MptkError if the settings name layers of families."""
    s = prepared.settings
    for name in (*s.families, *s.keep, *s.widths):
        if not prepared.analysis.variable(name).uniform:
            raise InputError(f"an advice compares cuts whose layers are alike; leave out {name}", name=name)


@dataclass(frozen=True)
class TypeComparison:
    """What cuts in types are compared for: as in ``mptk.advise``."""

    types: Sequence[str]
    limits: Ceiling
    measure: bool


def measure_cuts(
    model: Start, run: Run, sparsities: Sequence[float], tolerance: float, asked: TypeComparison | None
) -> tuple[Advice, Settings]:
    """Measure cuts of several sizes. Returns the advice, without commands, and the settings of the recommended cut.

    ``tolerance``: the largest change that is safe, as in ``mptk.advise``. ``asked``: None compares no types.
    """
    if connect_processes().num_processes > 1:
        raise InputError("an advice is measured in one process; run `mptk advise` in one")
    prepared, run = prepare(model, run)
    check_layers(prepared)
    if asked is not None:
        check_types(prepared, asked.types)
        if asked.measure or prepared.settings.context is not None:
            check_measurable(prepared, asked.limits)
    with keep_stages_on_failure(prepared, run):
        # `prepare` needed a tolerance that any model meets. The cuts themselves must lie near their sparsities.
        prepared = replace(prepared, settings=replace(prepared.settings, tolerance=Settings.tolerance))
        sets, texts = read_domains(prepared, run)
        cuts = find_cuts(prepared, sparsities)
        trials = open_trials(prepared, cuts, sets, run)
        rows = {name: split_into_rows(prepared, samples) for name, samples in texts.items()}
        found = give_advice(trials, cuts, rows, tolerance)
        if asked is not None:
            found = compare_ways(found, trials, texts, asked, run)
        run.remove_folder()
    return found, prepared.settings


def compare_ways(
    found: Advice, trials: Trials, texts: Mapping[str, Samples], asked: TypeComparison, run: Run
) -> Advice:
    """The advice with its cuts in types."""
    prepared, points = trials.prepared, (found.dense, *found.division)
    with make_scratch() as scratch:
        dense = measure_types(prepared, trials.sets, texts, asked.types, asked.limits, scratch.folder, run)
        ways = list_ways(prepared, points, dense, asked.limits, run)
        found = replace(found, ways=ways, limits=asked.limits)
        return measure_ways(found, trials, texts, dense, run) if asked.measure else found


def read_domains(prepared: Prepared, run: Run) -> tuple[SampleSets, dict[str, Samples]]:
    """Samples to fit to and to train on, of all sources of ``data`` alike; and source → other samples of it."""
    s, task, program = prepared.settings, prepared.task, prepared.analysis.program
    total, plain = count_samples(s, own=s.data == text.SELF), replace(s.learning, steps=0)
    # The caller's samples are read once, enough for both uses.
    both = replace(s, samples=total + s.eval_windows, learning=plain)
    own = None
    if run.inputs.data is not None:
        own = collect_samples(run.inputs.data, prepared.loaded, task, count_samples(both), s.length, s.seed)
        check_fits(own, program)
    names = [IN_MEMORY] if own is not None else text.list_source_names(s.data)
    count, fitted, held_out, measured = -(-total // len(names)), [], list[Samples](), dict[str, Samples]()
    with run.stage("calibration data"):
        for name in names:
            say = partial(run.progress, "calibration data")
            if own is None and takes_texts(prepared.loaded, task, program):
                apart = replace(s, data=name, eval_data=None)  # a run sets single texts aside to measure on
                found = fit_to_program(task, program, task.draw_samples(prepared.loaded, apart, count, say), "data")
                rows = draw_evaluation(prepared.loaded, task, apart, program)
                measured[name] = fit_to_program(task, program, rows, "eval_data")
            else:
                given = replace(s, data=name, eval_data=name)  # what is measured on is set aside here
                found = task.draw_samples(prepared.loaded, given, count + s.eval_windows, say) if own is None else own
                found = fit_to_program(task, program, found, "data")
                # The last samples are measured on, at most half of a short text; the others are fitted to.
                last = min(s.eval_windows, len(found) // 2)
                if not last:
                    raise DataError(
                        f"{name} has text for one sample, and advice needs two or more; give more --data", name=name
                    )
                found, measured[name] = found[: min(count, len(found) - last)], found[-last:]
            used, guard = hold_out(found, s)
            fitted.append(used)
            held_out += [] if guard is None else [guard]
    calibration = concatenate_samples([each[: -(-s.windows // len(names))] for each in fitted])
    guards = concatenate_samples(held_out) if held_out else None
    sets = SampleSets(concatenate_samples(fitted), calibration, calibration, s.data, task.sequences, guards)
    if not task.compares:
        return sets, measured
    with run.stage("dense outputs"):
        return replace(sets, calibration=with_dense_outputs(prepared, calibration)), measured
