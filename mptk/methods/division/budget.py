"""budget: the cost that a budget counts, and the legal widths that meet the budget, before any work."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from mptk.config import FREE, MOST_SPARSITY, Settings
from mptk.cost.budgets import CACHE_CONTEXT, KV_CACHE, LATENCY
from mptk.cost.model import CostModel, is_layered
from mptk.cost.operator_times import find_operator_times
from mptk.distributed.processes import connect_processes
from mptk.errors import AnalysisError, BudgetError, InputError, MptkError, TargetError
from mptk.ir import Alignment, Analysis, read_alignment
from mptk.plugins import explain_absent, load_parts
from mptk.progress import Progress
from mptk.protocols import Prepared
from passes.targets import legalize
from passes.targets.legalize import Candidate, LegalWidths
from passes.targets.onnx.quantize import BLOCKS
from passes.targets.width_choices import find_missing_partners, keep_complete_families

UNDECIDED = 0.5
"""The sparsity until a feature has chosen one: any that can be reached."""


def apply_budget(
    analysis: Analysis,
    legal: LegalWidths,
    settings: Settings,
    progress: Progress,
    itemsize: int | None = None,
    before: Analysis | None = None,
    planned: Sequence[str] = (),
) -> tuple[CostModel, Settings]:
    """The cost model of the settings' budget, and the settings with milliseconds turned into a sparsity.

    A latency comes from operator timings, measured now or earlier (``cost/operator_times.py``).

    ``itemsize``: bytes of a stored number. ``before``: as in ``CostModel``. ``planned``: the families of a given plan.

    Raises:
        MptkError: no such budget; no latency can be predicted; or the dense model already takes at most ``max_ms``.
    """
    s = settings
    if s.budget != LATENCY:
        return build_cost_model(analysis, s, itemsize, before), s
    if s.budget not in (predictors := load_parts("predictors")):
        raise InputError(
            f"nothing here predicts a {s.budget}; {explain_absent() or 'give another --budget'}", name="budget"
        )
    names = _list_variable(analysis, legal, s, planned)
    families = [f for f in map(analysis.family, names) if f.kind == "channels"]
    ladders = {f.name: legalize.list_aligned_widths(f, build_alignment(s)) for f in families}
    with connect_processes().main_process_first():  # the others read what the first has kept, so that all plan alike
        latency = predictors[s.budget](
            analysis, ladders, s.objective, lambda ops: find_operator_times(ops, s.threads, progress), context=s.context
        )
    cost = CostModel(analysis, s.budget, latency, itemsize=itemsize, before=before)
    if s.max_ms is None or s.fixed:
        return cost, s
    if s.chooses_type:  # the milliseconds are those of a type that is not known yet
        return cost, replace(s, sparsity=UNDECIDED)
    dense = latency({})
    if dense <= s.max_ms:
        raise BudgetError(
            f"{s.objective} of the dense model is predicted to take {dense:.2f} ms; ask for less than that",
            name="max_ms",
            nearest=(dense,),
        )
    wanted = 1 - s.max_ms / dense + s.tolerance
    return cost, replace(s, sparsity=min(wanted, MOST_SPARSITY))


def build_cost_model(
    analysis: Analysis, settings: Settings, itemsize: int | None = None, before: Analysis | None = None
) -> CostModel:
    """The cost model of a budget that needs no timings. ``itemsize``, ``before``: as in ``CostModel``."""
    return CostModel(
        analysis, settings.budget, itemsize=itemsize, before=before, context=settings.context or CACHE_CONTEXT
    )


def _list_variable(analysis: Analysis, legal: LegalWidths, settings: Settings, planned: Sequence[str]) -> list[str]:
    """Families that the settings and the target may cut."""
    s, there = settings, {f.name: f for f in analysis.all_families}
    if s.fixed:
        names = list(planned)
    else:
        layered = [n for n, f in there.items() if is_layered(f) and n not in {*legal.refused, *legal.left}]
        names = [*(s.families or layered), *s.widths]
    return [name for name in dict.fromkeys(names) if name in there and name not in s.keep]


def build_alignment(settings: Settings) -> Alignment:
    """The settings' alignment, with the block sizes of quantised graphs and the programs that will read the result."""
    blocks = tuple(BLOCKS[scheme] for scheme in settings.schemes if scheme in BLOCKS)
    return read_alignment(settings.align, blocks, settings.tensor_parallel, settings.engines)


