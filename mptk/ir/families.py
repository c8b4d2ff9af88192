"""families: the channels that can be cut, the channels that must be cut with them, and the widths that can be chosen.

The analysis finds families: coupled channels, one group for each layer. A ``Variable`` is a width that can be chosen:
one for all layers of a family (``ffn``), or for a single layer (``ffn.3``). Legal widths, candidates and plans give
numbers to variables. Which layers share one is not part of the analysis, but of what a run asks for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from mptk.ir.axes import Axis, Index, Size, Term, find_occurrences, list_axes
from mptk.ir.axis_facts import AxisFacts, Dims
from mptk.ir.blocks import Stack
from mptk.ir.plan import split_layer
from mptk.ir.program import Program
from mptk.ir.weights import Lazy
from mptk.notebook import build_html, build_table

Place = tuple[str, int]
"""A weight's name, and one of its dimensions."""

Role = Literal["producer", "consumer", "other"]
Kind = Literal["channels", "blocks"]
"""What the units of a family are."""


@dataclass(frozen=True)
class Member:
    """A dimension of a weight that holds a group's units.

    ``role`` is ``producer`` (the weight makes the units: a linear layer's rows), ``consumer`` (it sums over the units:
    a linear layer's columns) or ``other`` (a bias, a norm's weight, an embedding).
    """

    weight: str
    dim: int
    term: Term
    role: Role


@dataclass(frozen=True)
class Group:
    """One layer's coupled channels: an axis of ``size`` units and every weight dimension that holds it.

    ``scope``: the axes along which the choice of units may differ (query heads, in each KV group); usually empty.
    ``layer``: the module that holds all members.
    """

    layer: str
    axis: Axis
    scope: tuple[Axis, ...]
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        return self.axis.size

    @property
    def scopes(self) -> int:
        """How many independent choices of units there are: the product of the scope axes' sizes."""
        return math.prod(a.size for a in self.scope)

    def positions(self, member: Member) -> Index:
        """The k positions of each unit along ``member``'s dimension: indices [scopes, size, k], ascending in k."""
        return find_unit_positions(member.term, self.axis, self.scope)


def find_unit_positions(term: Term, axis: Axis, scope: Sequence[Axis] = ()) -> Index:
    """Positions of ``term`` by unit of ``axis``: [scopes, axis.size, k], ascending in k.

    If ``term`` lacks an axis of the scope, each scope has all positions.
    """
    found = find_occurrences(term)
    scopes = math.prod(a.size for a in scope)
    rows: list[list[list[int]]] = [[[] for _ in range(axis.size)] for _ in range(scopes)]
    scope_index = scope_coordinates(found, scope, term.size)
    for leaf, coordinate in found:
        if leaf is axis:
            for position in np.flatnonzero(coordinate >= 0):
                targets = range(scopes) if scope_index is None else [scope_index[position]]
                for row in targets:
                    rows[row][coordinate[position]].append(int(position))
    return np.array([[sorted(set(unit)) for unit in row] for row in rows], dtype=np.int64)


def find_unit_indices(dims: Sequence[Term], dim: int, group: Group) -> list[Index]:
    """The unit of ``group`` at each position of a weight, for each occurrence of its axis in dimension ``dim``.

    An entry is scope · size + unit, −1 for no unit. Each index broadcasts against the weight: it has size 1 in
    dimensions along which it does not vary. A scope axis is searched in ``dim`` first, then in the other dimensions.
    """
    scope = np.zeros([1] * len(dims), dtype=np.int64)
    for outer in group.scope:
        holder = next(d for d in (dim, *range(len(dims))) if outer in list_axes(dims[d]))
        coordinate = scope_coordinates(find_occurrences(dims[holder]), (outer,), dims[holder].size)
        assert coordinate is not None
        scope = scope * outer.size + _reshape_along(coordinate, holder, len(dims))
    units = [_reshape_along(c, dim, len(dims)) for leaf, c in find_occurrences(dims[dim]) if leaf is group.axis]
    return [np.where(unit < 0, -1, scope * group.size + unit) for unit in units]


def _reshape_along(coordinate: Index, dim: int, ndim: int) -> Index:
    """A vector as a tensor of ``ndim`` dimensions that varies along ``dim`` only."""
    return coordinate.reshape([-1 if d == dim else 1 for d in range(ndim)])


def scope_coordinates(found: Sequence[tuple[Axis, Index]], scope: Sequence[Axis], size: int) -> Index | None:
    """The scope's flat coordinate at every position, or None if the scope has no axis here."""
    flat = np.zeros(size, dtype=np.int64)
    for outer in scope:
        coordinates = [c for leaf, c in found if leaf is outer]
        if not coordinates:
            return None
        flat = flat * outer.size + np.max(coordinates, axis=0)
    return flat if scope else None


