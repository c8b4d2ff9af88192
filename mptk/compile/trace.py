"""trace: trace a loaded model into a program, and check that the program is the model.

A transformers model is traced through its task; its length is fixed if the class cannot be traced for all lengths. A
plain module has no task's example sizes, so the trace with the most open sizes that works is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

import passes.frontend.trace
from mptk.errors import DataError, ModelError, MptkError, TraceError
from mptk.io import Loaded, choose_wide_type, measure_free_memory
from mptk.ir import Program, Samples, is_tokens
from mptk.protocols import Prepared, Task
from mptk.staged.staged import Executor
from passes.frontend.bound import limit_processor_time
from passes.frontend.eager import GradientMode, check_steady, compare_to_module
from passes.frontend.trace import OpenSizes
from passes.transforms.weight_types import Retype

LONGEST_TRACE = 31
"""Most tokens of a program that holds one length: its graph may unroll a loop over them. A prime, so that no size of a
model is a multiple of it by chance."""


def trace_loaded(
    loaded: Loaded,
    task: Task,
    executor: Executor,
    length: int = LONGEST_TRACE,
    like: Samples | None = None,
    eager: bool = False,
) -> Program:
    """The model's program with its weights.

    If the trace holds only one length (``Program.length``), this is the lesser of ``length`` and ``LONGEST_TRACE``.
    ``like``: samples that it will run on. If these are not token ids and have the size of the task's example, the trace
    holds only that size: export of a tiny Swin takes 5 s with fixed height and width and over 90 s with symbolic ones.
    ``eager``: compare with the module itself, since the program's graph replaces it. A plain module is always compared.

    Raises:
        MptkError: the program has several inputs and holds one length; its outputs are not what the task says, not
            finite, or all zero.
    """
    example = task.make_example(loaded.model)
    example = example if like is None else task.choose_example(example, like)
    # The trace, with as many open sizes as the kind of model allows.
    if not isinstance(loaded.model, PreTrainedModel):
        program = trace_module(loaded, example)
    else:
        # Only the batch stays open if the samples have the example's sizes. Not with token ids, as the proof runs other
        # lengths than the run.
        same = like is not None and not any(map(is_tokens, example.tensors)) and has_same_sizes(example, like)
        sizes = (0,) if same else task.open_sizes(example)
        program = _trace(loaded, task, example, sizes)
        # A loop over the images fixes the batch of some inputs. Such a program fits no other batch: fix it in all.
        if isinstance(sizes, Mapping) and len({isinstance(dims[0], int) for _, dims in program.sizes.inputs}) > 1:
            program = _trace(loaded, task, example, {name: tuple({*dims} - {0}) for name, dims in sizes.items()})
    # The class fixed the length after all: trace again, for the length in which the run reads its text.
    if task.find_fixed_length(program) is not None:
        if len(example.inputs) > 1:  # ``of_length`` changes only token ids
            raise TraceError(
                f"{type(loaded.model).__name__} can be traced only for {program.length} tokens: its code loops over "
                "the positions, or computes with their number in Python; prune a model whose class uses tensors for "
                "that (docs/tracing.md), or cut this one for inputs of one length with mptk.rewrite",
                name=type(loaded.model).__name__,
            )
        example = example.of_length(min(length, LONGEST_TRACE))
        program = _trace(loaded, task, example, (0,))
    # The program must give the same outputs twice, and they must be the ones that the task expects.
    fixed, ran = task.find_fixed_length(program), 0
    check_steady(
        program, lambda inputs: next(executor.run_programs([program], [inputs])), example.tensors, loaded.source
    )

    def run(samples: Samples) -> Tensor | tuple[Tensor, ...]:
        nonlocal ran
        # Of a fixed length: the tokens are repeated up to it, and the outputs of the repeated ones are cut off again.
        batch = samples if fixed is None else samples.of_length(fixed)
        found: Tensor | tuple[Tensor, ...] = next(executor.run_programs([program], [batch.tensors]))
        outputs = (found,) if isinstance(found, Tensor) else found
        check_traced_outputs(loaded.source, program, outputs, untrained=not isinstance(loaded.model, PreTrainedModel))
        ran += 1
        return found if fixed is None or not isinstance(found, Tensor) else found[:, : samples.tensors[0].shape[1]]

    task.check(loaded, run, example)
    if not ran:  # a task without checks of its own: ``check_traced_outputs`` runs all the same
        run(example)
    if eager and isinstance(loaded.model, PreTrainedModel) and fixed is None:
        program = compare_if_it_fits(program, loaded, example)
    return program


def describe_fixed_sizes(prepared: Prepared) -> str:
    """The report's note on sizes that the trace fixed, if the traced graph is what runs; else empty."""
    program = prepared.analysis.program
    # One condition for each source line, the first: a loop over a size gives one in each round. The keys of a dict keep
    # the last value, so it is filled backwards.
    lines = {each.rpartition(" (")[2]: each for each in reversed(program.sizes.fixed)}
    if prepared.target.classed or not (said := [*filter(None, [program.limits.note]), *reversed(lines.values())]):
        return ""
    return f"fixed: {'; '.join(said)}: the pruned model refuses other sizes"


