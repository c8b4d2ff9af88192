"""reap: whole experts by what they add to their tokens; everything else by Wanda.

Source: Lasby et al. 2025 (arXiv 2510.13999), router-weighted expert activation pruning. For expert j with router weight
g_j and output f_j

    S_j = mean over the tokens routed to j of g_j(x) · ‖f_j(x)‖₂

What differs: router weights and outputs are found in the graph. f_j are the rows of the last grouped product of a
mixture, g_j is the number for each row that they are multiplied with. The norm is that of their product, which is
|g_j| · ‖f_j‖₂. An expert to which no token is routed has 0. If a unit is a group of experts, its score is their sum.
Families without experts get Wanda's score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from mptk.errors import MptkError
from mptk.ir.axes import Term, leaves, resolve
from mptk.ir.axis_facts import AxisFacts
from mptk.ir.families import Analysis, Family, Group
from mptk.ir.ops import base_name
from mptk.ir.samples import Samples
from mptk.methods.criteria import wanda
from mptk.methods.criteria.base import Evidence, Scores, unit_sums
from mptk.methods.criteria.observe import Moments, Site, Watched, find_sites, moments, moments_of
from mptk.progress import Count
from mptk.staged.staged import EXECUTOR, Executor


def score(evidence: Evidence, families: Sequence[Family]) -> Scores:
    """S_j of each unit that is an expert; Wanda's score of the other families."""
    experts = [family for family in families if family.groups[0] in evidence.experts]
    others = wanda.score(evidence, [family for family in families if family not in experts])
    return others | {f.name: torch.stack([evidence.experts[group] for group in f.groups]) for f in experts}


def divide(analysis: Analysis, families: Sequence[Family]) -> tuple[list[Group], list[Group]]:
    """The groups of ``families`` whose units are experts, and all others.

    Raises:
        MptkError: no family has experts.
    """
    sites = find_sites(analysis)
    experts = [f for f in families if all(_mixtures(sites, group) for group in f.groups)]
    if families and not experts:
        raise MptkError(
            f"reap scores whole experts, and none are among {', '.join(f.name for f in families)}; name a family of "
            "experts in --families, or use --method wanda"
        )
    others = [family for family in families if family not in experts]
    return [g for f in experts for g in f.groups], [g for f in others for g in f.groups]


def measure(
    analysis: Analysis,
    groups: Sequence[Group],
    samples: Samples,
    progress: Count | None = None,
    executor: Executor = EXECUTOR,
) -> dict[Group, Tensor]:
    """The score of each group's units on ``samples``, float32 [scopes, size].

    Raises:
        MptkError: nothing multiplies the rows that a layer's experts give; the program was traced for another size of
            input.
    """
    sites, facts = find_sites(analysis), analysis.facts
    terms: dict[tuple[Group, fx.Node], Term] = {}
    watches: dict[tuple[Group, fx.Node], Watched] = {}
    for group in groups:
        for ends, (product, term) in _mixtures(sites, group).items():
            terms[group, ends] = term
            watches[group, ends] = (_gated(facts, product, group), ends), _norms
    scores: dict[Group, Tensor] = {}
    for (group, ends), seen in moments(analysis.program, samples, watches, progress, executor).items():
        own = unit_sums(seen.mean[:, 0], (terms[group, ends],), 0, group)
        scores[group] = scores[group] + own if group in scores else own
    return scores


def _norms(rows: Tensor, ends: Tensor) -> Moments:
    """Moments of the norms of [rows, width], sorted by expert: [experts, 1]."""
    return moments_of(rows.float().norm(dim=1, keepdim=True), 1, (0,), ends)


def _mixtures(sites: Sequence[Site], group: Group) -> dict[fx.Node, tuple[fx.Node, Term]]:
    """The ends of each mixture of the group's experts → its last grouped product, and the term of its experts."""
    found = {}
    for site in sites:
        if site.ends is not None:
            term = site.weight_dims[site.shared[0][1]]
            if group.axis in set(leaves(term)):
                found[site.ends] = site.node, term
    return found


def _gated(facts: AxisFacts, product: fx.Node, group: Group) -> fx.Node:
    """The first multiplication of a product's rows with one number for each row that is not made of them."""
    rows, made, order = resolve(facts.dims(product)[0]), {product}, list(facts.graph.nodes)
    for node in order[order.index(product) + 1 :]:
        dims = facts.results.get(node)
        if made.isdisjoint(node.all_input_nodes) or not isinstance(dims, tuple) or resolve(dims[0]) != rows:
            continue  # not made of the rows, or no longer in their order
        factors = [source for source in node.all_input_nodes if source not in made and source in facts.activations]
        if base_name(node.target) in ("mul", "mul_") and any(map(_one_for_each_row, factors)):
            found: fx.Node = node
            return found
        made.add(node)
    raise MptkError(
        f"no router weight multiplies what the experts of {group.layer} give, so reap cannot score them; use --method "
        "wanda"
    )


def _one_for_each_row(node: fx.Node) -> bool:
    return tuple(node.meta["val"].shape[1:]) == (1,)
