"""samples: the samples that a run calibrates, trains and measures on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from mptk.compile.cut import with_dense_outputs
from mptk.compile.trace import fit_to_program
from mptk.config.choices import IN_MEMORY
from mptk.config.settings import Settings
from mptk.distributed.processes import connect_processes
from mptk.errors import MptkError
from mptk.io import data
from mptk.ir.samples import Samples, concatenate_samples
from mptk.protocols.chain import Prepared
from mptk.protocols.origin import check_kept_samples
from mptk.protocols.values import SampleSets
from mptk.run.amounts import TRAINED_PER_HELD_OUT, count_held_out, count_measured, count_samples
from mptk.run.given_samples import collect_given
from mptk.run.open import Dense
from mptk.run.run import Run

KEPT_SAMPLES = "samples"
"""Name of the samples in the folder of an unfinished run."""


def read_samples(prepared: Prepared, run: Run, dense: Dense, *, measures: bool = True) -> tuple[SampleSets, Dense]:
    """Samples to train, calibrate and measure on. The first of several processes makes them; the others read them.

    ``dense``: of this run; it is returned with the caller's samples, which further runs on the same model share.
    ``measures``: whether there are samples to measure on.
    """
    s, task, folder = prepared.settings, prepared.task, run.folder
    if run.inputs.has_samples and dense.training is None and dense.evaluation is None:
        training, evaluation = collect_given(prepared, run.inputs)
        dense = replace(dense, training=training, evaluation=evaluation)
    own, source = s.data == data.SELF and dense.training is None, s.eval_data or s.data
    count = count_samples(s, own=own)
    with run.stage("calibration data"), connect_processes().main_process_first() if folder else nullcontext():
        kept = None if folder is None else folder.tensors(KEPT_SAMPLES)
        if kept is None:
            more = count_measured(s, count) if own and measures and dense.evaluation is None else 0
            say = partial(run.progress, "calibration data")
            made = dense.training or task.samples(prepared.loaded, s, count + more, say)
            kept = made[:count].saved("training") | (made[count:].saved("evaluation") if more else {})
            if folder is not None:
                folder.save(KEPT_SAMPLES, kept)
        elif dense.training is not None and folder is not None:
            check_kept_samples(kept, dense.training[:count].saved("training"), folder.path)
        examples = task.make_examples(prepared.loaded.model)
        restored, written = (Samples.from_tensors(kept, examples, what) for what in ("training", "evaluation"))
        assert restored is not None
        if not measures:
            measured = restored
        elif dense.evaluation is not None:
            measured = dense.evaluation
        elif written is not None:  # the model wrote it
            measured, source = written.shorten(s.eval_windows, s.eval_length), data.SELF
        else:
            measured = task.evaluation(prepared.loaded, s)
    program = prepared.analysis.program
    restored = fit_to_program(task, program, restored, "data")
    measured = fit_to_program(task, program, measured, "eval_data")
    said = source if source == IN_MEMORY else task.named(prepared.loaded.model, source)
    used, held_out = hold_out(restored, s)
    return SampleSets(used, used[: s.windows], measured, said, task.sequences, held_out), dense


def hold_out(samples: Samples, settings: Settings) -> tuple[Samples, Samples | None]:
    """Split samples into training samples and held-out ones, which are the last; a single sample is not held out."""
    used = len(samples) * TRAINED_PER_HELD_OUT // (TRAINED_PER_HELD_OUT + 1)
    count = min(count_held_out(settings, used), len(samples) - 1)
    return (samples[:-count], samples[-count:]) if count else (samples, None)


def add_dense_outputs(prepared: Prepared, sets: SampleSets, run: Run) -> SampleSets:
    """The sets with the dense model's outputs as targets, if the task's loss compares outputs."""
    if not prepared.task.compares or prepared.plan is not None:
        return sets
    with run.stage("dense outputs"):
        return replace(sets, calibration=with_dense_outputs(prepared, sets.calibration))


def read_domains(prepared: Prepared, run: Run) -> tuple[SampleSets, dict[str, Samples]]:
    """Samples to fit to and to train on, of all sources of ``data`` alike; and source → other samples of it.

    Raises:
        MptkError: a source has fewer than two samples.
    """
    s, task, program = replace(prepared.settings, search=False), prepared.task, prepared.analysis.program
    total, plain = count_samples(s, own=s.data == data.SELF), replace(s.learning, steps=0)
    both = replace(s, samples=total + s.eval_windows, learning=plain)
    own = collect_given(replace(prepared, settings=both), run.inputs)[0] if run.inputs.has_samples else None
    names = [IN_MEMORY] if own is not None else data.list_source_names(s.data)
    count, fitted, held_out, measured = -(-total // len(names)), [], list[Samples](), dict[str, Samples]()
    with run.stage("calibration data"):
        for name in names:
            say = partial(run.progress, "calibration data")
            given = replace(s, data=name)
            found = task.samples(prepared.loaded, given, count + s.eval_windows, say) if own is None else own
            found = fit_to_program(task, program, found, "data")
            last = min(s.eval_windows, len(found) // 2)
            if not last:
                raise MptkError(f"{name} has text for one sample, and advice needs two or more; give more --data")
            used, guard = hold_out(found[: min(count, len(found) - last)], s)
            fitted.append(used)
            held_out += [] if guard is None else [guard]
            measured[name] = found[-last:]
    calibration = concatenate_samples([each[: -(-s.windows // len(names))] for each in fitted])
    guards = concatenate_samples(held_out) if held_out else None
    sets = SampleSets(concatenate_samples(fitted), calibration, calibration, s.data, task.sequences, guards)
    if not task.compares:
        return sets, measured
    with run.stage("dense outputs"):
        sets = replace(sets, calibration=with_dense_outputs(prepared, calibration))
        return sets, {name: with_dense_outputs(prepared, samples) for name, samples in measured.items()}