def describe_gradient_limits(prepared: Prepared) -> str:
    """The report's note on how the traced graph trains unlike the module, or what it refuses to train; else empty."""
    limits = prepared.analysis.program.limits
    said = {
        "off": "it is refused while gradients are on, since the module computes otherwise then",
        "inputs": "inputs that require gradients are refused, since the module computes otherwise then",
        "": limits.trains and f"the pruned model trains otherwise than the module: {limits.trains}",
    }[limits.gradients]
    return "" if prepared.target.classed or not said else f"gradients: {said}"


def fit_to_program(task: Task, program: Program, samples: Samples, what: str) -> Samples:
    """Batch a caller's samples as the program takes them.

    Raises:
        MptkError: the program does not hold for their sizes.
    """
    length = task.find_fixed_length(program)
    if length is not None and samples.tensors[0].shape[1] != length:
        raise DataError(
            f"this model is traced only for {length} tokens, and the samples of {what} have "
            f"{samples.tensors[0].shape[1]}; give samples of {length} tokens, or text",
            name=what,
        )
    if task.sequences:  # token ids: any length, any batch
        return samples
    # A program of one batch size takes the samples in groups of that size.
    batch = program.sizes.find_fixed_size(0)
    samples = samples if batch is None else samples.fit_batch_size(batch)
    try:
        program.sizes.check([(batch or max(2, len(samples)), *tensor.shape[1:]) for tensor in samples.tensors])
    except MptkError as error:
        raise DataError(f"the samples of {what} do not fit: {error}", name=what) from error
    return samples


def describe_one_length(prepared: Prepared) -> str:
    """The report's note on a program that holds one length; else empty."""
    length = prepared.task.find_fixed_length(prepared.analysis.program)
    if length is None:
        return ""
    return (
        f"{type(prepared.loaded.model).__name__} is traced for one length, since its code loops over the positions or "
        f"computes with their number in Python: text is read in windows of {length} tokens, and the proof is for these"
    )


def has_same_sizes(samples: Samples, others: Samples) -> bool:
    """Whether the inputs of two sets of samples have the same sizes, except the number of samples."""
    first, second = ({n: x.shape[1:] for n, x in each.inputs.items()} for each in (samples, others))
    return first == second


def trace_as_example(loaded: Loaded, task: Task, example: Samples) -> Program:
    """The model's program for inputs like ``example``, with its weights."""
    return _trace(loaded, task, example, task.open_sizes(example))


def _trace(loaded: Loaded, task: Task, example: Samples, dynamic: OpenSizes) -> Program:
    wrap = task.choose_wrapper(loaded.model, example)
    found = passes.frontend.trace.trace_to_program(loaded.model, example.inputs, dynamic=dynamic, wrap=wrap)
    return loaded.with_weights(found)


