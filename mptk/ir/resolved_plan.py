"""resolved_plan: a plan resolved on an analysis, that is, which positions of which dimensions stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mptk.errors import PlanError, list_close_names
from mptk.ir.axes import Axis, Index, Term, compute_size, find_occurrences, list_axes
from mptk.ir.blocks import Block, Renumbering, Stack
from mptk.ir.families import Analysis, Depth, Group, Variable, scope_coordinates
from mptk.ir.plan import FamilyPlan, Plan, check_units


@dataclass(frozen=True)
class KeptUnits:
    """The kept units of one axis: ``table`` is boolean, [scopes, size], with the same number of units in each row."""

    scope: tuple[Axis, ...]
    table: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Cut:
    """Axis → its kept units. An axis without an entry stays whole."""

    choices: dict[Axis, KeptUnits]
    sizes: dict[Axis, int]

    def list_units(self, axis: Axis) -> list[int] | None:
        """The kept units of an axis without a scope, ascending; None if it stays whole."""
        choice = self.choices.get(axis)
        return None if choice is None else [int(unit) for unit in np.flatnonzero(choice.table[0])]

    def size(self, term: Term) -> int:
        """Size of a dimension after the cut."""
        return compute_size(term, self.sizes)

    @property
    def removes(self) -> bool:
        """Whether the cut removes any unit."""
        return any(not choice.table.all() for choice in self.choices.values())

    def has_choice(self, term: Term) -> bool:
        return any(leaf in self.choices for leaf in list_axes(term))

    def mask(self, term: Term) -> npt.NDArray[np.bool_]:
        """Whether each position of a dimension stays, [size]. A choice whose scope is not in it must not vary."""
        found = find_occurrences(term)
        stays = np.ones(term.size, dtype=bool)
        for leaf, coordinate in found:
            choice = self.choices.get(leaf)
            if choice is None:
                continue
            scope = scope_coordinates(found, choice.scope, term.size)
            assert scope is not None or (choice.table == choice.table[0]).all()
            rows = 0 if scope is None else scope
            stays &= choice.table[rows, coordinate] | (coordinate < 0)
        return stays

    def find_positions(self, term: Term) -> Index:
        """Kept positions of a dimension, ascending."""
        return np.flatnonzero(self.mask(term))

    def find_varying(self, dims: Sequence[Term]) -> int | None:
        """The index of a dimension along which the choice of another dimension varies; None if no choice does."""
        for term in dims:
            own = set(list_axes(term))
            for leaf in own & self.choices.keys():
                for scope in self.choices[leaf].scope:
                    if scope not in own:
                        return next(i for i, t in enumerate(dims) if scope in set(list_axes(t)))
        return None

    def mask_tensor(self, dims: Sequence[Term]) -> Tensor:
        """Boolean mask over a whole weight: True if every dimension keeps the position."""
        scope_dim = self.find_varying(dims)
        if scope_dim is None:
            keep = torch.ones([d.size for d in dims], dtype=torch.bool)
            for d, term in enumerate(dims):
                if self.has_choice(term):
                    shape = [-1 if i == d else 1 for i in range(len(dims))]
                    keep &= torch.from_numpy(self.mask(term)).reshape(shape)
            return keep
        rows = [
            self._restrict_to_row(dims, scope_dim, s).mask_tensor(dims).select(scope_dim, s)
            for s in range(dims[scope_dim].size)
        ]
        return torch.stack(rows, scope_dim)

    def slice(self, tensor: Tensor, dims: Sequence[Term]) -> Tensor:
        """The kept part of a weight, contiguous; the tensor itself if nothing is cut."""
        scope_dim = self.find_varying(dims)
        if scope_dim is not None:
            return self._slice_rows(tensor, dims, scope_dim)
        for d, term in enumerate(dims):
            if self.has_choice(term):
                tensor = tensor.index_select(d, torch.from_numpy(self.find_positions(term)).to(tensor.device))
        return tensor

    def scatter(self, tensor: Tensor, small: Tensor, dims: Sequence[Term]) -> Tensor:
        """A copy of ``tensor`` whose kept part is ``small``, the inverse of ``slice``."""
        result = tensor.detach().clone()
        result[self.mask_tensor(dims)] = small.flatten().to(result)
        return result

    def _slice_rows(self, tensor: Tensor, dims: Sequence[Term], scope_dim: int) -> Tensor:
        """Slice row by row: each row along ``scope_dim`` (an expert) keeps its own positions of other dimensions."""
        rest = [t for d, t in enumerate(dims) if d != scope_dim]
        kept = [
            self._restrict_to_row(dims, scope_dim, s).slice(tensor.select(scope_dim, s), rest)
            for s in self.find_positions(dims[scope_dim])
        ]
        return torch.stack(kept, scope_dim)

    def _restrict_to_row(self, dims: Sequence[Term], scope_dim: int, position: int) -> Cut:
        """The cut at one position of a scope's dimension, at which no other dimension's choice varies along it."""
        at = {leaf: int(coordinate[position]) for leaf, coordinate in find_occurrences(dims[scope_dim])}
        choices = dict(self.choices)
        for d, term in enumerate(dims):
            own = set(list_axes(term))
            for leaf in own & self.choices.keys() if d != scope_dim else ():
                choice = self.choices[leaf]
                fixed = {a: at[a] for a in choice.scope if a in at and a not in own}
                table = choice.table.reshape(*(a.size for a in choice.scope), -1)
                row = table[tuple(fixed.get(a, slice(None)) for a in choice.scope)]
                rest = tuple(a for a in choice.scope if a not in fixed)
                choices[leaf] = KeptUnits(rest, row.reshape(-1, table.shape[-1]))
        return Cut(choices, self.sizes)


def resolve_plan(analysis: Analysis, plan: Plan) -> Cut:
    """Match a plan with an analysis.

    Raises:
        MptkError: a family or layer that the model does not have, a width that does not fit, a layer left out.
    """
    choices: dict[Axis, KeptUnits] = {}
    for name, chosen in plan.families.items():
        try:
            variable = analysis.variable(name)
        except KeyError as error:
            known = [family.name for family in analysis.all_families]
            nearest = list_close_names(name, known, cutoff=0)
            raise PlanError(f"plan: {error.args[0]}", name=name, nearest=nearest) from error
        family = variable.family
        if chosen.of != family.size:
            raise PlanError(f"plan: {name} has {family.size} units in this model, not {chosen.of}", name=name)
        unknown = set(chosen.keep) - {g.layer for g in variable.groups}
        if unknown:
            raise PlanError(f"plan: {name} has no layer {sorted(unknown)[0]!r}; see `mptk analyze`", name=name)
        if chosen.width < family.minimum or chosen.width % family.multiple:
            raise PlanError(
                f"plan: {name} cannot have width {chosen.width}: it needs at least {family.minimum} "
                f"and a multiple of {family.multiple}",
                name=name,
            )
        for group in variable.groups:
            if group.axis in choices:
                raise PlanError(f"plan: {name} names units of {group.layer} that another family names, too", name=name)
            choices[group.axis] = KeptUnits(group.scope, _build_table(variable, group, chosen))
        if isinstance(family, Depth):
            _check_blocks(name, family.stack, choices[family.stack.axis])
    return Cut(choices, {axis: int(c.table[0].sum()) for axis, c in choices.items()})


def _check_blocks(name: str, stack: Stack, choice: KeptUnits) -> None:
    for unit, why in stack.stay.items():
        if not choice.table[0, unit]:
            raise PlanError(f"plan: {name} cannot lose block {unit}, {stack.blocks[unit].module}: {why}", name=name)


def collect_kept_units(analysis: Analysis, cut: Cut, names: Sequence[str]) -> dict[str, Tensor]:
    """The units that a plan keeps: variable's name → boolean [layers, scopes, size]."""
    return {
        name: torch.stack([torch.from_numpy(cut.choices[group.axis].table) for group in analysis.variable(name).groups])
        for name in names
    }