def describe_left_whole(legal: LegalWidths) -> str:
    """A note on families that ``portable`` left out of the default cut; may be empty."""
    reasons: dict[str, list[str]] = {}
    for name, why in legal.left.items():
        reasons.setdefault(why, []).append(name)
    said = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    return f"left whole for other programs: {said}; --no-portable cuts all" if said else ""


def describe_nearest(prepared: Prepared) -> str:
    """A note if the cut is not within the tolerance of the sparsity, since no legal one is; may be empty."""
    s, candidates = prepared.settings, prepared.candidates
    if not candidates or s.layers == FREE or set(candidates[0].widths) <= set(s.widths):
        return ""
    best = min(candidates, key=lambda c: abs(c.sparsity - s.sparsity))
    if abs(best.sparsity - s.sparsity) <= s.tolerance:
        return ""
    return f"no legal cut removes {s.sparsity:.1%}; the nearest, {best.sparsity:.1%}, was taken"


def find_widths(prepared: Prepared) -> list[Candidate]:
    """Widths that meet the settings, most even first: for the model's own class or, with ``rehome``, another class.

    Raises:
        MptkError: no legal widths meet the budget (the message names the nearest), or a family cannot be cut.
    """
    try:
        return _find_within(prepared, prepared.legal)
    except MptkError as error:
        candidates, home = _find_elsewhere(prepared)
        if home is None:
            raise
        if not prepared.settings.rehome:
            raise error.reword(f"{error}; or give --rehome: {home} holds them with equal logits") from error
        return candidates


def _find_elsewhere(prepared: Prepared) -> tuple[list[Candidate], str | None]:
    """Candidates that the model's own class cannot hold but another class can, and the other class's name."""
    p = prepared
    legal = p.target.find_elsewhere(p.analysis, p.legal, build_alignment(p.settings))
    if legal is None:
        return [], None
    legal = replace(legal, left=p.legal.left)
    try:
        candidates = _find_within(p, legal)
    except MptkError:
        return [], None
    return candidates, p.target.name_home(p.analysis, p.loaded.model, p.legal, candidates[0].widths)


def _find_within(prepared: Prepared, legal: LegalWidths) -> list[Candidate]:
    """Candidates among ``legal`` widths."""
    s, cost = prepared.settings, prepared.cost
    names = [name for name in s.families or _list_default_families(prepared, legal) if name not in s.keep]
    names = names if s.families else keep_complete_families(names, legal.together)
    _check(prepared, legal, names)
    legal = limit_widths(fix_widths(legal, s.widths), prepared)
    if s.budget in (LATENCY, KV_CACHE):
        legal = legalize.drop_useless_widths(cost, legal, names)
        names = [name for name in names if s.families or len(legal.ladders[name]) > 1] or names
    lost = {} if prepared.start is None else prepared.start.plan.widths
    families = list(dict.fromkeys([*names, *s.widths, *lost]))
    as_it_was = {name: (width,) for name, width in lost.items() if name not in {*names, *s.widths}}
    legal = replace(legal, ladders={**legal.ladders, **as_it_was})
    candidates = legalize.find_candidates(cost, legal, families, s.sparsity)
    if set(names) <= set(s.widths):
        if s.divider:
            raise InputError(
                f"--width fixes every family, so {s.divider} has nothing to choose; leave out one of both",
                name="widths",
            )
        if not candidates:
            raise TargetError(
                f"the stock class refuses these widths together: {legal.accepts(s.widths)}", name=s.target
            )
        return candidates[:1]
    if s.chooses_type:  # any of them shows which families can be cut
        return legalize.choose_candidates(candidates, s.sparsity, 1.0, legalize.find_finest_families(legal, families))
    if s.max_ms is not None:
        _check_reached(prepared, legal, candidates)
    if s.layers == FREE and not any(abs(c.sparsity - s.sparsity) <= s.tolerance for c in candidates):
        return candidates[:1]  # equal layers are where the division starts
    splits = prepared.method.splits if s.divisions is None else s.divisions
    finest = legalize.find_finest_families(legal, families)
    others = describe_levers(prepared, legal, names)
    return legalize.choose_candidates(candidates, s.sparsity, s.tolerance, finest, splits, others)


