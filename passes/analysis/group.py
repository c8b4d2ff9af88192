"""group: axis terms → families. An axis of weights becomes a group; groups of one structure become a family."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, fx

from mptk.ir import (
    Analysis,
    Axis,
    AxisFacts,
    Blocked,
    Depth,
    Dims,
    Family,
    Group,
    Member,
    Place,
    Program,
    Role,
    SourceLocation,
    Stack,
    Sum,
    Term,
    collect_axes,
    count_coordinates,
    find_reachable,
    freeze,
    get_argument,
    is_nested,
    list_axes,
    name_base_op,
    resolve,
    resolve_result_shape,
    resolve_shape,
)
from passes.analysis.blocks import find_stacks, name_stacks
from passes.analysis.propagate import propagate
from passes.analysis.zero_propagation import find_divisors, find_spoilers


def analyze_program(program: Program) -> Analysis:
    """Find the families of ``program``: propagate axes, check exactness, group coupled channels, name families.

    Raises:
        MptkError: an op has no axis rule.
    """
    # Weights that something is divided by are found while all weights are zero. The spoilers below then keep these.
    facts = propagate(program)
    facts = replace(facts, divisors=find_divisors(facts))
    # The weights that some call reads: a cut of the others could not be proven.
    readers = {
        program.weights[n.name]: next(iter(n.users))
        for n in program.list_placeholders()
        if n.name in program.weights and n in facts.results and n.users
    }
    weights = {name: tuple(map(resolve, dims)) for name, dims in facts.weights.items() if name in readers}
    # An axis is offered if it is neither frozen nor spoiled, and if its cut has an effect.
    members = _find_members(weights)
    spoilers = find_spoilers(facts)
    live = find_live_axes(facts)
    for axis, places in members.items():
        _refuse(axis, live, SourceLocation(readers[places[0][0]]))
    offered = [axis for axis in members if not axis.frozen and axis not in spoilers]
    # Groups, families, and the reasons for all other axes.
    scopes = find_scopes(facts, weights, members, offered)
    roles = _find_member_roles(program, facts)
    groups = []
    for axis in offered:
        held = tuple(Member(name, d, weights[name][d], roles.get((name, d), "other")) for name, d in members[axis])
        groups.append(Group(find_common_module([m.weight for m in held]), axis, scopes[axis], held))
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
    """Freeze an axis that has no smaller legal width, or that is in no value between input and output."""
    least = -(-axis.minimum // axis.multiple) * axis.multiple  # the minimum, rounded up to a multiple
    if least >= axis.size:
        freeze(axis, f"its ops need at least {least} units ({place})")
    if axis not in live and not axis.frozen:
        freeze(axis, f"with the traced inputs, no value that has it reaches the output ({place})")


TRANSPOSES = ("t", "numpy_T", "mT", "matrix_H", "transpose", "permute")


def _find_member_roles(program: Program, facts: AxisFacts) -> dict[Place, Role]:
    """The role of each weight's dimension: consumer if it is summed over, producer if it makes new channels."""
    # A consumer stays one, even if another product makes channels of the same dimension (a tied weight).
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
    # Back through transposes and views to the one weight. A merge of several weights has no single one.
    term = resolve(facts.dims(node)[dim])
    while node.op != "placeholder":
        sources = [n for n in node.all_input_nodes if n in facts.results]
        if len(sources) != 1:
            return None
        dim = _find_dim_before(facts, node, dim)
        node = sources[0]
    name = program.weights[node.name]
    found = [d for d, other in enumerate(map(resolve, facts.weights[name])) if other == term]
    # A square weight of a residual stream has the term twice: TextNet's convolutions lead from its channels to them.
    return (name, dim if dim in found else found[0]) if found else None


def _find_dim_before(facts: AxisFacts, node: fx.Node, dim: int) -> int:
    """The dimension that a transpose moved to ``dim``. Other calls leave it where it is, or the term finds it."""
    name = name_base_op(node.target)
    if name not in TRANSPOSES:
        return dim
    ndim = len(facts.dims(node))
    match name:
        case "transpose":
            one, other = (int(get_argument(node, each)) % ndim for each in ("dim0", "dim1"))
            return other if dim == one else one if dim == other else dim
        case "permute":
            return int(get_argument(node, "dims")[dim]) % ndim
        case _:
            return 1 - dim if ndim == 2 else dim


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


# ---- liveness: the axes whose cut has an effect ----

# Some values never reach the output: a compressor whose window is longer than the example, an unused branch. A cut of
# their axes would have no effect on the example, so it could not be proven. Such axes are not offered.