@dataclass(frozen=True)
class Family:
    """Groups of one kind and size, one for each layer.

    ``name`` and ``description`` are inferred from structure and serve people only. ``minimum`` and ``multiple`` limit
    the widths that the graph's ops accept; targets narrow them further (``passes/targets/legalize.py``).
    ``kind``: what its units are.
    """

    kind: ClassVar[Kind] = "channels"
    name: str
    description: str
    groups: tuple[Group, ...]
    minimum: int = 1
    multiple: int = 1

    @property
    def size(self) -> int:
        """Units in each layer of the dense model."""
        return self.groups[0].size

    @property
    def scopes(self) -> int:
        """How many choices each layer makes: 1, or one for each KV group or expert."""
        return self.groups[0].scopes

    def tie(self, layers: Sequence[int] | None = None) -> Variable:
        """The width that all layers share, or only ``layers``; the others then have widths of their own."""
        return Variable(self.name, self, tuple(range(len(self.groups)) if layers is None else layers))


@dataclass(frozen=True)
class Depth(Family):
    """The family of a list of residual blocks: one group without members, whose units are the blocks of ``stack``."""

    kind: ClassVar[Kind] = "blocks"
    stack: Stack = field(kw_only=True)


@dataclass(frozen=True)
class Variable:
    """A width that can be chosen: how many units of ``family`` stay in each of the ``layers`` that it ties.

    ``name``: the family's name; of a single layer of several, with its number.
    """

    name: str
    family: Family
    layers: tuple[int, ...]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The tied layers' groups."""
        return tuple(self.family.groups[layer] for layer in self.layers)

    def list_layers(self) -> tuple[Variable, ...]:
        """A variable for each of its layers, ``ffn.0``, ``ffn.1``, …; itself if its family has one layer."""
        if len(self.family.groups) == 1:
            return (self,)
        return tuple(Variable(f"{self.family.name}.{i}", self.family, (i,)) for i in self.layers)

    @property
    def uniform(self) -> bool:
        """Whether it ties all layers of its family."""
        return len(self.layers) == len(self.family.groups)

    @property
    def kind(self) -> Kind:
        return self.family.kind

    @property
    def size(self) -> int:
        """Its largest value: units in each layer of the dense model."""
        return self.family.size

    @property
    def scopes(self) -> int:
        """How many choices each layer makes."""
        return self.family.scopes


Variables = Mapping[str, Variable]
"""Name → variable, in the order of the families. Each layer of each family belongs to one of them."""


@dataclass(frozen=True)
class Blocked:
    """An axis of weights that cannot be cut, with the reasons."""

    name: str
    size: int
    weights: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Analysis:
    """The result of the axis analysis: families that can be cut, axes that cannot, and the terms behind both.

    ``weights``: each weight in the graph → one term for each dimension (``mptk/ir/axes.py``). ``facts``: the terms of
    every value. ``depths``: families whose units are whole residual blocks, one for each list of blocks. They are not
    among ``families``, whose units are channels.
    """

    program: Program
    families: tuple[Family, ...]
    blocked: tuple[Blocked, ...]
    weights: Mapping[str, Dims]
    facts: AxisFacts = field(repr=False)
    depths: tuple[Depth, ...] = ()

    def __repr__(self) -> str:
        widths = ", ".join(f"{f.name} {f.size} × {len(f.groups)}" for f in self.all_families)
        return f"Analysis(can be cut: {widths or 'nothing'}; cannot: {len(self.blocked)} axes)"

    def _repr_html_(self) -> str:
        families = [[f.name, f.description, str(f.size), str(len(f.groups))] for f in self.all_families]
        blocked = Counter((each.name, str(each.size), "; ".join(each.reasons[:1])) for each in self.blocked)
        fixed = [[*row, str(count)] for row, count in blocked.items()]
        return build_html(
            "What can be cut, and what must stay",
            build_table(["family", "what it is", "units of a layer", "layers"], families),
            build_table(["axis that stays", "size", "why", "times"], fixed),
        )

    def __deepcopy__(self, memo: object) -> Analysis:
        """Itself, as nothing in it changes; the values of a trace cannot be copied."""
        return self

    def family(self, name: str) -> Family:
        """The family of that name, a depth too. Raises KeyError for an unknown name."""
        for family in self.all_families:
            if family.name == name:
                return family
        raise KeyError(f"no family {name!r}; there are {', '.join(f.name for f in self.all_families)}")

    def variable(self, name: str) -> Variable:
        """The width that plans call ``name``: a family's in all its layers, or a single layer's. Raises KeyError."""
        whole = split_layer(name)[0]
        layers = next((f.tie().list_layers() for f in self.families if f.name == whole != name), ())
        return next((layer for layer in layers if layer.name == name), None) or self.family(name).tie()

    def make_variables(self, free: Collection[str] = ()) -> Variables:
        """A width for each family; of the families ``free``, for each of their layers."""
        found = (f.tie().list_layers() if f.name in free else (f.tie(),) for f in self.all_families)
        return {variable.name: variable for variables in found for variable in variables}

    @property
    def all_families(self) -> tuple[Family, ...]:
        """Those of channels, then the depths."""
        return (*self.families, *self.depths)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The lists of residual blocks of which some can be removed."""
        return tuple(family.stack for family in self.depths)

    def with_weights(self, weights: Mapping[str, Tensor | Lazy]) -> Analysis:
        """The same of the program with other tensors for some of its weights."""
        return replace(self, program=self.program.with_state(weights))

    def sizes(self, widths: Mapping[str, Size]) -> dict[Axis, Size]:
        """Axis sizes of the model cut to ``widths`` (variable's name → units kept)."""
        return {g.axis: width for name, width in widths.items() for g in self.variable(name).groups}
