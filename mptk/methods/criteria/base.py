"""What the criteria share: what they are given, and sums over the weights of a unit."""

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
class Evidence:
    """What a criterion may look at: the weights (through ``analysis``) and what it asked for in ``Criterion.needs``.

    ``observations`` holds the activations' moments at each contraction with a weight, ``gradients`` the calibration
    loss's gradient by weight name (mean over predicted tokens).
    """

    analysis: Analysis
    seed: int = 0
    observations: Mapping[Site, Observation] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Criterion:
    """A one-shot criterion: ``score`` gives each of the families [layers, scopes, size], higher = keep.

    ``needs`` says what has to be gathered first: nothing, the activations' moments, or the loss's gradients (both need
    calibration text). ``compensates``: consumers' biases make up for the mean of what is removed.
    """

    name: str
    summary: str
    score: Callable[[Evidence, Sequence[Family]], Scores]
    needs: Literal["nothing", "activations", "gradients"] = "nothing"
    compensates: bool = False


def sum_members(evidence: Evidence, families: Sequence[Family], importance: Callable[[str], Tensor]) -> Scores:
    """Sum ``importance(weight name)`` (the weight's shape) over all weights of each unit: every member of its group.

    An element that belongs to a unit twice (a square weight whose both dimensions are cut) counts twice.
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
    """Sum ``importance(observation)`` (the weight operand's shape) over the contractions that judge each unit.

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
    """The contractions that judge a group's units, each with the weight operand's dimension that holds them.

    Consumers (weights that sum over the units) if there are any. If not (query and key channels, which meet each other
    and no weight; whole experts), the contractions with weights that make or hold the units.
    """
    holding = [(s, d) for s in sites for d, term in enumerate(s.weight_dims) if group.axis in set(leaves(term))]
    consumers = [(s, d) for s, d in holding if d == s.weight_dim]
    return consumers or holding


def _total(parts: Iterable[Tensor]) -> Tensor:
    first, *rest = parts
    return sum(rest, first)


def unit_sums(values: Tensor, dims: Sequence[Term], dim: int, group: Group) -> Tensor:
    """Sum ``values`` (axis terms ``dims``) by unit of ``group``, whose axis lies in dimension ``dim``: [scopes, size].

    If the choice varies along an axis of another dimension (each expert's own channels), that dimension separates the
    rows; all others are summed out.
    """
    indices = unit_indices(dims, dim, group)
    summed = tuple(d for d, size in enumerate(indices[0].shape) if size == 1)
    values = values.float().sum(summed) if summed else values.float()
    result = torch.zeros(group.scopes * group.size, dtype=torch.float32, device=values.device)
    for index in indices:
        flat = torch.from_numpy(np.broadcast_to(index.squeeze(summed), values.shape).copy()).to(values.device).flatten()
        result.index_add_(0, flat[flat >= 0], values.flatten()[flat >= 0])
    return result.reshape(group.scopes, group.size)
