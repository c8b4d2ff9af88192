"""group: axis terms → families. An axis of weights becomes a group; groups of one structure become a family."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from mptk.ir.axes import Axis, Sum, Term, collect_axes, freeze, list_axes, resolve
from mptk.ir.axis_facts import AxisFacts, Dims
from mptk.ir.blocks import Stack
from mptk.ir.families import Analysis, Blocked, Depth, Family, Group, Member, Place, Role
from mptk.ir.program import Program
from mptk.ir.source_location import SourceLocation
from passes.analysis.blocks import find_stacks, name_stacks
from passes.analysis.liveness import find_live_axes
from passes.analysis.naming import name_blocked, name_family, number_duplicates
from passes.analysis.propagate import propagate
from passes.analysis.scopes import Members, find_scopes
from passes.analysis.zero_propagation import find_divisors, find_spoilers


def analyze_program(program: Program) -> Analysis:
    """Find the families of ``program``: propagate axes, check exactness, group coupled channels, name families.

    Raises:
        MptkError: an op has no axis rule.
    """
    facts = propagate(program)
    facts = replace(facts, divisors=find_divisors(facts))
    readers = {
        program.weights[n.name]: next(iter(n.users))
        for n in program.list_placeholders()
        if n.name in program.weights and n in facts.results and n.users
    }
    weights = {name: tuple(map(resolve, dims)) for name, dims in facts.weights.items() if name in readers}
    members = _find_members(weights)
    spoilers = find_spoilers(facts)
    live = find_live_axes(facts)
    for axis, places in members.items():
        _refuse(axis, live, SourceLocation(readers[places[0][0]]))
    offered = [axis for axis in members if not axis.frozen and axis not in spoilers]
    scopes = find_scopes(facts, weights, members, offered)
    roles = _find_member_roles(program, facts)
    groups = [_group(axis, members[axis], weights, scopes[axis], roles) for axis in offered]
    return Analysis(
        program=program,
        families=_make_families(groups),
        blocked=tuple(_make_blocked(axis, members[axis], spoilers) for axis in members if axis not in scopes),
        weights=weights,
        facts=facts,
        depths=_make_depths(find_stacks(program, facts)),
    )


def _make_depths(stacks: Sequence[Stack]) -> tuple[Depth, ...]:
    """A family for each list of residual blocks, whose units are the blocks."""
    described = "residual blocks, each removed whole"
    return tuple(
        Depth(name, described, (Group(stack.module, stack.axis, (), ()),), max(1, len(stack.stay)), stack=stack)
        for name, stack in zip(name_stacks(stacks), stacks, strict=True)
    )


def _find_members(weights: Mapping[str, Dims]) -> Members:
    """Axis of the weights, in their order → the dimensions of weights that hold it."""
    found: dict[Axis, list[Place]] = {}
    for name, dims in weights.items():
        for d, term in enumerate(dims):
            for leaf in dict.fromkeys(list_axes(term)):
                found.setdefault(leaf, []).append((name, d))
    return found


def _refuse(axis: Axis, live: set[Axis], place: SourceLocation) -> None:
    """Freeze an axis that has no smaller legal width, or that is in no value computed from the input."""
    least = -(-axis.minimum // axis.multiple) * axis.multiple
    if least >= axis.size:
        freeze(axis, f"its ops need at least {least} units ({place})")
    if axis not in live and not axis.frozen:
        freeze(axis, f"with the traced inputs, no value that has it reaches the output ({place})")


def _find_member_roles(program: Program, facts: AxisFacts) -> dict[Place, Role]:
    """The role of each weight's dimension: consumer if it is summed over, producer if it makes new channels."""
    roles: dict[Place, Role] = {}
    for contraction in facts.contractions:
        made = collect_axes(contraction.out)
        for node, dim in (contraction.left, contraction.right):
            place = _find_weight_dim(program, facts, node, dim)
            if place is None:
                continue
            name, summed = place
            roles[place] = "consumer"
            for other, term in enumerate(facts.weights[name]):
                if other != summed and made & collect_axes([term]):
                    roles.setdefault((name, other), "producer")
    return roles


def _find_weight_dim(program: Program, facts: AxisFacts, node: fx.Node, dim: int) -> Place | None:
    """The weight behind a contraction's operand and its dimension, found by term, also through transposes."""
    if not facts.is_weight(node):
        return None
    term = resolve(facts.dims(node)[dim])
    while node.op != "placeholder":
        sources = [n for n in node.all_input_nodes if n in facts.results]
        if len(sources) != 1:
            return None
        node = sources[0]
    name = program.weights[node.name]
    terms = map(resolve, facts.weights[name])
    return next(((name, d) for d, other in enumerate(terms) if other == term), None)


def _group(
    axis: Axis,
    places: Sequence[Place],
    weights: Mapping[str, Dims],
    scope: tuple[Axis, ...],
    roles: Mapping[Place, Role],
) -> Group:
    members = tuple(Member(name, d, weights[name][d], roles.get((name, d), "other")) for name, d in places)
    return Group(find_common_module([m.weight for m in members]), axis, scope, members)


def find_common_module(names: list[str]) -> str:
    """The longest common module path of all weights."""
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


# ---- groups of one structure ----


def _make_families(groups: list[Group]) -> tuple[Family, ...]:
    """Make a family of all groups with the same signature, with distinct names."""
    by_signature: dict[object, list[Group]] = {}
    for group in groups:
        by_signature.setdefault(make_signature(group), []).append(group)
    named = [(*name_family(same[0], len(same)), same) for same in by_signature.values()]
    names = number_duplicates(name for name, _, _ in named)
    return tuple(
        Family(name, description, _label_layers(same), max(g.axis.minimum for g in same), same[0].axis.multiple)
        for name, (_, description, same) in zip(names, named, strict=True)
    )


def _label_layers(groups: list[Group]) -> tuple[Group, ...]:
    """Give each group a distinct layer label: the first member's name if a family has two groups in one module."""
    count = Counter(group.layer for group in groups)
    return tuple(g if count[g.layer] == 1 else replace(g, layer=g.members[0].weight) for g in groups)


def make_signature(group: Group) -> object:
    """Groups of one family have the same signature: members' names without layer numbers, and their layout."""
    labels = {group.axis: "X", **{axis: f"s{i}" for i, axis in enumerate(group.scope)}}
    members = sorted(
        (re.sub(r"(?<=\.)\d+(?=\.)", "*", m.weight), m.dim, _describe_layout(m.term, labels)) for m in group.members
    )
    return group.size, tuple(axis.size for axis in group.scope), tuple(members)


def _describe_layout(term: Term, labels: Mapping[Axis, str]) -> str:
    """A term as text: labelled axes by label, all others by size."""
    term = resolve(term)
    if isinstance(term, Axis):
        return labels.get(term, str(term.size))
    if isinstance(term, Sum):
        return "(" + "+".join(_describe_layout(segment, labels) for segment in term.segments) + ")"
    return "(" + "*".join(_describe_layout(factor, labels) for factor in term.factors) + ")"


# ---- what cannot be cut ----


def _make_blocked(axis: Axis, places: Sequence[Place], spoilers: Mapping[Axis, list[str]]) -> Blocked:
    reasons = tuple(dict.fromkeys([*axis.frozen, *spoilers.get(axis, [])]))
    return Blocked(name_blocked(axis), axis.size, tuple(f"{name}[{d}]" for name, d in places), reasons)
