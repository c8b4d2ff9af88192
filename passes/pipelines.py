"""pipelines: the ordered lists of passes that the product runs."""

from __future__ import annotations

from mptk.ir.families import Analysis
from mptk.ir.passes import Log, Pass, run
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from mptk.ir.resolved_plan import resolve_plan
from passes.transforms.fold_norms import fold_norms
from passes.transforms.rewrite import rewrite_cut


def cut_program(
    analysis: Analysis, plan: Plan, log: Log, *, keep: dict[str, Program] | None = None
) -> tuple[Program, dict[float, float]]:
    """As ``rewrite``, unchecked, with the passes' differences in ``log`` and the program after each pass in ``keep``.

    Also returns the norms' epsilons that changed (old → new).
    """
    cut = resolve_plan(analysis, plan)
    epsilons: dict[float, float] = {}

    def fold(program: Program) -> Program:
        program, changed = fold_norms(program)
        epsilons.update(changed)
        return program

    steps = [Pass("rewrite", lambda _: rewrite_cut(analysis, cut)), Pass("fold norms", fold)]
    return run(analysis.program, steps, log, keep), epsilons
