"""base: the input of criteria, and sums over the weights of a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mptk.errors import MptkError
from mptk.ir.axes import Term, leaves
from mptk.ir.families import Analysis, Family, Group, unit_indices
from mptk.methods.criteria.observe import Observation, Site

Scores = dict[str, Tensor]
"""Family name → score of every unit, float32 [layers, scopes, size]; higher means keep."""


@dataclass(frozen=True)
class Slopes:
    """What positions add to the loss's gradient in the masks of a family, float64 [layers, scopes, size].

    ``squares``: the sum of its squares over ``count`` positions. ``mean``: its mean.
    """

    squares: Tensor
    mean: Tensor
    count: int


@dataclass(frozen=True)
class Evidence:
    """The input of a criterion: the weights (through ``analysis``) and what its ``Criterion.needs`` asks for.

    ``observations``: moments of the activations at each contraction with a weight. ``gradients``: weight name →
    gradient of the calibration loss, a mean over predicted tokens. ``slopes``: family → those of the loss in its masks.
    ``influences``: depth → each block's influence, or its rank. ``experts``: group of experts → what each of its units
    adds to its tokens, [scopes, size].
    """

    analysis: Analysis
    seed: int = 0
    observations: Mapping[Site, Observation] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    slopes: Mapping[str, Slopes] = field(default_factory=dict)
    influences: Mapping[str, Tensor] = field(default_factory=dict)
    experts: Mapping[Group, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Criterion:
    """A one-shot criterion: ``score`` gives each family [layers, scopes, size], higher = keep.

    ``needs``: what is gathered first: nothing, moments of activations, those and what experts add, gradients of the
    loss, moments and slopes of the loss in the masks, only the influence of blocks, or the losses without blocks. All
    but the first need calibration text. ``compensates``: consumers' biases absorb the mean of the removed units.
    ``judges``: channels, whole residual blocks, or both. Blocks that it does not judge are scored by influence.
    """

    name: str
    summary: str
    score: Callable[[Evidence, Sequence[Family]], Scores]
    needs: Literal["nothing", "activations", "experts", "gradients", "slopes", "blocks", "losses"] = "nothing"
    compensates: bool = False
    judges: Literal["channels", "both", "blocks"] = "channels"


def sum_members(evidence: Evidence, families: Sequence[Family], importance: Callable[[str], Tensor]) -> Scores:
    """Sum ``importance(weight name)`` (the weight's shape) over all weights of each unit: every member of its group.

    If an element belongs to a unit twice (both dimensions of a square weight are cut), it counts twice.
    """
    weights = evidence.analysis.weights
    return {
        family.name: torch.stack(
            [
                _total(unit_sums(importance(m.weight), weights[m.weight], m.dim, group) for m in group.members)
                for group in family.groups
            ]
        )
        for family in families
    }


def sum_uses(evidence: Evidence, families: Sequence[Family], importance: Callable[[Observation], Tensor]) -> Scores:
    """Sum ``importance(observation)`` (the weight operand's shape) over the contractions that score each unit.

    These are its consumers or, if no weight sums over it, its producers (``observe.uses``).

    Raises:
        MptkError: a family has neither.
    """
    return {
        family.name: torch.stack([_use(evidence, family, g, importance) for g in family.groups]) for family in families
    }


def _use(evidence: Evidence, family: Family, group: Group, importance: Callable[[Observation], Tensor]) -> Tensor:
    found = uses(evidence.observations, group)
    if not found:
        raise MptkError(
            f"no weight sums over the units of {family.name} or makes them in {group.layer or 'the model'}, so their "
            "activations cannot be scored; use magnitude, taylor or random"
        )
    return _total(
        unit_sums(importance(evidence.observations[site]), site.weight_dims, dim, group) for site, dim in found
    )


def uses(sites: Iterable[Site], group: Group) -> list[tuple[Site, int]]:
    """The contractions that score a group's units, each with the dimension of its weight that holds them.

    If weights sum over the units, these are the consumers. If none does (query and key channels are multiplied with
    each other; whole experts are only selected), they are the contractions with weights that make or hold the units.
    """
    holding = [
        (site, d) for site in sites for d, term in enumerate(site.weight_dims) if group.axis in set(leaves(term))
    ]
    consumers = [(site, d) for site, d in holding if d == site.weight_dim]
    return consumers or holding


def _total(parts: Iterable[Tensor]) -> Tensor:
    first, *rest = parts
    return sum(rest, first)


def unit_sums(values: Tensor, dims: Sequence[Term], dim: int, group: Group) -> Tensor:
    """Sum ``values`` (axis terms ``dims``) by unit of ``group``, whose axis lies in dimension ``dim``: [scopes, size].

    If the choice varies along the axis of another dimension (each expert has its own channels), that dimension gives
    the scope rows. All other dimensions are summed.
    """
    indices = unit_indices(dims, dim, group)
    summed = tuple(d for d, size in enumerate(indices[0].shape) if size == 1)
    values = values.float().sum(summed) if summed else values.float()
    result = torch.zeros(group.scopes * group.size, dtype=torch.float32, device=values.device)
    for index in indices:
        flat = torch.from_numpy(np.broadcast_to(index.squeeze(summed), values.shape).copy()).to(values.device).flatten()
        result.index_add_(0, flat[flat >= 0], values.flatten()[flat >= 0])
    return result.reshape(group.scopes, group.size)
