"""samples: the samples that a run calibrates, trains and measures on: read as the settings say, or given in memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mptk.compile.cut import with_dense_outputs
from mptk.compile.trace import fit_to_program
from mptk.config import IN_MEMORY, Settings
from mptk.io import RANDOM_DATA, Loaded
from mptk.io import data as text
from mptk.ir import IGNORED, Program, Samples
from mptk.protocols import Kept, Prepared, SampleSets, Task, check_kept_samples
from mptk.run.amounts import TRAINED_PER_HELD_OUT, count_held_out, count_measured, count_samples
from mptk.run.given import collect_given, takes_texts
from mptk.run.run import Run
from mptk.tasks.inputs.text import find_aside, make_text_rows

KEPT_SAMPLES = "samples"
"""Name of the samples in the folder of an unfinished run."""


def read_samples(prepared: Prepared, run: Run, *, measures: bool = True) -> tuple[SampleSets, Run]:
    """Samples to train, calibrate and measure on. The first of several processes makes them; the others read them.

    Also returns the run with the caller's samples, which further runs on the same model share. ``measures``: whether
    there are samples to measure on.
    """
    s, task, dense = prepared.settings, prepared.task, run.dense
    assert dense is not None
    if run.inputs.has_samples and dense.training is None and dense.evaluation is None:
        training, evaluation = collect_given(prepared, run.inputs)
        dense = replace(dense, training=training, evaluation=evaluation)
    # Text that the model writes costs most, so one stretch of it serves to train and to measure on.
    own, source = s.data == text.SELF and dense.training is None, s.eval_data or s.data
    count = count_samples(s, own=own)
    more = count_measured(s, count) if own and measures and dense.evaluation is None else 0
    given, say = dense.training, partial(run.progress, "calibration data")
    # What the unfinished run kept, or new samples: first those to train on, then those to measure on.

    def make() -> Kept:
        made = given or task.draw_samples(prepared.loaded, s, count + more, say)
        return Kept(made[:count].to_tensors("training") | (made[count:].to_tensors("evaluation") if more else {}))

    with run.stage("calibration data"):
        kept = dict(run.keep(KEPT_SAMPLES, make, once=True).tensors)
        # The caller's program may give other samples to a resumed run than to the one before.
        if given is not None and run.folder is not None:
            check_kept_samples(kept, given[:count].to_tensors("training"), run.folder.path)
        examples = task.make_examples(prepared.loaded.model)
        restored, written = (Samples.from_tensors(kept, examples, what) for what in ("training", "evaluation"))
        assert restored is not None
        if not measures:
            measured = restored
        elif dense.evaluation is not None:
            measured = dense.evaluation
        elif written is not None:  # the model wrote it
            measured, source = written.shorten(s.eval_windows, s.eval_length), text.SELF
        else:
            measured = draw_evaluation(prepared.loaded, task, s, prepared.analysis.program)
    # Batches as the program takes them, and some training samples held out.
    program = prepared.analysis.program
    restored = fit_to_program(task, program, restored, "data")
    measured = fit_to_program(task, program, measured, "eval_data")
    said = source if source == IN_MEMORY else task.name_data(prepared.loaded.model, source)
    if measures and s.eval_data is None and s.data not in (text.SELF, RANDOM_DATA) and is_apart(measured, restored):
        said += f" ({describe_amount_measured(measured)} set aside: nothing was fitted to them)"
    used, held_out = hold_out(restored, s)
    return SampleSets(used, used[: s.windows], measured, said, task.sequences, held_out), replace(run, dense=dense)


def draw_evaluation(loaded: Loaded, task: Task, settings: Settings, program: Program | None = None) -> Samples:
    """Samples of the settings' data to measure on. ``program``: what runs on them, if that is known."""
    source, given = settings.eval_data or settings.data, (text.SELF, RANDOM_DATA)
    if source in given or not takes_texts(loaded, task, program):
        return task.draw_evaluation(loaded, settings)
    assert loaded.tokenizer is not None
    length, count = settings.eval_length, settings.eval_windows
    texts = text.read_evaluation_texts(loaded.tokenizer, source, length, count, find_aside(loaded, settings))
    return make_text_rows(loaded, texts, length)


def is_apart(measured: Samples, fitted: Samples) -> bool:
    """Whether no sample is in both: examples and a single sample serve both."""
    rows = [{text.hash_windows(row) for row in next(iter(each.inputs.values()))} for each in (measured, fitted)]
    return rows[0].isdisjoint(rows[1])


def describe_amount_measured(samples: Samples) -> str:
    """How many tokens, or samples that are no text."""
    ids = samples.inputs.get("input_ids")
    return f"{len(samples)} samples" if ids is None else f"{int((ids != IGNORED).sum()):,} tokens"


def hold_out(samples: Samples, settings: Settings) -> tuple[Samples, Samples | None]:
    """Split samples into training samples and held-out ones, which are the last; a single sample is not held out."""
    used = len(samples) * TRAINED_PER_HELD_OUT // (TRAINED_PER_HELD_OUT + 1)
    count = min(count_held_out(settings, used), len(samples) - 1)
    return (samples[:-count], samples[-count:]) if count else (samples, None)


def add_dense_outputs(prepared: Prepared, sets: SampleSets, run: Run) -> SampleSets:
    """The sets with the dense model's outputs as targets, if the task's loss compares outputs."""
    if not prepared.task.compares or prepared.planned is not None:
        return sets
    with run.stage("dense outputs"):
        return replace(sets, calibration=with_dense_outputs(prepared, sets.calibration))
