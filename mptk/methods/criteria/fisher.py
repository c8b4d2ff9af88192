"""fisher: predicted rise of the loss if a unit is removed, to the second order, tempered by Wanda's score.

Sources: Theis et al. 2018 (arXiv 1801.05787), Fisher information as the curvature of the loss; Kwon et al. 2022 (arXiv
    2204.09656), the same for masks of heads and channels. The geometric mean with Wanda's score is ours
    (``docs/maskprune.md``).

A mask m = 1 multiplies the inputs of a unit's consumers. Position t adds γ_t = Σ_{k in unit} x_tk · ∂ℓ/∂x_tk to the
loss's gradient in the mask.

    g = mean γ,  F = mean γ² − g²,  F̂ = √(F · P² · mean F / mean P²),  s = ½ F̂ − g

P is Wanda's score, and the means in F̂ run over the units of a row. g counts only beyond two standard errors. F depends
on the loss, but outlying positions distort it. P does not depend on the loss, but has hardly any noise. MaskPrune
starts from the same scores.

What differs: if no weight sums over units (query and key channels, whole experts), or only under
    ``torch.vmap``, they have Wanda's score. The variance is over the positions of all calibration samples,
    thousands; the sources take one gradient per sample. A unit that is in several streams of activations has their sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mptk.ir import Group, Variable, find_unit_indices
from mptk.methods.criteria import wanda
from mptk.methods.criteria.base import Criterion, Scores
from mptk.methods.criteria.observe import (
    Calibration,
    Observation,
    Site,
    Stream,
    find_sites,
    find_uses,
    measure_activations,
    sum_gradients,
)
from mptk.staged.partition import find_vmap_levels
from mptk.staged.staged import Tap

SMALLEST_FISHER = 1e-30
"""Least mean P² of a row: if all P are 0, so is F̂, and not NaN."""


@dataclass(frozen=True)
class Slopes:
    """What positions add to the loss's gradient in the masks (γ), float64 [layers, scopes, size].

    ``squares``: Σ γ² over ``count`` positions. ``mean``: the mean of γ.
    """

    squares: Tensor
    mean: Tensor
    count: int


@dataclass(frozen=True)
class Fisher:
    """``seen``: Wanda's measurement. ``slopes``: variable → gradients of the loss in its masks."""

    seen: Mapping[Site, Observation]
    slopes: Mapping[str, Slopes]


def score_by_fisher(evidence: Fisher, variables: Sequence[Variable]) -> Scores:
    """s = ½ F̂ − g; without slopes, s = P."""
    priors, slopes = wanda.score_by_wanda(evidence.seen, variables), evidence.slopes
    return {name: _score(slopes[name], prior) if name in slopes else prior for name, prior in priors.items()}


def _score(seen: Slopes, prior: Tensor) -> Tensor:
    curvature = (seen.squares / seen.count - seen.mean.square()).clamp_min(0)
    slope = subtract_noise(seen.mean, (curvature / seen.count).sqrt())
    return (0.5 * combine_curvature(curvature, prior.detach()) - slope).float()


def combine_curvature(curvature: Tensor, prior: Tensor) -> Tensor:
    """F̂: the geometric mean of F and P², scaled to the mean of F over the units of a row, [..., size]."""
    squares = prior.to(curvature).square()
    scale = squares.mean(-1, keepdim=True).clamp_min(SMALLEST_FISHER)
    return (curvature * squares * curvature.mean(-1, keepdim=True) / scale).sqrt()


def subtract_noise(value: Tensor, error: Tensor) -> Tensor:
    """``value`` moved towards 0 by two standard errors, so that noise gives 0."""
    return value.sign() * (value.abs() - 2 * error).clamp_min(0)


def measure_fisher(given: Calibration) -> Fisher:
    """Wanda's measurement, and the slopes of units that weights sum over."""
    return Fisher(measure_activations(given), _measure_slopes(given))


