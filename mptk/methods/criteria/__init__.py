"""criteria: one-shot scores of each unit, from the weights and a little text.

Each criterion is one file with its measurement on the text and its score. ``observe`` has the measurements that they
share, ``base`` the sums over a unit's weights. ``docs/criteria.md`` says how to add one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mptk.errors import AnalysisError, BudgetError, DataError, InputError, ModelError, TraceError, list_close_names
from mptk.ir import Analysis, Depth, FamilyPlan, Plan, Samples, Variable, make_token_samples
from mptk.methods.criteria.base import AnyCriterion, Compensation, Criterion, Scores
from mptk.methods.criteria.fisher import FISHER
from mptk.methods.criteria.flap import FLAP
from mptk.methods.criteria.greedy import GREEDY
from mptk.methods.criteria.influence import INFLUENCE
from mptk.methods.criteria.magnitude import MAGNITUDE
from mptk.methods.criteria.observe import Calibration
from mptk.methods.criteria.random import RANDOM
from mptk.methods.criteria.reap import REAP
from mptk.methods.criteria.taylor import TAYLOR
from mptk.methods.criteria.wanda import WANDA
from mptk.plugins import find_entry, with_plugins
from mptk.progress import Count
from mptk.staged.staged import EXECUTOR, Executor
from passes.targets.choose_blocks import choose_blocks
from passes.targets.stock.learn import Stock

CRITERIA: dict[str, AnyCriterion] = {
    each.name: each for each in (RANDOM, MAGNITUDE, WANDA, FLAP, REAP, FISHER, TAYLOR, INFLUENCE, GREEDY)
}


def list_criteria() -> dict[str, AnyCriterion]:
    """Criteria of mptk and of plugins (group ``mptk.criteria``), by name."""
    return with_plugins(CRITERIA, "mptk.criteria")


def find_criterion(name: str) -> AnyCriterion:
    """The criterion of that name. Raises MptkError if there is none."""
    return find_entry("criterion", name, list_criteria())


def score_units(
    analysis: Analysis,
    name: str,
    windows: Tensor | Samples | None = None,
    *,
    families: Sequence[str] | None = None,
    seed: int = 0,
    progress: Count | None = None,
    executor: Executor = EXECUTOR,
) -> Scores:
    """Score every unit.

    Args:
        analysis: of a program traced with weights, and with ``dynamic=True`` if the criterion needs text.
        name: a key of ``CRITERIA``.
        windows: calibration text as token ids, int64 [n, length], or samples of a model of another kind; may be None
            if the criterion's ``passes`` is 0.
        families: names of the families to score, or of layers of them; by default all families of channels or, if it
            scores blocks, the depths.
        seed: used by the random criterion.
        progress: called with (windows done, all windows).
        executor: runs the program.

    Returns:
        Name → float32 [layers, scopes, size] on the CPU, higher = keep; layers in the order of ``Variable.groups``,
        rows as in ``Group.scopes``.

    Raises:
        MptkError: unknown criterion or family, text missing, a program without weights or of fixed sizes, a family
            that the criterion cannot score, scores that are not finite.
    """
    criterion = find_criterion(name)
    if families is None:
        families = [f.name for f in (analysis.families if "channels" in criterion.judges else analysis.depths)]
    scored = find_variables(analysis, families)
    given = Calibration(analysis, scored, _make_samples(windows), seed, progress=progress, executor=executor)
    return measure_and_score(criterion, given)[0]


def measure_and_score(criterion: AnyCriterion, given: Calibration) -> tuple[Scores, object]:
    """Scores of all variables of ``given``, as in ``score_units``; and the criterion's measurement, None if unused.

    If the criterion does not score blocks, their influence does.
    """
    if not given.analysis.program.has_values:
        raise TraceError("a program without weights cannot be scored; trace the model with its weights")
    for variable in given.variables:
        if (why := find_score_refusal(criterion, variable)) is not None:
            raise AnalysisError(why, name=variable.name)
    # Blocks that the criterion does not score get their influence.
    own = [v for v in given.variables if v.kind in criterion.judges]
    others = [v for v in given.variables if v.kind not in criterion.judges]
    evidence, found = None, Scores()
    if others:
        found |= INFLUENCE.score(INFLUENCE.measure(replace(given, variables=others)), others)
    if own:
        evidence = criterion.measure(replace(given, variables=own))
        found |= criterion.score(evidence, own)
    if wrong := next((name for name, values in found.items() if not values.isfinite().all()), None):
        raise ModelError(
            f"{criterion.name} gives {wrong} scores that are not finite; load the model in float32", name=criterion.name
        )
    return {name: values.detach().cpu() for name, values in found.items()}, evidence


def find_score_refusal(criterion: AnyCriterion, variable: Variable) -> str | None:
    """The reason why units cannot be scored, or None."""
    if variable.kind in (*criterion.judges, *INFLUENCE.judges):
        return None
    return (
        f"this method scores whole blocks, not the channels of {variable.name}; name a depth, or use another --method, "
        "which also removes blocks, by their influence"
    )


def _make_samples(windows: Tensor | Samples | None) -> Samples | None:
    if windows is None or isinstance(windows, Samples):
        return windows
    if windows.ndim != 2 or windows.dtype != torch.int64 or not windows.numel():
        raise DataError(
            f"calibration windows are {windows.dtype} {list(windows.shape)}; pass int64 [n, length]", name="windows"
        )
    return make_token_samples(windows)


def select_units(analysis: Analysis, scores: Scores, widths: Mapping[str, int], stock: Stock | None = None) -> Plan:
    """Keep the best units, as many as ``widths`` says, in each layer and each scope row.

    Of equal scores the lower index stays. Kept indices are ascending. A layer without scores of its own has its
    family's. ``stock``: the class that must hold the result.

    Raises:
        MptkError: a name that the model or ``scores`` does not have, a width outside 1..size.
    """
    plans = {}
    for variable in find_variables(analysis, widths):
        name, family, width = variable.name, variable.family, widths[variable.name]
        if name not in scores and family.name not in scores:
            raise InputError(f"{name} has no scores; score it before choosing its units", name=name)
        if not 1 <= width <= family.size:
            raise BudgetError(f"{name} cannot keep {width} units; give a width in 1..{family.size}", name=name)
        # The class decides, too: if a block's kind follows from its position, it holds only some sets of blocks.
        if isinstance(family, Depth):
            units = choose_blocks(family.stack, scores[name].flatten().tolist(), width, stock)
            plans[name] = FamilyPlan(width, family.size, {family.stack.module: (units,)})
            continue
        own = scores[name] if name in scores else scores[family.name][list(variable.layers)]
        kept = own.sort(dim=-1, descending=True, stable=True).indices[..., :width].sort(dim=-1).values.tolist()
        keep = {g.layer: tuple(tuple(row) for row in rows) for g, rows in zip(variable.groups, kept, strict=True)}
        plans[name] = FamilyPlan(width, family.size, keep)
    return Plan(plans)


def find_variables(analysis: Analysis, names: Iterable[str]) -> tuple[Variable, ...]:
    """The variables of these names. Raises MptkError if the model lacks one."""
    found = []
    for name in names:
        try:
            found.append(analysis.variable(name))
        except KeyError as error:
            known = [family.name for family in analysis.all_families]
            raise InputError(error.args[0], name=name, nearest=list_close_names(name, known, cutoff=0)) from error
    return tuple(found)


__all__ = [
    "CRITERIA",
    "AnyCriterion",
    "Calibration",
    "Compensation",
    "Criterion",
    "Scores",
    "find_criterion",
    "find_score_refusal",
    "list_criteria",
    "measure_and_score",
    "score_units",
    "select_units",
]
