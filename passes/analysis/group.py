"""group: axis terms → families. Axes that weights share become groups, groups of one structure become a family."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator, Mapping

from torch import fx

from mptk.ir.axes import Axis, Sum, Term, axes_in, coordinates, encloses, freeze, leaves, resolve
from mptk.ir.axis_facts import AxisFacts, Dims
from mptk.ir.families import Analysis, Blocked, Family, Group, Member
from mptk.ir.program import Program
from mptk.ir.source_location import SourceLocation
from passes.analysis.liveness import live_axes
from passes.analysis.naming import distinct, name_blocked, name_family
from passes.analysis.propagate import propagate
from passes.analysis.zero_propagation import find_spoilers

Members = dict[Axis, list[tuple[str, int]]]


def analyze(program: Program) -> Analysis:
    """Find what can be cut in ``program``: propagate axes, check exactness, group coupled channels, name families.

    Raises:
        MptkError: an op has no axis rule.
    """
    with _without_collection():
        return _analyze(program)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """An analysis makes many small objects, nearly all of which stay: collections meanwhile would find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _analyze(program: Program) -> Analysis:
    facts = propagate(program)
    readers = {
        program.weights[n.name]: next(iter(n.users))
        for n in program.placeholders()
        if n.name in program.weights and n in facts.results and n.users
    }
    weights = {name: tuple(resolve(d) for d in dims) for name, dims in facts.weights.items() if name in readers}
    members = _members(weights)
    spoilers = find_spoilers(facts)
    live = live_axes(facts)
    for a, places in members.items():
        _refuse(a, live, SourceLocation(readers[places[0][0]]))
    open_axes = [a for a in members if not a.frozen and a not in spoilers]
    scopes = _scopes(facts, weights, members, open_axes)
    roles = _member_roles(program, facts)
    groups = [_group(a, members[a], weights, scopes[a], roles) for a in open_axes]
    return Analysis(
        program=program,
        families=_families(groups),
        blocked=tuple(_blocked(a, members[a], weights, spoilers) for a in members if a not in scopes),
        weights=weights,
        facts=facts,
    )


def _members(weights: Mapping[str, Dims]) -> Members:
    """Every axis of the weights, in their order, with the dimensions that hold it."""
    found: Members = {}
    for name, dims in weights.items():
        for d, term in enumerate(dims):
            for leaf in dict.fromkeys(leaves(term)):
                found.setdefault(leaf, []).append((name, d))
    return found


