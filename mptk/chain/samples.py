"""samples: the samples that a run calibrates, trains and measures on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from mptk.chain.amounts import TRAINED_PER_HELD_OUT, measured, wanted, watched
from mptk.chain.job import Given, Job
from mptk.compile.dense_outputs import with_outputs
from mptk.compile.trace import fitting
from mptk.config.choices import IN_MEMORY
from mptk.config.settings import Settings
from mptk.distributed.processes import processes
from mptk.errors import MptkError
from mptk.io import data
from mptk.ir.samples import Samples, concatenated
from mptk.protocols.chain import Prepared
from mptk.protocols.origin import check_samples
from mptk.protocols.values import Context, SampleSets

KEPT_SAMPLES = "samples"
"""Name of the samples in the folder of an unfinished run."""


def read_samples(job: Job, prepared: Prepared, context: Context, *, measures: bool = True) -> SampleSets:
    """Samples to train, calibrate and measure on. The first of several processes makes them; the others read them.

    ``measures``: whether there are samples to measure on.
    """
    s, task, folder = prepared.settings, prepared.task, context.folder
    given = Given() if job.samples is None else job.samples(prepared)
    own, source = s.data == data.SELF and given.training is None, s.eval_data or s.data
    count = wanted(s, own=own)
    with context.stage("calibration data"), processes().main_process_first() if folder else nullcontext():
        kept = None if folder is None else folder.tensors(KEPT_SAMPLES)
        if kept is None:
            more = measured(s, count) if own and measures and given.evaluation is None else 0
            say = partial(context.progress, "calibration data")
            made = given.training or task.samples(prepared.loaded, s, count + more, say)
            kept = made[:count].saved("training") | (made[count:].saved("evaluation") if more else {})
            if folder is not None:
                folder.save(KEPT_SAMPLES, kept)
        elif given.training is not None and folder is not None:
            check_samples(kept, given.training[:count].saved("training"), folder.path)
        examples = task.examples(prepared.loaded.model)
        training, evaluation = (Samples.restored(kept, examples, what) for what in ("training", "evaluation"))
        assert training is not None
        if not measures:
            evaluation = training
        elif given.evaluation is not None:
            evaluation = given.evaluation
        elif evaluation is not None:
            evaluation = evaluation.shortened(s.eval_windows, s.eval_length)
            source = data.SELF
        else:
            evaluation = task.evaluation(prepared.loaded, s)
    program = prepared.analysis.program
    training = fitting(task, program, training, "data")
    evaluation = fitting(task, program, evaluation, "eval_data")
    said = source if source == IN_MEMORY else task.named(prepared.loaded.model, source)
    training, held_out = apart(training, s)
    return SampleSets(training, training[: s.windows], evaluation, said, task.sequences, held_out)


def apart(samples: Samples, settings: Settings) -> tuple[Samples, Samples | None]:
    """Split samples into training samples and held-out ones, which are the last; a single sample is not held out."""
    used = len(samples) * TRAINED_PER_HELD_OUT // (TRAINED_PER_HELD_OUT + 1)
    count = min(watched(settings, used), len(samples) - 1)
    return (samples[:-count], samples[-count:]) if count else (samples, None)


def compared(prepared: Prepared, sets: SampleSets, context: Context) -> SampleSets:
    """The sets with the dense model's outputs as targets, if the task's loss compares outputs."""
    if not prepared.task.compares or prepared.plan is not None:
        return sets
    with context.stage("dense outputs"):
        return replace(sets, calibration=with_outputs(prepared, sets.calibration))


def domains(job: Job, prepared: Prepared, context: Context) -> tuple[SampleSets, dict[str, Samples]]:
    """Samples to fit to and to train on, of all sources of ``data`` alike; and source → other samples of it.

    Raises:
        MptkError: a source has fewer than two samples.
    """
    s, task, program = replace(prepared.settings, search=False), prepared.task, prepared.analysis.program
    total, plain = wanted(s, own=s.data == data.SELF), replace(s.learning, steps=0)
    both = replace(s, samples=total + s.eval_windows, learning=plain)
    own = None if job.samples is None else job.samples(replace(prepared, settings=both)).training
    names = [IN_MEMORY] if own is not None else data.source_names(s.data)
    count, fitted, held_out, measured = -(-total // len(names)), [], list[Samples](), dict[str, Samples]()
    with context.stage("calibration data"):
        for name in names:
            say = partial(context.progress, "calibration data")
            given = replace(s, data=name)
            found = task.samples(prepared.loaded, given, count + s.eval_windows, say) if own is None else own
            found = fitting(task, program, found, "data")
            last = min(s.eval_windows, len(found) // 2)
            if not last:
                raise MptkError(f"{name} has text for one sample, and advice needs two or more; give more --data")
            used, guard = apart(found[: min(count, len(found) - last)], s)
            fitted.append(used)
            held_out += [] if guard is None else [guard]
            measured[name] = found[-last:]
    calibration = concatenated([each[: -(-s.windows // len(names))] for each in fitted])
    guards = concatenated(held_out) if held_out else None
    sets = SampleSets(concatenated(fitted), calibration, calibration, s.data, task.sequences, guards)
    if not task.compares:
        return sets, measured
    with context.stage("dense outputs"):
        sets = replace(sets, calibration=with_outputs(prepared, calibration))
        return sets, {name: with_outputs(prepared, samples) for name, samples in measured.items()}