def find_live_axes(facts: AxisFacts) -> set[Axis]:
    """Axes of values between the input and the output, and axes that calls between them sum over."""
    reached = find_live_nodes(facts.graph, facts.writes)
    found = collect_axes(product.axis for product in facts.contractions if {product.node, product.left[0]} <= reached)
    found |= collect_axes(reduction.axis for reduction in facts.reductions if reduction.node in reached)
    seen = facts.activations & reached
    return found.union(*(facts.find_axes(node) for node in facts.results if node in seen))


def find_live_nodes(graph: fx.Graph, writes: Mapping[fx.Node, Sequence[fx.Node]]) -> set[fx.Node]:
    """The nodes with a value that is not empty and reaches the output through calls and ``writes`` in place."""
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node, changed in writes.items():
        for value in changed:
            writers.setdefault(value, []).append(node)

    def list_sources(node: fx.Node) -> list[fx.Node]:
        return [
            source for source in (*_find_value_sources(node), *writers.get(node, ())) if not _is_empty_tensor(source)
        ]

    return find_reachable([graph.output_node()], list_sources)


# Ops of whose operand only the shape counts.
SHAPE_ONLY = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")


def _find_value_sources(node: fx.Node) -> list[fx.Node]:
    """The operands whose values change the result: not if only the shape counts, or if the call chooses from one."""
    # The position of the largest of one value is always 0, and the softmax of one value always 1.
    if node.target is operator.getitem and node.args[1] == 1:
        source = node.all_input_nodes[0]
        return [] if _name_op(source) in ("topk", "sort", "max", "min") and _has_one_position(source) else [source]
    op = _name_op(node)
    if op in SHAPE_ONLY or (op in ("softmax", "argmax", "argmin") and _has_one_position(node)):
        return []
    if op == "scaled_dot_product_attention" and resolve_result_shape(get_argument(node, "key"))[-2] == 1:
        return [get_argument(node, "value")]
    return node.all_input_nodes


def _name_op(node: fx.Node) -> str:
    return name_base_op(node.target) if node.op == "call_function" else ""


def _has_one_position(node: fx.Node) -> bool:
    """Whether the dimension from which the call chooses has one position."""
    value, dim = node.all_input_nodes[0].meta["val"], get_argument(node, "dim", -1)
    return isinstance(value, Tensor) and isinstance(dim, int) and value.ndim > 0 and resolve_shape(value)[dim] == 1


def _is_empty_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and 0 in resolve_shape(value)


# ---- scopes: the axes along which the choice of units may vary (query heads, in each KV group) ----

# Every value with the axis must have its scope, attention scores included, and every weight, too. It must have the
# scope at one coordinate only: in a Gram matrix Σ_k x_ik x_jk, the choice of k could be the choice of i or of j.

Members = Mapping[Axis, Sequence[Place]]
"""Axis → the weights' dimensions that hold it."""

Holder = tuple[Term, set[Term]]
"""A dimension of a weight or a constant, and the terms of the weight's dimensions (for a constant: none)."""


def find_scopes(
    facts: AxisFacts, weights: Mapping[str, Dims], members: Members, offered: Sequence[Axis]
) -> dict[Axis, tuple[Axis, ...]]:
    """The scope of each axis in ``offered``, in the order of ``members``."""
    beside = _find_companions(facts, set(offered))
    holders = _find_holders(facts, weights)
    scopes: dict[Axis, tuple[Axis, ...]] = {}
    # If two axes always occur together, either could vary along the other. In a product the inner axis comes later, so
    # in reverse it is first, and varies along the outer one.
    for axis in reversed(offered):
        present = beside.get(axis, set())
        outer = [other for other in members if other in present and axis not in scopes.get(other, ())]
        scopes[axis] = tuple(other for other in outer if _can_vary(axis, other, holders[axis]))
    return scopes


def _find_companions(facts: AxisFacts, wanted: set[Axis]) -> dict[Axis, set[Axis]]:
    """Axis → the other axes that every value with this axis has at one coordinate."""
    found: dict[Axis, set[Axis]] = {}
    # Layers repeat the same few combinations of axes, so each is looked at once.
    for counts in {frozenset(count_coordinates(dims, each=True).items()) for dims in _collect_value_dims(facts)}:
        held = {axis for axis, _ in counts}
        # A routed row determines its expert, so the choice may vary by expert although the value has no such axis.
        routed = collect_axes(r.expert for r in facts.routes if collect_axes([r.rows]) <= held)
        present = {axis for axis, count in counts if count == 1} | routed
        for axis in (held | routed) & wanted:
            found[axis] = (found[axis] & present if axis in found else present) - {axis}
    return found


