"""families: the channels that can be cut, and the channels that must be cut with them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from mptk.ir.axes import Axis, Index, Size, Term, find_occurrences, list_axes
from mptk.ir.axis_facts import AxisFacts, Dims
from mptk.ir.blocks import Stack
from mptk.ir.program import Program
from mptk.ir.weights import Lazy

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
    """Groups of one kind, one for each layer. They are cut to the same width, so that all layers have one shape.

    ``name`` and ``description`` are inferred from structure and serve people only. ``minimum`` and ``multiple`` limit
    the widths that the graph's ops accept; targets narrow them further (``passes/targets/legalize.py``).
    ``part_of``: the family that it is one layer of; empty for a whole one. ``kind``: what its units are.
    """

    kind: ClassVar[Kind] = "channels"
    name: str
    description: str
    groups: tuple[Group, ...]
    minimum: int = 1
    multiple: int = 1
    part_of: str = ""

    @property
    def size(self) -> int:
        """Units in each layer of the dense model."""
        return self.groups[0].size

    @property
    def scopes(self) -> int:
        """How many choices each layer makes: 1, or one for each KV group or expert."""
        return self.groups[0].scopes

    @cached_property
    def parts(self) -> tuple[Family, ...]:
        """A family for each layer, ``ffn.0``, ``ffn.1``, …, whose widths may differ. None if there is one layer."""
        if len(self.groups) < 2:
            return ()
        return tuple(
            replace(self, name=f"{self.name}.{layer}", groups=(group,), part_of=self.name)
            for layer, group in enumerate(self.groups)
        )


@dataclass(frozen=True)
class Depth(Family):
    """The family of a list of residual blocks: one group without members, whose units are the blocks of ``stack``."""

    kind: ClassVar[Kind] = "blocks"
    stack: Stack = field(kw_only=True)


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

    def __deepcopy__(self, memo: object) -> Analysis:
        """Itself, as nothing in it changes; the values of a trace cannot be copied."""
        return self

    def family(self, name: str) -> Family:
        """The family of that name, a depth too, or one layer of a family. Raises KeyError for an unknown name."""
        for family in (*self.all_families, *self._list_parts(name.rpartition(".")[0])):
            if family.name == name:
                return family
        raise KeyError(f"no family {name!r}; there are {', '.join(f.name for f in self.all_families)}")

    def _list_parts(self, name: str) -> Iterator[Family]:
        return (part for family in self.families if family.name == name for part in family.parts)

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

    def divided(self, names: Collection[str]) -> Analysis:
        """The same with the families ``names`` divided into their layers, as far as they have several."""
        return self.apart(dict.fromkeys(names, ()))

    def apart(self, alike: Mapping[str, Collection[int]]) -> Analysis:
        """The same with each layer of the families ``alike`` as a family, but for the layers named, which stay one."""
        found: list[Family] = []
        for f in self.families:
            layers = alike.get(f.name)
            if layers is None or not f.parts:
                found.append(f)
                continue
            if layers:
                found.append(replace(f, groups=tuple(f.groups[i] for i in sorted(layers)), part_of=f.name))
            found += [part for i, part in enumerate(f.parts) if i not in layers]
        return replace(self, families=tuple(found))

    def sizes(self, widths: Mapping[str, Size]) -> dict[Axis, Size]:
        """Axis sizes of the model cut to ``widths`` (family name → units kept)."""
        return {g.axis: width for name, width in widths.items() for g in self.family(name).groups}