def check_traced_outputs(source: str, program: Program, outputs: Sequence[Tensor], *, untrained: bool = False) -> None:
    """Raise MptkError if ``outputs`` are all zero or not finite, with the name of a weight that is not finite.

    Zeros would equal the outputs of any cut, and the proof would see nothing. ``untrained``: outputs may be zero
    because some parameters are, like the head of a new vision transformer; the proof has a stage for that.
    """
    # Not finite: the first weight that is not says where to look.
    if not all(output.isfinite().all() for output in outputs):
        weights = (name for name, like in program.state.likes.items() if like.is_floating_point())
        name = next((name for name in weights if not program.state[name].isfinite().all()), None)
        if name is not None:
            raise ModelError(f"{name} of {source} has numbers that are not finite; give undamaged weights", name=name)
        raise ModelError(
            f"the outputs of {source} are not finite, though its weights are; give undamaged ones", name=source
        )
    if not any(output.any() for output in outputs) and not (untrained and _has_zero_parameters(program)):
        raise ModelError(
            f"the outputs of {source} are all zero: its weights are zero, or too large to be squared; give trained "
            "ones",
            name=source,
        )


def _has_zero_parameters(program: Program) -> bool:
    state = program.state
    return {bool(state[n].any()) for n in program.parameters if state.find_like(n).is_floating_point()} == {True, False}


# ---- plain modules ----


TRACE_SECONDS = 120.0
"""Seconds of computing after which a plain module is traced for one size (with all open, Swin-T takes 530)."""


def compare_if_it_fits(program: Program, loaded: Loaded, example: Samples) -> Program:
    """Compare the program with its class if all weights fit in memory; else add a note."""
    # In float32, 4 bytes each, with as much memory left to compute in.
    if 4 * sum(p.numel() for p in loaded.model.parameters()) > measure_free_memory() / 2:
        return replace(program, limits=replace(program.limits, note="the class itself was not run, as it is too large"))
    return compare_to_module(program, _collect_weights(loaded), example.tensors)


def trace_module(loaded: Loaded, example: Samples, seconds: float = TRACE_SECONDS) -> Program:
    """The program of a plain module, equal to the module itself, with as many symbolic sizes as possible.

    ``seconds``: the processor time after which the trace with all sizes symbolic is given up.
    """
    causes: list[MptkError] = []
    dynamic: bool | tuple[int, ...]
    # All sizes open, then only the batch size, then none. The first cause explains why a size is fixed.
    for dynamic in (True, (0,), False):
        try:
            found = _trace_with_gradients(loaded, example, dynamic, seconds)
        except MptkError as error:
            causes.append(error)
            continue
        if causes:
            kept = "batch size" if dynamic else "no size"
            found = replace(found, limits=replace(found.limits, note=f"{kept} is left open, since {causes[0].cause}"))
        # The comparison was in the module's own types. From here on the program computes in one wide type.
        types = {like.dtype for like in found.state.likes.values() if like.is_floating_point()}
        if types <= {choose_wide_type(loaded.model)}:
            return found
        retyped = Retype(choose_wide_type(loaded.model))(found).program
        return loaded.with_weights(retyped)
    raise causes[0]


def _trace_with_gradients(loaded: Loaded, example: Samples, dynamic: bool | tuple[int, ...], seconds: float) -> Program:
    """A trace that equals the module. Gradients are on, so that it trains alike, unless that changes outputs."""
    try:
        with torch.enable_grad():
            return _trace_and_compare(loaded, example, dynamic, seconds)
    except GradientMode:
        with torch.no_grad():
            return _trace_and_compare(loaded, example, dynamic, seconds)


def _trace_and_compare(loaded: Loaded, example: Samples, dynamic: bool | tuple[int, ...], seconds: float) -> Program:
    """The program in the module's own types, compared with the module."""
    name = type(loaded.model).__name__
    with (
        limit_processor_time(seconds, f"the trace of {name} for inputs of any size")
        if dynamic is True
        else nullcontext()
    ):
        traced = passes.frontend.trace.trace_to_program(loaded.model, example.inputs, dynamic=dynamic)
    wide = loaded.with_weights(traced)
    own = {name: partial(Tensor.to, dtype=like.dtype) for name, like in traced.state.likes.items()}
    exact = replace(wide, state=wide.state.with_edits(own))
    return compare_to_module(exact, _collect_weights(loaded), example.tensors)


def _collect_weights(loaded: Loaded) -> Mapping[str, Tensor]:
    return {} if loaded.weights is None else loaded.weights