def list_removed_blocks(analysis: Analysis, cut: Cut) -> list[Block]:
    """The blocks that a cut removes, in the graph's order."""
    return [
        block
        for stack in analysis.stacks
        if (kept := cut.list_units(stack.axis)) is not None
        for unit, block in enumerate(stack.blocks)
        if unit not in kept
    ]


def build_renumbering(analysis: Analysis, cut: Cut) -> Renumbering:
    """The names that weights have after a cut."""
    kept = {stack.module: cut.list_units(stack.axis) for stack in analysis.stacks}
    return Renumbering({module: units for module, units in kept.items() if units is not None})


def _build_table(variable: Variable, group: Group, chosen: FamilyPlan) -> npt.NDArray[np.bool_]:
    keep = chosen.keep.get(group.layer)
    if keep is None:
        raise PlanError(
            f"plan: {variable.name} has no entry for layer {group.layer!r}; every layer needs its kept units",
            name=variable.name,
        )
    if not isinstance(keep, list | tuple):
        raise PlanError(
            f"plan: {variable.name}.{group.layer} is not a tuple of rows; give one of units for each scope",
            name=variable.name,
        )
    if len(keep) not in (1, group.scopes):
        raise PlanError(
            f"plan: {variable.name}.{group.layer} has {len(keep)} rows of units; give 1 or {group.scopes}",
            name=variable.name,
        )
    for row in keep:
        check_units(row, chosen.width, variable.size, f"plan: {variable.name}.{group.layer}")
    rows = keep if len(keep) == group.scopes else keep * group.scopes
    table = np.zeros((math.prod(a.size for a in group.scope), group.size), dtype=bool)
    for stays, units in zip(table, rows, strict=True):
        stays[list(units)] = True
    return table


def transfer_cut(cut: Cut, source: Analysis, target: Analysis) -> Cut:
    """``cut``, of ``source``, for another program of the same model, ``target``, without axes that it lacks.

    Raises:
        MptkError: it removes blocks that ``target`` has some of, as one that runs without the last.
    """
    same = dict[Axis, Axis]()
    for name, dims in target.weights.items():
        for theirs, own in zip(source.weights.get(name, ()), dims, strict=False):
            same.update(zip(list_axes(theirs), list_axes(own), strict=False))
    blocks = {stack.module: stack.axis for stack in target.stacks}
    for stack in source.stacks:
        if stack.module in blocks:
            same[stack.axis] = blocks[stack.module]
        elif stack.axis in cut.choices and any(name.startswith(f"{stack.module}.") for name in target.weights):
            raise PlanError(
                f"another trace of this model runs only some blocks of {stack.module}, which are cut", name=stack.module
            )
    choices = {
        same[axis]: KeptUnits(tuple(same[outer] for outer in kept.scope), kept.table)
        for axis, kept in cut.choices.items()
        if axis in same
    }
    return Cut(choices, {axis: int(kept.table[0].sum()) for axis, kept in choices.items()})
