"""group: axis terms → families. Axes that weights share become groups, groups of one structure become a family."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator, Mapping

from torch import fx

from mptk.ir.axes import Axis, Sum, Term, coordinates, encloses, freeze, leaves, resolve
from mptk.ir.families import Analysis, Blocked, Family, Group, Member
from mptk.ir.program import Program
from mptk.ir.source_location import SourceLocation
from passes.analysis.liveness import live_axes
from passes.analysis.propagate import Walk, propagate
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
    walk = propagate(program)
    readers = {
        program.weights[n.name]: next(iter(n.users))
        for n in program.placeholders()
        if n.name in program.weights and n in walk.dims and n.users
    }
    weights = {name: tuple(resolve(d) for d in dims) for name, dims in walk.weights.items() if name in readers}
    members = _members(weights)
    spoilers = find_spoilers(walk)
    live = live_axes(walk)
    for a, places in members.items():
        _refuse(a, live, SourceLocation(readers[places[0][0]]))
    open_axes = [a for a in members if not a.frozen and a not in spoilers]
    scopes = _scopes(walk, weights, members, open_axes)
    roles = _member_roles(walk)
    groups = [_group(a, members[a], weights, scopes[a], roles) for a in open_axes]
    return Analysis(
        program=program,
        families=_families(groups),
        blocked=tuple(_blocked(a, members[a], weights, spoilers) for a in members if a not in scopes),
        weights=weights,
        contractions=walk.contractions,
        walk=walk,
    )


def _members(weights: Mapping[str, tuple[Term, ...]]) -> Members:
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
    walk: Walk, weights: Mapping[str, tuple[Term, ...]], members: Members, open_axes: list[Axis]
) -> dict[Axis, tuple[Axis, ...]]:
    """For each axis, the axes along which its choice of units may vary: those present wherever it is.

    Every value that holds the axis must hold them (attention scores included), and every weight too: at one coordinate
    (of a Gram matrix Σ_k x_ik x_jk, the choice of k would be that of i or that of j). Of two axes that accompany each
    other, the inner one varies along the outer.
    """
    beside: dict[Axis, set[Axis]] = {}
    wanted = set(open_axes)
    for counts in {frozenset(coordinates(dims, each=True).items()) for dims in _values(walk)}:
        held = frozenset(leaf for leaf, _ in counts)
        routed = _routed(walk, held)
        present = {leaf for leaf, count in counts if count == 1} | routed
        for leaf in (held | routed) & wanted:
            beside[leaf] = beside[leaf] & present if leaf in beside else set(present)
    scopes: dict[Axis, tuple[Axis, ...]] = {}
    places = _places(walk, weights)
    for a in reversed(open_axes):
        companions = [b for b in members if b is not a and b in beside.get(a, ()) and a not in scopes.get(b, ())]
        scopes[a] = tuple(b for b in companions if _can_vary(a, b, places[a]))
    return scopes


def _places(walk: Walk, weights: Mapping[str, tuple[Term, ...]]) -> dict[Axis, list[tuple[Term, set[Term]]]]:
    """Axis → the dimensions of weights and constants that hold it, each with the weight's dimensions of one axis."""
    found: dict[Axis, list[tuple[Term, set[Term]]]] = {}
    uses = [dims for used in walk.constant_uses.values() for _, dims in used]
    for dims, apart in [*((dims, set(dims)) for dims in weights.values()), *((dims, set()) for dims in uses)]:
        for term in dims:
            for leaf in dict.fromkeys(leaves(term)):
                found.setdefault(leaf, []).append((term, apart))
    return found


def _routed(walk: Walk, present: frozenset[Axis]) -> set[Axis]:
    """Rows that were routed to an expert know which: a value that holds all the rows' axes holds the expert's too."""
    return {e for rows, expert in walk.routed if set(leaves(rows)) <= present for e in leaves(expert)}


def _can_vary(a: Axis, scope: Axis, places: list[tuple[Term, set[Term]]]) -> bool:
    """In every dimension the scope must enclose the axis, or be another dimension of the same weight."""
    return all(encloses(term, scope, a) or scope in apart for term, apart in places)


def _values(walk: Walk) -> set[tuple[Term, ...]]:
    """The dimensions of every value, of what calls make inside and of constants where they are used; each kind once."""
    found: set[tuple[Term, ...]] = set(walk.hidden)
    for dims in walk.dims.values():
        found.update((d for d in dims if d is not None) if isinstance(dims, list) else [dims])
    found.update(dims for uses in walk.constant_uses.values() for _, dims in uses)
    return found


