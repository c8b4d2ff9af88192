"""pipelines: the ordered lists of passes that the product runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mptk.errors import MptkError
from mptk.ir.families import Analysis
from mptk.ir.passes import Log, Pass, run
from mptk.ir.resolved_plan import Cut
from passes.transforms.fold_norms import Folded, FoldNorms
from passes.transforms.masked_reference import Mask
from passes.transforms.rewrite import Rewrite


def cutting(analysis: Analysis, cut: Cut) -> list[Pass]:
    """The dense program → the pruned one."""
    return [Rewrite(analysis, cut), FoldNorms()]


def reference(analysis: Analysis, cut: Cut) -> list[Pass]:
    """The dense program → the masked one, which the pruned one must equal."""
    return [Mask(analysis, cut)]


def passes_until(name: str, analysis: Analysis, cut: Cut) -> list[Pass]:
    """The pass of that name in ``cutting`` or ``reference``, after those before it.

    Raises:
        MptkError: there is no such pass.
    """
    lists = (cutting(analysis, cut), reference(analysis, cut))
    for steps in lists:
        for count, step in enumerate(steps, 1):
            if step.name == name:
                return steps[:count]
    raise MptkError(f"no pass {name!r}; choose one of: {', '.join(step.name for steps in lists for step in steps)}")


LISTS: tuple[Callable[..., Sequence[Pass]], ...] = (cutting, reference)
"""Every list, for ``mptk passes``."""


def cut_program(analysis: Analysis, cut: Cut, log: Log) -> Folded:
    """Run ``cutting``, unproven: the pruned program, and the norms' epsilons that changed."""
    folded = run(analysis.program, cutting(analysis, cut), log)[-1]
    assert isinstance(folded, Folded)
    return folded
