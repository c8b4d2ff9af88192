"""criteria: one-shot scores of each unit of each family, from the weights and a little text.

``one_shot`` runs all steps: ``gather``, ``score_evidence``, ``select``, ``compensate``. ``score`` runs the first two.
Each criterion is one file with one function, listed in ``CRITERIA``. ``docs/criteria.md`` says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from mptk.errors import MptkError
from mptk.ir.families import Analysis, Family
from mptk.ir.plan import FamilyPlan, Plan
from mptk.ir.resolved_plan import resolve_plan
from mptk.ir.samples import Samples, next_tokens
from mptk.methods.criteria import fisher, flap, greedy, influence, magnitude, random, reap, taylor, wanda
from mptk.methods.criteria.base import Criterion, Evidence, Scores, uses
from mptk.methods.criteria.flap import Compensation, compensate
from mptk.methods.criteria.observe import activations, find_sites, gradients
from mptk.plugins import find, with_plugins
from mptk.progress import Count
from mptk.protocols.task import Task
from mptk.staged.staged import EXECUTOR, Executor
from mptk.tasks import CAUSAL_LM
from passes.targets.choose_blocks import choose_blocks
from passes.targets.stock.learn import Stock

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("random", "random choice, from the seed", random.score, judges="both"),
        Criterion("magnitude", "L2 norm of all weights of a unit", magnitude.score),
        Criterion("wanda", "|weight| × input norm, summed over a unit's consumers", wanda.score, "activations"),
        Criterion("flap", "input variance × squared column norm; means go to biases", flap.score, "activations", True),
        Criterion("reap", "experts by router weight × output norm; other families by wanda", reap.score, "experts"),
        Criterion("fisher", "rise of the loss without a unit, to the second order", fisher.score, "slopes"),
        Criterion("taylor", "first-order change of the loss, |weight × gradient|", taylor.score, "gradients"),
        Criterion(
            "influence", "how far a block turns its input, 1 − cosine", influence.score, "blocks", judges="blocks"
        ),
        Criterion("greedy", "blocks one by one, by the loss without them", influence.score, "losses", judges="blocks"),
    )
}


def all_criteria() -> dict[str, Criterion]:
    """mptk's criteria and those of plugins (group ``mptk.criteria``), by name."""
    return with_plugins(CRITERIA, "mptk.criteria")


def find_criterion(name: str) -> Criterion:
    """The criterion of that name. Raises MptkError if there is none."""
    return find("criterion", name, all_criteria())


def needs_data(name: str) -> bool:
    """Whether a criterion reads calibration text. Raises MptkError if there is no such criterion."""
    return find_criterion(name).needs != "nothing"