def _member_roles(walk: Walk) -> dict[tuple[str, int], str]:
    """Whether a weight's dimension is summed over (consumer) or makes new channels (producer)."""
    roles: dict[tuple[str, int], str] = {}
    for c in walk.contractions:
        for node, dim in (c.left, c.right):
            source = _weight_dimension(walk, node, dim)
            if source is not None:
                name, d = source
                roles[name, d] = "consumer"
                for other, term in enumerate(walk.weights[name]):
                    if other != d and any(leaf in set(leaves(term)) for o in c.out for leaf in leaves(o)):
                        roles.setdefault((name, other), "producer")
    return roles


def _weight_dimension(walk: Walk, node: fx.Node, dim: int) -> tuple[str, int] | None:
    """The weight behind a contraction's operand and which of its dimensions that is (through transposes, by term)."""
    if not walk.is_weight(node):
        return None
    term = resolve(walk.dims[node][dim])
    while node.op != "placeholder":
        sources = [n for n in node.all_input_nodes if n in walk.variable]
        if len(sources) != 1:
            return None
        node = sources[0]
    name = walk.program.weights[node.name]
    for d, t in enumerate(walk.weights[name]):
        if resolve(t) is term or resolve(t) == term:
            return name, d
    return None


def _group(
    a: Axis,
    places: list[tuple[str, int]],
    weights: Mapping[str, tuple[Term, ...]],
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
    named: list[tuple[str, str, list[Group]]] = []
    for same in by_signature.values():
        name, description = _name(same[0], len(same))
        named.append((name, description, same))
    taken = [name for name, _, _ in named]
    families = []
    for i, (name, description, same) in enumerate(named):
        distinct = name if taken.count(name) == 1 else f"{name}.{taken[:i].count(name) + 1}"
        minimum = max(g.axis.minimum for g in same)
        families.append(Family(distinct, description, tuple(_distinct_layers(same)), minimum, same[0].axis.multiple))
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


# ---- names for people ----


def _name(group: Group, layers: int) -> tuple[str, str]:
    """A name and a description from what the axis was seen to do. Cosmetic: nothing depends on it."""
    roles = group.axis.roles
    if "expert" in roles:
        return "experts", "experts of a mixture, with their router rows"
    if "head" in roles:
        inside = [m for m in group.members if m.role == "producer"]
        if len(group.scope) and len(inside) == 1:
            return "q_heads", "query heads in each KV group"
        grouped = any(any(s.roles & {"head"} and s is not group.axis for s in leaves(m.term)) for m in group.members)
        return ("kv_groups", "KV heads with their query heads") if grouped else ("heads", "attention heads")
    if "inner" in roles:
        return _name_of_query_channels(group)
    if "value" in roles:
        return "v_dim", "value channels in each head"
    if "embedding" in roles:
        return "hidden", "residual width"
    kinds = {m.role for m in group.members}
    once = layers > 1 or len({re.sub(r"\d+", "*", m.weight) for m in group.members}) == len(group.members)
    if once and {"producer", "consumer"} <= kinds and not _spans_layers(group):
        return "ffn", "feed-forward channels"
    return "channels", "channels"


def _name_of_query_channels(group: Group) -> tuple[str, str]:
    """Rotation ties the two halves of a head: then the axis comes twice in the query (and in the key)."""
    times = [sum(leaf is group.axis for leaf in leaves(m.term)) for m in group.members if m.role == "producer"]
    tied = "value" in group.axis.roles
    fused = len(times) == 1 and not tied
    what = "query, key and value" if tied else "query and key"
    if max(times, default=0) > (2 if fused else 1):
        return "rotary_pairs", f"rotary pairs of {what} channels"
    return ("head_dim" if tied else "qk_dim"), f"{what} channels in each head"


def _spans_layers(group: Group) -> bool:
    """Whether the members lie in several layers (numbered modules) of the same container."""
    numbers = {tuple(re.findall(r"\.(\d+)\.", m.weight))[:1] for m in group.members}
    return len(numbers) > 1


# ---- what cannot be cut ----


def _blocked(
    a: Axis,
    places: list[tuple[str, int]],
    weights: Mapping[str, tuple[Term, ...]],
    spoilers: Mapping[Axis, list[str]],
) -> Blocked:
    reasons = tuple(dict.fromkeys([*a.frozen, *spoilers.get(a, [])]))
    name = (
        "vocab" if any("the model's output" in r or "indexed by the model's input" in r for r in a.frozen) else "axis"
    )
    return Blocked(name, a.size, tuple(f"{w}[{d}]" for w, d in places), reasons)