def _measure_slopes(given: Calibration) -> dict[str, Slopes]:
    # Values under ``torch.vmap`` are not tapped: families that only these read get Wanda's score.
    hidden = {node for level in find_vmap_levels(given.analysis.program.graph.graph) for node in level}
    sites = [site for site in find_sites(given.analysis) if site.x not in hidden]

    # Tap what each consumer of each group reads. If one group of a family has no consumer, the family has no slopes.
    sums: dict[str, Tensor] = {}
    taps: list[Tap] = []
    for variable in given.variables:
        read = [_read(group, sites) for group in variable.groups]
        if not all(read):
            continue
        sums[variable.name] = torch.zeros(2, len(variable.groups), variable.scopes, variable.size, dtype=torch.float64)
        for layer, (group, found) in enumerate(zip(variable.groups, read, strict=True)):
            for site in found:
                nodes = (site.x,) if site.ends is None else (site.x, site.ends)
                taps.append((nodes, partial(_add, sums[variable.name][:, layer], site.stream, _index(site, group))))
    if not taps:
        return {}

    # The loss is a sum over predictions. Scaled so, γ is what a position would add if each position predicted.
    count = len(given.samples) * given.samples.positions
    scale = count / given.objective.count_predictions(given.samples)
    _, share = sum_gradients(given, lambda loss: loss * scale, taps=taps)
    total = {name: share.sum_all(found.to(given.executor.device)).cpu() for name, found in sums.items()}
    return {name: Slopes(found[1], found[0] / count, count) for name, found in total.items()}


def _read(group: Group, sites: Sequence[Site]) -> list[Site]:
    """The contractions that sum over a group's units, one for each stream of activations."""
    found: dict[Stream, Site] = {}
    for site, dim in find_uses(sites, group):
        if dim == site.weight_dim:
            found.setdefault(site.stream, site)
    return list(found.values())


def _index(site: Site, group: Group) -> Tensor:
    """The unit at each position of the activation, [shared, K]; ``scopes · size`` if there is none."""
    # -1 stands for no unit. Each position belongs to at most one, so the maximum over the indices finds it.
    index = np.max(find_unit_indices(site.weight_dims, site.weight_dim, group), axis=0)
    order = [*(w for _, w in site.shared), site.weight_dim]
    sizes = [site.weight_dims[d].size if d in order else 1 for d in range(len(site.weight_dims))]
    rest = [d for d in range(len(sizes)) if d not in order]
    units = torch.from_numpy(np.broadcast_to(index, sizes).copy()).permute(*order, *rest)
    return torch.where(units < 0, group.scopes * group.size, units).reshape(-1, sizes[site.weight_dim])


def _add(sums: Tensor, stream: Stream, index: Tensor, gradient: Tensor, x: Tensor, ends: Tensor | None = None) -> None:
    """Add Σ γ and Σ γ² of a batch to ``sums``, [2, scopes, size]."""
    _, dim, shared, _ = stream
    units = sums[0].numel()
    each = x.float() * gradient.float()
    index = index.to(each.device)
    if ends is None:
        others = [d for d in range(x.ndim) if d != dim and d not in shared]
        parts = each.permute(*shared, *others, dim).reshape(len(index), -1, x.shape[dim])
        found = [_sum_by_unit(part, row, units) for part, row in zip(parts, index, strict=True)]
        slopes = [torch.stack(found).sum(0)]
    else:  # rows are sorted by expert; those after the last belong to none
        rows, stops = each.movedim(dim, -1), [0, *ends.tolist()]
        spans = itertools.pairwise(stops)
        slopes = [_sum_by_unit(rows[start:end], row, units) for (start, end), row in zip(spans, index, strict=True)]
    for slope in slopes:
        sums[0] += slope.sum(0).double().cpu().view_as(sums[0])
        sums[1] += slope.square().sum(0).double().cpu().view_as(sums[1])


def _sum_by_unit(each: Tensor, row: Tensor, units: int) -> Tensor:
    """[rows, K] → [rows, units]: the sums over the positions of a unit."""
    # If each position is a unit, there is nothing to sum.
    if len(row) == units and row.equal(torch.arange(units, device=row.device)):
        return each
    return each.new_zeros(len(each), units + 1).index_add_(1, row, each)[:, :units]  # the last column is of no unit


FISHER = Criterion(
    "fisher", "rise of the loss without a unit, to the second order", measure_fisher, score_by_fisher, passes=4
)
