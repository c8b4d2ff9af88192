"""criteria: one-shot scores. What each unit of each family is worth, from the weights and a little text.

``one_shot`` does all of it; ``gather``, ``score_evidence``, ``select`` and ``compensate`` are its steps, ``score`` the
first two of them. A criterion is a ``Criterion`` in ``CRITERIA``: its own file with one function; ``docs/criteria.md``
says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mptk.errors import MptkError
from mptk.ir.families import Analysis, Family
from mptk.ir.plan import FamilyPlan, Plan
from mptk.ir.resolved_plan import resolve_plan
from mptk.methods.criteria import flap, magnitude, random, taylor, wanda
from mptk.methods.criteria.base import Criterion, Evidence, Scores, uses
from mptk.methods.criteria.flap import Compensation, compensate
from mptk.methods.criteria.observe import activations, find_sites, gradients
from mptk.plugins import find, with_plugins
from mptk.progress import Count
from mptk.run.protocols import Task
from mptk.tasks import CAUSAL_LM

CRITERIA: dict[str, Criterion] = {
    c.name: c
    for c in (
        Criterion("random", "random choice, from the seed", random.score),
        Criterion("magnitude", "L2 norm of all weights of a unit", magnitude.score),
        Criterion("wanda", "|weight| × input norm, summed over a unit's consumers", wanda.score, "activations"),
        Criterion("flap", "input variance × squared column norm; means go to biases", flap.score, "activations", True),
        Criterion("taylor", "first-order change of the loss, |weight × gradient|", taylor.score, "gradients"),
    )
}


def all_criteria() -> dict[str, Criterion]:
    """mptk's criteria and those of plugins (group ``mptk.criteria``), by name."""
    return with_plugins(CRITERIA, "mptk.criteria")


def find_criterion(name: str) -> Criterion:
    """The criterion of that name. Raises MptkError with the names there are."""
    return find("criterion", name, all_criteria())


def needs_data(name: str) -> bool:
    """Whether a criterion looks at calibration text. Raises MptkError if there is no such criterion."""
    return find_criterion(name).needs != "nothing"


def score(
    analysis: Analysis,
    name: str,
    windows: Tensor | None = None,
    *,
    families: Sequence[str] | None = None,
    seed: int = 0,
    progress: Count | None = None,
) -> Scores:
    """Score every unit.

    Args:
        analysis: of a program traced on real weights; with ``dynamic=True`` if the criterion needs text.
        name: a key of ``CRITERIA``.
        windows: calibration text as token ids, int64 [n, length]; may be None if ``needs_data(name)`` is False.
        families: names of the families to score; all by default.
        seed: of the random criterion.
        progress: called with (windows done, windows in all).

    Returns:
        Family name → float32 [layers, scopes, size] on the CPU, higher = keep; layers in the order of
        ``family.groups``, rows as in ``Group.scopes``.

    Raises:
        MptkError: unknown criterion or family, text missing, a program without weights or of fixed sizes, a family
            that the criterion cannot score, scores that are not finite.
    """
    return score_evidence(
        gather(analysis, name, windows, families=families, seed=seed, progress=progress), name, families
    )


def gather(
    analysis: Analysis,
    name: str,
    windows: Tensor | None = None,
    *,
    families: Sequence[str] | None = None,
    seed: int = 0,
    objective: Task = CAUSAL_LM,
    progress: Count | None = None,
) -> Evidence:
    """Run the program on ``windows`` and keep what criterion ``name`` needs to score ``families``.

    The evidence's ``observations`` are also what ``compensate`` takes. ``objective``: whose loss gradients are of.
    Other arguments and errors are those of ``score``.
    """
    needs = find_criterion(name).needs
    if not analysis.program.has_values:
        raise MptkError(
            "this program was traced without weights and cannot be scored; trace the model with its weights"
        )
    if needs == "nothing":
        return Evidence(analysis, seed)
    if windows is None:
        raise MptkError(f"{name} needs calibration text; pass windows of token ids, or use magnitude or random")
    if windows.ndim != 2 or windows.dtype != torch.int64 or not windows.numel():
        raise MptkError(f"calibration windows are {windows.dtype} {list(windows.shape)}; pass int64 [n, length]")
    groups = [g for f in _families(analysis, families) for g in f.groups]
    if needs == "gradients":
        names = dict.fromkeys(m.weight for g in groups for m in g.members)
        return Evidence(analysis, seed, gradients=gradients(analysis.program, names, windows, objective, progress))
    sites = find_sites(analysis)
    used = dict.fromkeys(site for g in groups for site, _ in uses(sites, g))
    return Evidence(analysis, seed, observations=activations(analysis, list(used), objective.inputs(windows), progress))