def _refuse(a: Axis, live: set[Axis], place: SourceLocation) -> None:
    """Freeze an axis that has no smaller width, or that no value computed from the input holds."""
    least = -(-a.minimum // a.multiple) * a.multiple
    if least >= a.size:
        freeze(a, f"its ops need at least {least} units ({place})")
    if a not in live and not a.frozen:
        freeze(a, f"with the traced inputs, no value that has it reaches the output ({place})")


def _scopes(
    facts: AxisFacts, weights: Mapping[str, Dims], members: Members, open_axes: list[Axis]
) -> dict[Axis, tuple[Axis, ...]]:
    """For each axis, the axes along which its choice of units may vary: those present wherever it is.

    Every value that holds the axis must hold them (attention scores included), and every weight too: at one coordinate
    (of a Gram matrix Σ_k x_ik x_jk, the choice of k would be that of i or that of j). Of two axes that accompany each
    other, the inner one varies along the outer.
    """
    beside: dict[Axis, set[Axis]] = {}
    wanted = set(open_axes)
    for counts in {frozenset(coordinates(dims, each=True).items()) for dims in _values(facts)}:
        held = frozenset(leaf for leaf, _ in counts)
        routed = _routed(facts, held)
        present = {leaf for leaf, count in counts if count == 1} | routed
        for leaf in (held | routed) & wanted:
            beside[leaf] = beside[leaf] & present if leaf in beside else set(present)
    scopes: dict[Axis, tuple[Axis, ...]] = {}
    places = _places(facts, weights)
    for a in reversed(open_axes):
        companions = [b for b in members if b is not a and b in beside.get(a, ()) and a not in scopes.get(b, ())]
        scopes[a] = tuple(b for b in companions if _can_vary(a, b, places[a]))
    return scopes


def _places(facts: AxisFacts, weights: Mapping[str, Dims]) -> dict[Axis, list[tuple[Term, set[Term]]]]:
    """Axis → the dimensions of weights and constants that hold it, each with the weight's dimensions of one axis."""
    found: dict[Axis, list[tuple[Term, set[Term]]]] = {}
    uses = [dims for used in facts.constant_uses.values() for _, dims in used]
    for dims, apart in [*((dims, set(dims)) for dims in weights.values()), *((dims, set()) for dims in uses)]:
        for term in dims:
            for leaf in dict.fromkeys(leaves(term)):
                found.setdefault(leaf, []).append((term, apart))
    return found


def _routed(facts: AxisFacts, present: frozenset[Axis]) -> set[Axis]:
    """Rows that were routed to an expert know which: a value that holds all the rows' axes holds the expert's too."""
    return axes_in(r.expert for r in facts.routes if axes_in([r.rows]) <= present)


def _can_vary(a: Axis, scope: Axis, places: list[tuple[Term, set[Term]]]) -> bool:
    """In every dimension the scope must enclose the axis, or be another dimension of the same weight."""
    return all(encloses(term, scope, a) or scope in apart for term, apart in places)


def _values(facts: AxisFacts) -> set[Dims]:
    """The dimensions of every value, of what calls make inside and of constants where they are used; each kind once."""
    found = set(facts.inner).union(*(facts.tensors(node) for node in facts.results))
    found.update(dims for uses in facts.constant_uses.values() for _, dims in uses)
    return found


def _member_roles(program: Program, facts: AxisFacts) -> dict[tuple[str, int], str]:
    """Whether a weight's dimension is summed over (consumer) or makes new channels (producer)."""
    roles: dict[tuple[str, int], str] = {}
    for c in facts.contractions:
        for node, dim in (c.left, c.right):
            source = _weight_dimension(program, facts, node, dim)
            if source is not None:
                name, d = source
                roles[name, d] = "consumer"
                made = axes_in(c.out)
                for other, term in enumerate(facts.weights[name]):
                    if other != d and made & axes_in([term]):
                        roles.setdefault((name, other), "producer")
    return roles


def _weight_dimension(program: Program, facts: AxisFacts, node: fx.Node, dim: int) -> tuple[str, int] | None:
    """The weight behind a contraction's operand and which of its dimensions that is (through transposes, by term)."""
    if not facts.is_weight(node):
        return None
    term = resolve(facts.dims(node)[dim])
    while node.op != "placeholder":
        sources = [n for n in node.all_input_nodes if n in facts.results]
        if len(sources) != 1:
            return None
        node = sources[0]
    name = program.weights[node.name]
    for d, t in enumerate(facts.weights[name]):
        if resolve(t) is term or resolve(t) == term:
            return name, d
    return None


def _group(
    a: Axis,
    places: list[tuple[str, int]],
    weights: Mapping[str, Dims],
    scope: tuple[Axis, ...],
    roles: Mapping[tuple[str, int], str],
) -> Group:
    members = tuple(Member(name, d, weights[name][d], roles.get((name, d), "other")) for name, d in places)
    return Group(common_module([m.weight for m in members]), a, scope, members)


def common_module(names: list[str]) -> str:
    """The longest module path that all weights share."""
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


# ---- groups of one structure ----


def _families(groups: list[Group]) -> tuple[Family, ...]:
    """Groups with the same structural signature form a family; names are made distinct."""
    by_signature: dict[object, list[Group]] = {}
    for g in groups:
        by_signature.setdefault(signature(g), []).append(g)
    named = [(*name_family(same[0], len(same)), same) for same in by_signature.values()]
    families = []
    for name, (_, description, same) in zip(distinct(name for name, _, _ in named), named, strict=True):
        minimum = max(g.axis.minimum for g in same)
        families.append(Family(name, description, tuple(_distinct_layers(same)), minimum, same[0].axis.multiple))
    return tuple(families)


def _distinct_layers(groups: list[Group]) -> list[Group]:
    """Layer labels must tell groups apart; two groups of one family in one module get the first member's name."""
    labels = [g.layer for g in groups]
    return [g if labels.count(g.layer) == 1 else Group(g.members[0].weight, g.axis, g.scope, g.members) for g in groups]


def signature(group: Group) -> object:
    """What two groups must share to be of one family: members by name with layer numbers left out, and their layout."""
    scope = {a: f"s{i}" for i, a in enumerate(group.scope)}
    members = sorted(
        (re.sub(r"(?<=\.)\d+(?=\.)", "*", m.weight), m.dim, _layout(m.term, group.axis, scope)) for m in group.members
    )
    return group.size, tuple(a.size for a in group.scope), tuple(members)


def _layout(term: Term, a: Axis, scope: Mapping[Axis, str]) -> str:
    term = resolve(term)
    if isinstance(term, Axis):
        return "X" if term is a else scope.get(term, str(term.size))
    parts = term.segments if isinstance(term, Sum) else term.factors
    return "(" + ("+" if isinstance(term, Sum) else "*").join(_layout(p, a, scope) for p in parts) + ")"


# ---- what cannot be cut ----


def _blocked(
    a: Axis,
    places: list[tuple[str, int]],
    weights: Mapping[str, Dims],
    spoilers: Mapping[Axis, list[str]],
) -> Blocked:
    reasons = tuple(dict.fromkeys([*a.frozen, *spoilers.get(a, [])]))
    return Blocked(name_blocked(a), a.size, tuple(f"{w}[{d}]" for w, d in places), reasons)
