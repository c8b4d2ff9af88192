"""Which families the stock class of a zoo model accepts: how many widths, who refuses the others, and equal logits."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.tiny_models import Tiny
from benchmarks.tiny_wrappers import Logits
from benchmarks.zoo_plans import legal_widths, plan_of_widths
from mptk.errors import MptkError
from mptk.ir import Analysis, Depth, Family, FamilyPlan, Log, Plan, list_axes, resolve_plan
from passes.pipelines import cut_program
from passes.targets.choose_blocks import choose_blocks
from passes.targets.derived import find_derived_families
from passes.targets.legalize import cut_shapes
from passes.targets.stock.attempt import Refusal
from passes.targets.stock.learn import Stock
from passes.transforms.fold_norms import find_epsilons
from passes.verify import TOLERANCE

PREFIX = "model."
"""Where the wrapper that the zoo traces keeps the model."""
WIDTHS = 120


def stock_acceptance(analysis: Analysis, tiny: Tiny) -> dict[str, dict[str, Any]]:
    """For each family what the class of ``tiny.model`` accepts of it.

    Returns:
        family → ``accepted`` widths (alone, or in proportion ``with`` other families) ``of`` those tried, at most
        ``WIDTHS`` of what the graph takes; ``by`` and ``refusal``, the kind and the words of the first refusal (a validator's name comes first);
        ``reloaded``: "" if the stock class with the cut weights gave the cut graph's logits at accepted widths near 60 %
        of all families at once (or of this one alone), else why not; None if no width is accepted.
    """
    stock = _discover(analysis, tiny)
    derived = stock.derived
    rows, typical = {}, {}
    for family in analysis.families:
        name = family.name
        partners = min((g for g in stock.together if name in g and not g & derived.keys()), key=len, default={name})
        cuts = _thinned(list(_cuts(family, [analysis.family(n) for n in sorted(partners)])))
        answers = [] if name in derived else [(cut, stock.check_widths(cut)) for cut in cuts]
        accepted = [cut for cut, refusal in answers if refusal is None]
        refusals = [refusal for _, refusal in answers if refusal is not None]
        if name in derived:
            refusals = [Refusal("numeric", name, derived[name])]
        elif not accepted and name in stock.refusals:
            refusals = [stock.refusals[name]]
        row: dict[str, Any] = {"accepted": len(accepted), "of": len(cuts), "with": sorted(set(partners) - {name})}
        row["by"], row["refusal"] = (refusals[0].kind, _line(refusals[0])) if refusals else ("", "")
        row["reloaded"] = None
        if accepted:
            typical[name] = _typical(accepted, family)
        rows[name] = row
    for name, why in _reload_all(analysis, tiny, stock, typical):
        rows[name]["reloaded"] = why
    return rows | {family.name: _depth(analysis, tiny, stock, family) for family in analysis.depths}


def depth_acceptance(analysis: Analysis, tiny: Tiny) -> dict[str, dict[str, Any]]:
    """The same of the depths alone, for models of any kind."""

    def shapes(widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        return {n.removeprefix(PREFIX): shape for n, shape in cut_shapes(analysis, widths).items()}

    stock = Stock(tiny.model, {}, [], shapes)  # type: ignore[arg-type]
    return {family.name: _depth(analysis, tiny, stock, family) for family in analysis.depths}


def _depth(analysis: Analysis, tiny: Tiny, stock: Stock, family: Depth) -> dict[str, Any]:
    """The same of a depth: how many numbers of blocks the class holds, with blocks chosen by random scores."""
    rng, accepted, refusals = random.Random(0), {}, []
    stack = replace(family.stack, module=family.stack.module.removeprefix(PREFIX))
    for width in legal_widths(family):
        try:
            accepted[width] = choose_blocks(stack, [rng.random() for _ in range(family.size)], width, stock)
        except MptkError as error:
            refusals.append(" ".join(str(error).split())[:300])
    row: dict[str, Any] = {"accepted": len(accepted), "of": len(legal_widths(family)), "with": []}
    row |= {"by": "depth" if refusals else "", "refusal": refusals[0] if refusals else "", "reloaded": None}
    if accepted:
        width = min(accepted, key=lambda w: abs(w / family.size - 0.6))
        plan = Plan({family.name: FamilyPlan(width, family.size, {family.stack.module: (accepted[width],)})})
        row["reloaded"] = _reload(analysis, tiny, stock, plan, {stack.module: accepted[width]})
    return row


def _reload_all(
    analysis: Analysis, tiny: Tiny, stock: Stock, cuts: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[str, str]]:
    """Reload with all cuts at once and, if that is refused or differs, with each on its own."""
    together = {name: width for cut in cuts.values() for name, width in cut.items()}
    agree = all(together[name] == width for cut in cuts.values() for name, width in cut.items())
    every = plan_of_widths(analysis, together, random.Random(0)) if agree else Plan({})
    if len(cuts) > 1 and agree and stock.check_widths(together) is None and not _reload(analysis, tiny, stock, every):
        yield from ((name, "") for name in cuts)
    else:
        for name, cut in cuts.items():
            yield name, _reload(analysis, tiny, stock, plan_of_widths(analysis, cut, random.Random(0)))


def _thinned(cuts: list[dict[str, int]]) -> list[dict[str, int]]:
    """At most ``WIDTHS`` of the cuts, evenly spread."""
    return cuts if len(cuts) <= WIDTHS else [cuts[i * len(cuts) // WIDTHS] for i in range(WIDTHS)]


def _typical(cuts: list[dict[str, int]], family: Family) -> dict[str, int]:
    """The cut nearest 60 %, of those whose rows are whole multiples of 16 bytes if there are any (experts need it)."""
    return min(cuts, key=lambda cut: (any(w % 4 for w in cut.values()), abs(cut[family.name] / family.size - 0.6)))


def _line(refusal: Refusal) -> str:
    return " ".join(str(refusal).split())[:300]


def _discover(analysis: Analysis, tiny: Tiny) -> Stock:
    own = {g.axis for f in analysis.families for g in f.groups}
    others = {a.size for dims in analysis.weights.values() for d in dims for a in list_axes(d) if a not in own}

    def shapes(widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        return {n.removeprefix(PREFIX): shape for n, shape in cut_shapes(analysis, widths).items()}

    def forward(model: PreTrainedModel) -> None:
        Logits(model, tiny.wrapper.names)(*(tensor.to("meta") for tensor in tiny.inputs))  # type: ignore[arg-type]

    families = {f.name: f.size for f in analysis.families}
    norms = {
        f.name: {n.removeprefix(PREFIX): e for n, e in find_epsilons(analysis, f).items()} for f in analysis.families
    }
    derived = find_derived_families(analysis)
    return Stock(tiny.model, families, sorted(others), shapes, derived=derived, norms=norms, forward=forward)  # type: ignore[arg-type]


def _cuts(family: Family, partners: list[Family]) -> Iterator[dict[str, int]]:
    """Every width of ``family`` that the graph takes, the partners' widths in the same proportion."""
    for width in legal_widths(family):
        if all(p.size * width % family.size == 0 for p in partners):
            yield {p.name: p.size * width // family.size for p in partners}


def _reload(
    analysis: Analysis, tiny: Tiny, stock: Stock, plan: Plan, kept: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> str:
    """Cut to a plan, load the weights into the stock class, compare logits; why they differ, or ""."""
    try:
        folded = cut_program(analysis, resolve_plan(analysis, plan), Log())
        program, found = folded.program, stock.build_config(plan.widths, scalars=folded.epsilons, kept=kept)
        if isinstance(found, Refusal):
            return _line(found)
        attention = tiny.model.config._attn_implementation  # type: ignore[union-attr]
        model = found.model_class._from_config(found.config, attn_implementation=attention, dtype=torch.float32)
        model.load_state_dict({n.removeprefix(PREFIX): t for n, t in program.state_dict().items()})
        with torch.no_grad():
            cut = program(*tiny.inputs)
            reloaded = Logits(model, tiny.wrapper.names).eval()(*tiny.inputs)  # type: ignore[arg-type]
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    wrong = float((reloaded - cut).abs().max() / cut.abs().max())
    return "" if wrong <= TOLERANCE else f"logits differ by {wrong:.1e}"
