"""reap: score whole experts by their contribution to their tokens, other units by Wanda.

Source: Lasby et al. 2025 (arXiv 2510.13999), router-weighted expert activation pruning. For expert j with router weight
g_j and output f_j

    S_j = mean over the tokens routed to j of g_j(x) · ‖f_j(x)‖₂

What differs: router weights and outputs are found in the graph. f_j are the rows of the last grouped product of a
    mixture, and g_j the number that multiplies each row. The norm of their product is |g_j| · ‖f_j‖₂. An expert without
    tokens scores 0. If a unit is a group of experts, its score is their sum. Families without experts get Wanda's
    score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from mptk.errors import AnalysisError, InputError
from mptk.ir import Analysis, AxisFacts, Cut, Group, Term, Variable, list_axes, name_base_op, resolve
from mptk.methods.criteria import wanda
from mptk.methods.criteria.base import Compensation, Criterion, Scores, sum_units
from mptk.methods.criteria.observe import (
    Calibration,
    Moments,
    Observation,
    Site,
    Watched,
    compute_moments,
    find_sites,
    gather_moments,
    measure_activations,
)


@dataclass(frozen=True)
class Routed:
    """``experts``: group of experts → S of each unit, [scopes, size]. ``seen``: Wanda's measurement for other families.

    ``tokens``: for each mixture the axis term of its experts, and the number of tokens routed to each, [experts].
    """

    experts: Mapping[Group, Tensor]
    seen: Mapping[Site, Observation]
    tokens: Sequence[tuple[Term, Tensor]]


def score_by_reap(evidence: Routed, variables: Sequence[Variable]) -> Scores:
    """S_j of each unit that is an expert; Wanda's score of the others."""
    experts = [v for v in variables if v.groups[0] in evidence.experts]
    others = wanda.score_by_wanda(evidence.seen, [v for v in variables if v not in experts])
    return others | {f.name: torch.stack([evidence.experts[group] for group in f.groups]) for f in experts}


def measure_experts(given: Calibration) -> Routed:
    """The contributions of experts, and Wanda's measurement for the others."""
    sites = find_sites(given.analysis)
    experts = [v for v in given.variables if all(_find_mixtures(sites, group) for group in v.groups)]
    if not experts:
        raise InputError(
            f"reap scores whole experts, and none are in {', '.join(v.name for v in given.variables)}; name a family "
            "of experts in --families, or use --method wanda",
            name="families",
        )
    others = [v for v in given.variables if v not in experts]
    scores, tokens = _sum_contributions(replace(given, variables=experts), sites)
    return Routed(scores, measure_activations(replace(given, variables=others)), tokens)


def report_lost_experts(analysis: Analysis, cut: Cut, evidence: Routed) -> Compensation:
    """Say which share of the router's choices fell on removed experts. Nothing makes up for them."""
    chosen = sum(float(counts.sum()) for _, counts in evidence.tokens)
    gone = sum(float((counts * ~cut.mask_tensor((term,)).to(counts.device)).sum()) for term, counts in evidence.tokens)
    return Compensation(
        {}, f"{gone / max(chosen, 1):.1%} of the router's choices on the calibration text fell on removed experts"
    )


def _sum_contributions(
    given: Calibration, sites: Sequence[Site]
) -> tuple[dict[Group, Tensor], list[tuple[Term, Tensor]]]:
    """The contribution of each unit in the groups of experts, float32 [scopes, size]; and ``Routed.tokens``."""
    # Watch the gated rows of each mixture of each group.
    facts = given.analysis.facts
    terms: dict[tuple[Group, fx.Node], Term] = {}
    watches: dict[tuple[Group, fx.Node], Watched] = {}
    for group in given.groups:
        for ends, (product, term) in _find_mixtures(sites, group).items():
            terms[group, ends] = term
            watches[group, ends] = (_find_gate(facts, product, group), ends), _compute_norms

    # The mean norm of an expert's rows is its S_j. A group of several mixtures has the sum.
    scores, tokens = dict[Group, Tensor](), dict[fx.Node, tuple[Term, Tensor]]()
    for (group, ends), seen in gather_moments(given, watches).items():
        own = sum_units(seen.mean[:, 0], (terms[group, ends],), 0, group)
        scores[group] = scores[group] + own if group in scores else own
        tokens[ends] = terms[group, ends], seen.count[:, 0]
    return scores, list(tokens.values())


def _compute_norms(rows: Tensor, ends: Tensor) -> Moments:
    """Moments of the norms of [rows, width], sorted by expert: [experts, 1]."""
    return compute_moments(rows.float().norm(dim=1, keepdim=True), 1, (0,), ends)


def _find_mixtures(sites: Sequence[Site], group: Group) -> dict[fx.Node, tuple[fx.Node, Term]]:
    """The ends of routed rows of each mixture → its last grouped product, and the axis term of its experts."""
    found = {}
    for site in sites:
        if site.ends is not None:
            term = site.weight_dims[site.shared[0][1]]
            if group.axis in set(list_axes(term)):
                found[site.ends] = site.node, term  # sites are in the graph's order: the last product stays
    return found


def _find_gate(facts: AxisFacts, product: fx.Node, group: Group) -> fx.Node:
    """The first multiplication of a product's rows by one number per row that does not depend on the rows."""
    rows, made, order = resolve(facts.dims(product)[0]), {product}, list(facts.graph.nodes)
    for node in order[order.index(product) + 1 :]:
        # Follow values that are made of the rows and are still in their order.
        dims = facts.results.get(node)
        if made.isdisjoint(node.all_input_nodes) or not isinstance(dims, tuple) or resolve(dims[0]) != rows:
            continue
        factors = [source for source in node.all_input_nodes if source not in made and source in facts.activations]
        if name_base_op(node.target) in ("mul", "mul_") and any(x.meta["val"].shape[1:] == (1,) for x in factors):
            found: fx.Node = node
            return found
        made.add(node)
    raise AnalysisError(
        f"no router weight multiplies the outputs of {group.layer}'s experts, so reap cannot score them; use --method "
        "wanda",
        name=group.layer,
    )


REAP = Criterion(
    "reap",
    "experts by router weight × output norm; other families by wanda",
    measure_experts,
    score_by_reap,
    compensate=report_lost_experts,
)
