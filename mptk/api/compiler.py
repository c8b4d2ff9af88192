"""compiler: the steps of the compiler as functions: trace, analyse, rewrite, show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

import passes.frontend.trace
from mptk.api.words import wrap_public
from mptk.compat.torch import forget_sources
from mptk.conversions import read_plan_conversions
from mptk.errors import InputError, PlanError
from mptk.io import models, unwrap_parallel
from mptk.ir import (
    Analysis,
    Cut,
    Log,
    Pass,
    PassResult,
    Plan,
    Program,
    describe_program,
    list_removed_blocks,
    list_state_shapes,
    resolve_plan,
    run_passes,
)
from mptk.tasks import match_task
from passes.analysis import group
from passes.analysis.rules import rule
from passes.check_cut import Unmoved, check_cut, refine_weight_types, replace_faint_weights
from passes.frontend.eager import compare_to_module
from passes.frontend.trace import ExampleInputs
from passes.pipelines import cutting, list_passes_until
from passes.transforms.rewrite import Rewrite

__all__ = ["analyze", "rewrite", "rule", "show", "trace"]


@wrap_public
@forget_sources()
def trace(
    model: nn.Module | str | Path, example_inputs: ExampleInputs | None = None, *, dynamic: bool = False
) -> Program:
    """Trace a model to a Program.

    Args:
        model: any ``nn.Module`` (its weights may be on the meta device), or the name of a model: a hub id, a local
            folder, a ``.gguf`` file or a packaged alias. Of a named model only the config is read.
        example_inputs: tensors for ``forward``, by position or by name; transformers models do not need them.
        dynamic: leave batch size and sequence length symbolic, so that the program runs at any.

    Raises:
        MptkError: the model is not found, or torch.export cannot trace it.
    """
    module = unwrap_parallel(model) if isinstance(model, nn.Module) else models.build_skeleton(str(model))
    if example_inputs is not None or (task := match_task(module)) is None:
        return passes.frontend.trace.trace_to_program(module, example_inputs, dynamic=dynamic)
    example = task.make_example(module)
    sizes = task.open_sizes(example) if dynamic else False
    wrap = task.choose_wrapper(module, example)
    return passes.frontend.trace.trace_to_program(module, example.inputs, dynamic=sizes, wrap=wrap)


@wrap_public
@forget_sources()
def analyze(model: nn.Module | str | Path | Program, example_inputs: ExampleInputs | None = None) -> Analysis:
    """Find the families of coupled channels that can be cut in a model, and the axes that cannot be cut, with reasons.

    Takes what ``trace`` takes, or a Program. Needs no weights.

    Raises:
        MptkError: as ``trace``; or an op has no axis rule.
    """
    return group.analyze_program(model if isinstance(model, Program) else trace(model, example_inputs))


@wrap_public
@forget_sources()
def rewrite(analysis: Analysis, plan: Plan, *, check: bool = True) -> Program:
    """Cut the analysed program to ``plan``: it gets smaller weights and shape constants, and equals the masked program.

    Args:
        check: prove the cut with a few forward passes. The traced program must equal the module, run as Python. On
            seeded inputs of the traced shapes the cut program must equal the masked one, and the mask must change the
            output. If a head of zeros hides the mask's effect, a copy with random numbers in place of the zeros is
            proven. A program without weights cannot be proven.

    Raises:
        MptkError: the plan does not fit the model; the module keeps state in Python; or the mask does not change the
            output, so that nothing is proven.
        ProofError: the cut program differs from the masked one; the message has the stage and the difference.
    """
    # The cut that is returned: of the program as it was given, and not of the finer copies that the proof may take.
    check_plain_plan(plan)
    steps = cutting(analysis, cut := resolve_plan(analysis, plan))
    # What is proven of a program says nothing of the module if the trace differs from it, so this comes first.
    if check and analysis.program.has_values and analysis.program.source is not None:
        analysis = replace(analysis, program=compare_to_module(analysis.program))
    results = run_passes(analysis.program, steps, Log())
    # The proof's weights are float32: folded norms would round coarser ones. If a head of zeros hides the mask, a copy
    # with random numbers in their place is proven by the same steps.
    if check and results[-1].program.has_values:
        fine = refine_weight_types(analysis)
        try:
            _prove(fine, cut, steps, results if fine is analysis else run_passes(fine.program, steps, Log()))
        except Unmoved:
            if (woken := replace_faint_weights(fine)) is None:
                raise
            _prove(woken, cut, steps, run_passes(woken.program, steps, Log()))
    return replace(results[-1].program, source=None)  # the module that was traced is not this program's


def _prove(analysis: Analysis, cut: Cut, steps: Sequence[Pass], proven: Sequence[PassResult]) -> None:
    """Compare the result of each of ``steps`` with the masked program."""
    stages = {step.name: result.program for step, result in zip(steps, proven, strict=True)}
    if list_removed_blocks(analysis, cut):
        del stages[Rewrite.name]  # it leaves the blocks to the pass after it
    check_cut(analysis, cut, stages)


@wrap_public
def show(
    model: nn.Module | str | Path | Program,
    example_inputs: ExampleInputs | None = None,
    *,
    after: str | None = None,
    plan: Plan | None = None,
    source: bool = False,
) -> str:
    """A program as text: one line for each value, with the names of its axes (``mptk.ir.text``).

    Takes what ``trace`` takes, or a Program. Needs no weights. Sizes of the inputs are symbolic if the model allows it.

    Args:
        after: the pass of the cutting or the reference pipeline after which the program is shown; default: as traced.
        plan: the plan that the pass cuts to.
        source: add the line of the model's source code to each call.

    Raises:
        MptkError: as ``analyze``; the plan does not fit; there is no such pass; or a pass is given without a plan or a
            plan without a pass.
    """
    # The program as traced, or after a pass, which needs a plan.
    check_pass(after, plan)
    program = model if isinstance(model, Program) else trace(model, example_inputs, dynamic=True)
    analysis = group.analyze_program(program)
    if after is None or plan is None:
        return describe_program(program, analysis, source=source)
    check_plain_plan(plan)
    cut = resolve_plan(analysis, plan)
    result = run_passes(program, list_passes_until(after, analysis, cut), Log())[-1].program
    # A pass that only masks leaves the old sizes, which must not be printed as the cut ones.
    sizes = {} if list_state_shapes(result) == list_state_shapes(program) else cut.sizes
    return describe_program(result, analysis, sizes, source=source)


def check_pass(after: str | None, plan: object | None) -> None:
    """Raise MptkError if a pass is given without a plan, or a plan without a pass."""
    if (after is None) != (plan is None):
        raise InputError(
            "a pass needs the plan that it cuts to, and a plan the pass; give both --after and --plan",
            name="plan" if plan is None else "after",
        )


def check_plain_plan(plan: Plan | None) -> None:
    """Raise MptkError if a plan converts the model first: the cut would then start from another model."""
    for kind, _ in () if plan is None else read_plan_conversions(plan):
        raise PlanError(
            f"this plan {kind.does}, which only mptk.prune can do; call mptk.prune(plan=...) with the plan's file",
            name=kind.name,
        )
