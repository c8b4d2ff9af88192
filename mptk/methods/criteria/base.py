"""base: the type of a criterion, and sums over the weights of a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from mptk.errors import AnalysisError
from mptk.ir import Analysis, Cut, Group, Kind, Term, Variable, find_unit_indices
from mptk.methods.criteria.observe import Calibration, Site, find_uses

Scores = dict[str, Tensor]
"""Variable's name → score of every unit, float32 [layers, scopes, size]; higher means keep."""

E = TypeVar("E")
T = TypeVar("T")


@dataclass(frozen=True)
class Compensation:
    """New values of biases by name, and a sentence for the report on the layers that have a bias."""

    state: Mapping[str, Tensor]
    statement: str


@dataclass(frozen=True)
class Criterion(Generic[E]):
    """A one-shot criterion: its measurement on text, and its score.

    ``measure`` gets the variables whose units it scores, and returns evidence of the criterion's own type. ``score``
    returns for each [layers, scopes, size], higher = keep. ``passes``: forward passes over the text that the
    measurement costs; a backward pass counts as two; 0: it needs no text. ``gradients``: whether it keeps the gradients
    of all weights. ``compensate`` changes consumers' biases to make up for removed units, or says what their removal
    costs. ``judges``: the kinds of units that it scores; blocks that it does not score get their influence.
    """

    name: str
    summary: str
    measure: Callable[[Calibration], E]
    score: Callable[[E, Sequence[Variable]], Scores]
    passes: int = 1
    gradients: bool = False
    compensate: Callable[[Analysis, Cut, E], Compensation] | None = None
    judges: tuple[Kind, ...] = ("channels",)


AnyCriterion = Criterion[Any]
"""A criterion whose type of evidence only the criterion knows."""


def sum_members(analysis: Analysis, variables: Sequence[Variable], importance: Callable[[str], Tensor]) -> Scores:
    """Sum ``importance(weight name)`` (the weight's shape) over all weights of each unit: every member of its group.

    If an element belongs to a unit twice (both dimensions of a square weight are cut), it counts twice.
    """
    weights = analysis.weights
    return {
        variable.name: torch.stack(
            [
                _sum_parts(sum_units(importance(m.weight), weights[m.weight], m.dim, group) for m in group.members)
                for group in variable.groups
            ]
        )
        for variable in variables
    }


def sum_uses(evidence: Mapping[Site, T], variables: Sequence[Variable], importance: Callable[[T], Tensor]) -> Scores:
    """Sum ``importance(evidence of a contraction)`` (the weight operand's shape) over each unit's contractions.

    A unit's contractions are its consumers or, if no weight sums over it, its producers (``observe.uses``).

    Raises:
        MptkError: the units of one have neither.
    """
    return {v.name: torch.stack([_use(evidence, v, group, importance) for group in v.groups]) for v in variables}


def _use(evidence: Mapping[Site, T], variable: Variable, group: Group, importance: Callable[[T], Tensor]) -> Tensor:
    found = find_uses(evidence, group)
    if not found:
        raise AnalysisError(
            f"no weight of {group.layer or 'the model'} sums over or makes the units of {variable.name}, so their "
            "activations cannot be scored; use magnitude, taylor or random",
            name=variable.name,
        )
    return _sum_parts(sum_units(importance(evidence[site]), site.weight_dims, dim, group) for site, dim in found)


def _sum_parts(parts: Iterable[Tensor]) -> Tensor:
    first, *rest = parts
    return sum(rest, first)


def sum_units(values: Tensor, dims: Sequence[Term], dim: int, group: Group) -> Tensor:
    """Sum ``values`` (axis terms ``dims``) by unit of ``group``, whose axis lies in dimension ``dim``: [scopes, size].

    If the choice varies along the axis of another dimension (each expert has its own channels), that dimension gives
    the scope rows. All other dimensions are summed.
    """
    # The dimensions that say nothing of the unit have size 1 in the index. They are summed first.
    indices = find_unit_indices(dims, dim, group)
    summed = tuple(d for d, size in enumerate(indices[0].shape) if size == 1)
    values = values.float().sum(summed) if summed else values.float()
    # Then each element is added to its unit; -1 in an index is an element of no unit.
    result = torch.zeros(group.scopes * group.size, dtype=torch.float32, device=values.device)
    for index in indices:
        flat = torch.from_numpy(np.broadcast_to(index.squeeze(summed), values.shape).copy()).to(values.device).flatten()
        result.index_add_(0, flat[flat >= 0], values.flatten()[flat >= 0])
    return result.reshape(group.scopes, group.size)