def _collect_value_dims(facts: AxisFacts) -> set[Dims]:
    """The dimensions of all values, of values inside calls, and of constants at their uses, without repeats."""
    found = set(facts.inner).union(*(facts.list_dims(node) for node in facts.results))
    return found.union(dims for uses in facts.constant_uses.values() for _, dims in uses)


def _find_holders(facts: AxisFacts, weights: Mapping[str, Dims]) -> dict[Axis, list[Holder]]:
    """Axis → the dimensions of weights and constants that hold it."""
    constants = [dims for uses in facts.constant_uses.values() for _, dims in uses]
    tensors = [*((dims, set(dims)) for dims in weights.values()), *((dims, set[Term]()) for dims in constants)]
    found: dict[Axis, list[Holder]] = {}
    for dims, apart in tensors:
        for term in dims:
            for axis in dict.fromkeys(list_axes(term)):
                found.setdefault(axis, []).append((term, apart))
    return found


def _can_vary(axis: Axis, scope: Axis, holders: Sequence[Holder]) -> bool:
    """Whether in every dimension the scope encloses the axis or is another dimension of the same weight."""
    return all(is_nested(term, scope, axis) or scope in apart for term, apart in holders)


# ---- names for people, guessed from structure; all of them are in ``mptk/ir/family_names.py`` ----


def name_family(group: Group, layers: int) -> tuple[str, str]:
    """A name and a description of the family of ``group``, which has ``layers`` groups.

    1. If the axis has a role, it is used by attention, a mixture of experts or an embedding.
    2. If weights of one layer make the axis and sum over it, it is the feed-forward width, or the width between
       convolutions if one of them does either.
    3. Otherwise it is just channels.
    """
    roles = group.axis.roles
    if "expert" in roles:
        return "experts", "experts of a mixture, with their router rows"
    if "head" in roles:
        return _name_heads(group)
    if "inner" in roles:
        return _name_query_channels(group)
    if "value" in roles:
        return "v_dim", "value channels in each head"
    if "embedding" in roles:
        return "hidden", "residual width"
    if _is_feed_forward(group, layers):
        return ("conv", "channels between convolutions") if "convolution" in roles else ("ffn", "feed-forward channels")
    return "channels", "channels"


def name_blocked(axis: Axis) -> str:
    """A name of an axis that cannot be cut. Rows of a table are named before its columns: a tied head has both."""

    def is_said(sign: str) -> bool:
        return any(sign in reason for reason in axis.frozen)

    if "word" in axis.roles:
        return "vocab"
    if is_said("indexed by the model's input or a constant"):
        return "rows"
    if "embedding" in axis.roles:
        return "hidden"
    return "output" if is_said("the model's output") else "axis"


def number_duplicates(names: Iterable[str]) -> list[str]:
    """The names, numbered if several are the same: ``ffn.1``, ``ffn.2``."""
    names = list(names)
    total, seen = Counter(names), Counter[str]()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if total[name] == 1 else f"{name}.{seen[name]}")
    return found


def _name_heads(group: Group) -> tuple[str, str]:
    producers = [m for m in group.members if m.role == "producer"]
    if group.scope and len(producers) == 1:
        return "q_heads", "query heads in each KV group"
    others = {leaf for m in group.members for leaf in list_axes(m.term)} - {group.axis}
    if any("head" in leaf.roles for leaf in others):
        return "kv_groups", "KV heads with their query heads"
    return "heads", "attention heads"


def _name_query_channels(group: Group) -> tuple[str, str]:
    """Name query channels. A rotation ties the two halves of a head, so the axis occurs twice in query and key."""
    times = [sum(leaf is group.axis for leaf in list_axes(m.term)) for m in group.members if m.role == "producer"]
    tied = "value" in group.axis.roles
    fused = len(times) == 1 and not tied
    what = "query, key and value" if tied else "query and key"
    if max(times, default=0) > (2 if fused else 1):
        return "rotary_pairs", f"rotary pairs of {what} channels"
    return ("head_dim" if tied else "qk_dim"), f"{what} channels in each head"


def _is_feed_forward(group: Group, layers: int) -> bool:
    """Whether weights of one layer make the channels and sum over them."""
    distinct_weights = {re.sub(r"\d+", "*", m.weight) for m in group.members}
    once = layers > 1 or len(distinct_weights) == len(group.members)
    numbers = {tuple(re.findall(r"\.(\d+)\.", m.weight))[:1] for m in group.members}
    return once and {"producer", "consumer"} <= {m.role for m in group.members} and len(numbers) == 1