def _check(prepared: Prepared, legal: LegalWidths, names: Sequence[str]) -> None:
    """Raise MptkError unless each of the families ``names`` can be cut, by this method and for this target."""
    s = prepared.settings
    if not names and not s.widths:
        raise _explain_nothing(prepared, legal)
    for name in [*names, *s.keep, *s.widths]:
        if name in s.keep:
            continue
        if (refusal := prepared.method.explain_refusal(prepared.analysis, name)) is not None:
            raise AnalysisError(refusal, name=name)
        if len(legal.ladders[name]) == 1:
            why = legal.refused.get(name, "no narrower width is legal")
            remedy = _choose_remedy(legal, "try --target graph", "name other --families")
            raise TargetError(f"{name} cannot be cut for target {s.target}: {why}; {remedy}", name=name)
        if missing := find_missing_partners(name, {*names, *s.widths}, legal.together):
            others = ", ".join(sorted(missing))
            raise TargetError(
                f"{name} can only be cut together with {others} for target {s.target}; "
                f"name them in --families, too{_choose_remedy(legal, ', or try --target graph')}",
                name=name,
                nearest=sorted(missing),
            )


def _explain_nothing(prepared: Prepared, legal: LegalWidths) -> MptkError:
    """The error if no family can be cut: why, and what to do."""
    s, variables = prepared.settings, prepared.variables.values()
    remedy = _choose_remedy(legal, "try --target graph", "see `mptk analyze` for each axis")
    why = "; ".join(f"{name}: {reason}" for name, reason in list(legal.refused.items())[:3])
    fixed = [v for v in variables if v.kind == "channels" and len(legal.ladders[v.name]) == 1]
    unaligned = [v.name for v in fixed if len(legalize.list_aligned_widths(v.family, Alignment(1))) > 1]
    if not why and s.only_layers is not None:
        why = f"--layers {s.layers} removes no blocks"
    elif not why and unaligned:
        why, remedy = (
            f"no narrower width of {', '.join(unaligned[:3])} is aligned",
            "give a smaller --align, as --align 1",
        )
    return TargetError(
        f"no family can be cut for target {s.target} ({why or 'none was found'}); {remedy}", name=s.target
    )


def _check_reached(prepared: Prepared, legal: LegalWidths, candidates: Sequence[Candidate]) -> None:
    """Raise MptkError unless a candidate takes ``max_ms`` or a little less; the message has the nearest ones."""
    s, dense = prepared.settings, prepared.cost.dense.latency_ms or 0.0
    if any(abs(c.sparsity - s.sparsity) <= s.tolerance for c in candidates):
        return
    nearest = [f"{(1 - c.sparsity) * dense:.2f} ms with {legalize.describe_widths(c.widths)}" for c in candidates[:3]]
    raise BudgetError(
        f"no legal widths {s.objective} in {s.max_ms:.2f} ms; nearest: {'; '.join(nearest) or 'none'}. "
        f"Ask for one of these; or {describe_levers(prepared, legal, candidates[0].widths if candidates else ())}",
        name="max_ms",
        nearest=((1 - c.sparsity) * dense for c in candidates[:3]),
    )


def _list_default_families(prepared: Prepared, legal: LegalWidths) -> list[str]:
    """The families that are cut by default: families that repeat over layers and that the method can score.

    A method that scores no channels removes blocks. A feature that divides the budget may remove both.
    """
    channels, blocks = (list_cuttable(prepared, legal, blocks=each) for each in (False, True))
    return [*channels, *blocks] if prepared.settings.divider else channels or blocks