def score(
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
            if ``needs_data(name)`` is False.
        families: names of the families to score; by default all of channels, or the depths if it judges blocks.
        seed: used by the random criterion.
        progress: called with (windows done, all windows).
        executor: runs the program.

    Returns:
        Family name → float32 [layers, scopes, size] on the CPU, higher = keep; layers in the order of
        ``family.groups``, rows as in ``Group.scopes``.

    Raises:
        MptkError: unknown criterion or family, text missing, a program without weights or of fixed sizes, a family
            that the criterion cannot score, scores that are not finite.
    """
    evidence = gather(analysis, name, windows, families=families, seed=seed, progress=progress, executor=executor)
    return score_evidence(evidence, name, families)


def gather(
    analysis: Analysis,
    name: str,
    windows: Tensor | Samples | None = None,
    *,
    families: Sequence[str] | None = None,
    seed: int = 0,
    objective: Task = CAUSAL_LM,
    progress: Count | None = None,
    executor: Executor = EXECUTOR,
    removals: Mapping[str, int] = MappingProxyType({}),
) -> Evidence:
    """Run the program on ``windows`` and keep what criterion ``name`` needs to score ``families``.

    ``compensate`` takes the evidence's ``observations``, too. Losses and gradients are those of ``objective``.
    ``executor`` runs it. ``removals``: depth → how many blocks ``greedy`` looks for. Other arguments and errors are
    those of ``score``.
    """
    criterion = find_criterion(name)
    if not analysis.program.has_values:
        raise MptkError(
            "this program was traced without weights and cannot be scored; trace the model with its weights"
        )
    channels, depths = _by_kind(_families(analysis, families, criterion))
    if criterion.needs == "nothing" and (criterion.judges != "channels" or not depths):
        return Evidence(analysis, seed)
    samples = _samples(name, windows)
    if criterion.needs == "losses":
        order = greedy.measure(analysis, depths, samples, objective, removals, progress, executor)
        return Evidence(analysis, seed, influences=order)
    influences = influence.measure(analysis, depths, samples, progress, executor)
    groups = [g for f in channels for g in f.groups]
    if criterion.needs == "gradients" and groups:
        names = dict.fromkeys(m.weight for g in groups for m in g.members)
        found = gradients(analysis.program, names, samples, objective, progress, executor)
        return Evidence(analysis, seed, gradients=found, influences=influences)
    if criterion.needs not in ("activations", "experts", "slopes") or not groups:
        return Evidence(analysis, seed, influences=influences)
    added = {}
    if criterion.needs == "experts":
        experts, groups = reap.divide(analysis, channels)
        added = reap.measure(analysis, experts, samples, progress, executor)
    sites = find_sites(analysis)
    used = dict.fromkeys(site for g in groups for site, _ in uses(sites, g))
    seen = activations(analysis, list(used), samples, progress, executor)
    if criterion.needs == "slopes":
        slopes = fisher.measure(analysis, channels, samples, objective, progress, executor)
        return Evidence(analysis, seed, seen, slopes=slopes, influences=influences)
    return Evidence(analysis, seed, seen, influences=influences, experts=added)


def _by_kind(families: Sequence[Family]) -> tuple[list[Family], list[Family]]:
    """The families whose units are channels, and the depths, whose units are whole blocks."""
    return [f for f in families if f.stack is None], [f for f in families if f.stack is not None]


def _samples(name: str, windows: Tensor | Samples | None) -> Samples:
    if windows is None:
        raise MptkError(f"{name} needs calibration text; pass windows of token ids, or use magnitude or random")
    if isinstance(windows, Samples):
        return windows
    if windows.ndim != 2 or windows.dtype != torch.int64 or not windows.numel():
        raise MptkError(f"calibration windows are {windows.dtype} {list(windows.shape)}; pass int64 [n, length]")
    return next_tokens(windows)


def score_evidence(evidence: Evidence, name: str, families: Sequence[str] | None = None) -> Scores:
    """Scores, in the form of ``score``, from the evidence that ``gather`` kept for the same criterion and families."""
    criterion = find_criterion(name)
    chosen = _families(evidence.analysis, families, criterion)
    channels, depths = _by_kind(chosen)
    found = criterion.score(evidence, channels if criterion.judges == "channels" else chosen)
    found |= influence.score(evidence, depths) if criterion.judges == "channels" else {}
    scores = {family: values.cpu() for family, values in found.items()}
    for family, values in scores.items():
        if not values.isfinite().all():
            raise MptkError(f"{name} gives {family} scores that are not finite; load the model in float32")
    return scores


def select(
    analysis: Analysis,
    scores: Scores,
    widths: Mapping[str, int],
    meta: Mapping[str, object] | None = None,
    stock: Stock | None = None,
) -> Plan:
    """Keep the ``width`` best units of each family in each layer and each scope row.

    On equal scores the lower index stays. Kept indices are ascending. ``meta`` goes into the plan. ``stock``: the class
    that must hold the blocks that stay.

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
        if family.stack is not None:
            units = choose_blocks(family.stack, scores[family.name].flatten().tolist(), width, stock)
            plans[family.name] = FamilyPlan(width, family.size, {family.stack.module: (units,)})
            continue
        order = scores[family.name].sort(dim=-1, descending=True, stable=True).indices
        kept = order[..., :width].sort(dim=-1).values.tolist()
        keep = {g.layer: tuple(tuple(row) for row in rows) for g, rows in zip(family.groups, kept, strict=True)}
        plans[family.name] = FamilyPlan(width, family.size, keep)
    return Plan(plans, meta or {})


@dataclass(frozen=True)
class OneShot:
    """The result of ``one_shot``.

    ``state``: weights to replace in the dense program before the cut (``program.with_state``); only FLAP's corrected
    biases. ``statement``: which biases were corrected and which not, for the report; "" for other criteria.
    """

    plan: Plan
    scores: Scores
    state: Mapping[str, Tensor] = field(default_factory=dict)
    statement: str = ""


def one_shot(
    analysis: Analysis,
    name: str,
    widths: Mapping[str, int],
    windows: Tensor | Samples | None = None,
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
        samples = _samples(name, windows)
        meta["calibration"] = {"windows": len(samples), "length": samples.positions}
    plan = select(analysis, scores, widths, meta)
    if not find_criterion(name).compensates:
        return OneShot(plan, scores)
    compensation = compensate(analysis, resolve_plan(analysis, plan), evidence.observations)
    return OneShot(plan, scores, compensation.state, compensation.statement)


def _families(
    analysis: Analysis, names: Sequence[str] | None, criterion: Criterion | None = None
) -> tuple[Family, ...]:
    """The families of these names; by default all channels or, for a criterion of blocks, all depths."""
    if names is None:
        return analysis.depths if criterion is not None and criterion.judges == "blocks" else analysis.families
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