def score_evidence(evidence: Evidence, name: str, families: Sequence[str] | None = None) -> Scores:
    """Scores, as ``score`` gives them, from what ``gather`` kept for the same criterion and families."""
    chosen = _families(evidence.analysis, families)
    scores = {f: s.cpu() for f, s in find_criterion(name).score(evidence, chosen).items()}
    for family, values in scores.items():
        if not values.isfinite().all():
            raise MptkError(f"{name} gives {family} scores that are not finite; load the model in float32")
    return scores


def select(
    analysis: Analysis, scores: Scores, widths: Mapping[str, int], meta: Mapping[str, object] | None = None
) -> Plan:
    """Keep the ``width`` best units of each family in each layer and each scope row.

    Of equal scores the unit with the lower index stays. Kept indices are ascending; ``meta`` goes into the plan.

    Raises:
        MptkError: a family that the model or ``scores`` does not have, a width outside 1..size.
    """
    plans = {}
    for family in _families(analysis, list(widths)):
        width = widths[family.name]
        if family.name not in scores:
            raise MptkError(f"{family.name} has no scores; score it before choosing its units")
        if not 1 <= width <= family.size:
            raise MptkError(f"{family.name} cannot keep {width} units; give a width in 1..{family.size}")
        order = scores[family.name].sort(dim=-1, descending=True, stable=True).indices
        kept = order[..., :width].sort(dim=-1).values.tolist()
        keep = {g.layer: tuple(tuple(row) for row in rows) for g, rows in zip(family.groups, kept, strict=True)}
        plans[family.name] = FamilyPlan(width, family.size, keep)
    return Plan(plans, meta or {})


@dataclass(frozen=True)
class OneShot:
    """What ``one_shot`` gives.

    ``state`` holds weights to replace in the dense program before cutting it (``program.with_state``), empty but for
    FLAP's corrected biases; ``statement`` says for the report what was corrected and what not ("" for other criteria).
    """

    plan: Plan
    scores: Scores
    state: Mapping[str, Tensor] = field(default_factory=dict)
    statement: str = ""


def one_shot(
    analysis: Analysis,
    name: str,
    widths: Mapping[str, int],
    windows: Tensor | None = None,
    *,
    seed: int = 0,
    progress: Count | None = None,
) -> OneShot:
    """Score the families in ``widths`` (family name → units kept) by criterion ``name``, choose, and correct biases.

    Arguments and errors are those of ``score`` and ``select``.
    """
    families = list(widths)
    evidence = gather(analysis, name, windows, families=families, seed=seed, progress=progress)
    scores = score_evidence(evidence, name, families)
    meta: dict[str, object] = {"criterion": name, "seed": seed}
    if windows is not None and needs_data(name):
        meta["calibration"] = {"windows": len(windows), "length": windows.shape[1]}
    plan = select(analysis, scores, widths, meta)
    if not find_criterion(name).compensates:
        return OneShot(plan, scores)
    compensation = compensate(analysis, resolve_plan(analysis, plan), evidence.observations)
    return OneShot(plan, scores, compensation.state, compensation.statement)


def _families(analysis: Analysis, names: Sequence[str] | None) -> tuple[Family, ...]:
    if names is None:
        return analysis.families
    try:
        return tuple(analysis.family(name) for name in names)
    except KeyError as error:
        raise MptkError(error.args[0]) from error


__all__ = [
    "CRITERIA",
    "Compensation",
    "Criterion",
    "Evidence",
    "OneShot",
    "Scores",
    "all_criteria",
    "compensate",
    "find_criterion",
    "gather",
    "needs_data",
    "one_shot",
    "score",
    "score_evidence",
    "select",
]