def list_cuttable(prepared: Prepared, legal: LegalWidths, *, blocks: bool) -> list[str]:
    """The families inside layers, or the depths, that the target and the method can cut."""
    analysis, method = prepared.analysis, prepared.method
    names = legalize.choose_default_families(prepared.variables, legal)
    depths = [f.name for f in analysis.depths if names and len(legal.ladders.get(f.name, ())) > 1]
    return [name for name in (depths if blocks else names) if method.explain_refusal(analysis, name) is None]


def check_any(analysis: Analysis, cost: CostModel) -> None:
    """Raise MptkError, with reasons, if no weight of the model can be cut."""
    if not getattr(cost.dense, cost.budget):
        why = "; ".join(f"{b.weights[0]}: {b.reasons[0]}" for b in analysis.blocked[:3])
        raise AnalysisError(f"nothing in this model can be cut ({why or 'it has no weights'}); give another model")


def _choose_remedy(legal: LegalWidths, remedy: str, otherwise: str = "") -> str:
    """A remedy that names the target graph, for targets with a stock class only."""
    return otherwise if legal.stock is None else remedy


def describe_levers(prepared: Prepared, legal: LegalWidths, names: Collection[str]) -> str:
    """What else reaches a budget that no legal widths of the families ``names`` meet, for an error."""
    p, s, found = prepared, prepared.settings, list[str]()
    least = {name: legal.ladders[name][0] for name in names}

    def reaches(further: Collection[str]) -> bool:
        return (
            p.cost.compute_sparsity(least | {name: legal.ladders[name][0] for name in further})
            >= s.sparsity - s.tolerance
        )

    widths = [
        (legalize.list_aligned_widths(p.variables[name].family, at) for at in (build_alignment(s), Alignment(1)))
        for name in names
    ]
    if reaches(()) and any(len(own) < len(all_) for own, all_ in widths):
        found.append("give --align 1 for finer widths")
    if legal.left and reaches(legal.left):
        found.append(f"give --no-portable to cut {', '.join(legal.left)}, too")
    able = [
        n for n, ladder in legal.ladders.items() if len(ladder) > 1 and p.method.explain_refusal(p.analysis, n) is None
    ]
    others = [n for n in able if n not in {*names, *legal.left, *s.keep} and reaches((n,))]
    if others and not reaches(()):
        found.append(f"name {' or '.join(others)} in --families, too")
    found += [kind.lever[1] for kind in load_parts("conversions").values() if s.budget in kind.lever[0]]
    if legal.stock is not None:
        found.append("use --target graph")
    return "; or ".join(found or ["name other --families"])


def fix_widths(legal: LegalWidths, widths: Mapping[str, int]) -> LegalWidths:
    """Legal widths with some families fixed. Raises MptkError for a width that is not legal."""
    for name, width in widths.items():
        if width not in legal.ladders[name]:
            near = sorted(legal.ladders[name], key=lambda w: abs(w - width))[:3]
            raise BudgetError(
                f"{name} cannot have width {width}; the nearest legal ones are {sorted(near)}",
                name=name,
                nearest=sorted(near),
            )
    return replace(legal, ladders={**legal.ladders, **{name: (width,) for name, width in widths.items()}})


def limit_widths(legal: LegalWidths, prepared: Prepared) -> LegalWidths:
    """Legal widths that a larger cut still has units for. Raises MptkError if a family has none."""
    if prepared.start is None:
        return legal
    most = prepared.start.plan.widths
    ladders = {name: tuple(w for w in ws if w <= most.get(name, ws[-1])) for name, ws in legal.ladders.items()}
    if none := sorted(name for name, widths in ladders.items() if not widths):
        raise BudgetError(
            f"{prepared.settings.larger} has only {most[none[0]]} units of {none[0]} left; give a narrower --width, or "
            "leave it out",
            name=none[0],
            nearest=(most[none[0]],),
        )
    return replace(legal, ladders=ladders)
