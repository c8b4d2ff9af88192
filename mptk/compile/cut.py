"""cut: from a choice to the cut program, and the form in which the target holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from mptk.ir.families import Analysis
from mptk.ir.program import ProgramModule
from mptk.ir.samples import Samples
from mptk.protocols.chain import Chosen, Compiled, Prepared
from mptk.protocols.values import Context
from passes.pipelines import cut_program
from passes.transforms.weight_types import Store


def apply_choice(prepared: Prepared, chosen: Chosen) -> Analysis:
    """The analysis over the dense weights with the choice's changes."""
    return prepared.analysis.with_weights(chosen.changes)


def round_analysis(prepared: Prepared, chosen: Chosen) -> Analysis:
    """The analysis over these weights, each rounded to the stored type."""
    analysis = apply_choice(prepared, chosen)
    return replace(analysis, program=Store(prepared.dtype).run(analysis.program).program)


def cut_to(prepared: Prepared, chosen: Chosen, context: Context) -> Compiled:
    """The program cut to the plan, still without ``written``."""
    analysis = round_analysis(prepared, chosen)
    pruned = cut_program(analysis, chosen.cut, context.log, prepared.dtype)
    return Compiled(prepared, chosen, analysis, pruned.program, pruned.exact, pruned.epsilons)


def compile_plan(prepared: Prepared, chosen: Chosen, samples: Samples, context: Context) -> Compiled:
    """Cut the program to the plan and find the form in which the target holds it."""
    compiled = cut_to(prepared, chosen, context)
    return replace(compiled, written=prepared.target.fit(compiled, samples[:1]))


def build_small_model(compiled: Compiled, weights: Mapping[str, Tensor], *, shared: bool = False) -> nn.Module:
    """The cut model in float32 for training: of its class or, if the target needs none, its graph's module.

    ``weights``: its state dict; may be empty if a class holds it. ``shared``: whether a class may use these tensors
    without a copy.
    """
    if compiled.written is not None:
        return compiled.written.stock.build(weights, shared=shared)
    return ProgramModule(compiled.program.with_state(weights))
