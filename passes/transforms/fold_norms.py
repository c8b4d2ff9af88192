"""fold_norms: after a cut of the residual width, RMS norms become ordinary ones over fewer channels.

``rewrite`` keeps a norm equal to the masked one with a scale: mean over n' channels · n'/n (``rules/reduce.py``).
With c = n'/n, 1/√(c·m + eps) = 1/√c · 1/√(m + eps/c). So the scale moves into the weight, and eps is divided by c:
weight' = weight/√c, or for a norm that multiplies by (1 + weight): 1 + weight' = (1 + weight)/√c.

The scale is folded only if the whole norm matches:
1. ``mean``, + eps, then ``rsqrt``, a power of −1/2, 1/√ or a division by √; or the op ``rms_norm``;
2. then only products and changes of type or shape, each used once, up to a product with the weight;
3. every use of the weight is in a norm with the same scale.
Otherwise the scale stays in the graph, which is still right. A stock class cannot hold a scale, so ``find_unfoldable``
refuses such a family before the cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor, fx

from mptk.ir import (
    TYPE_CHECK,
    Analysis,
    Edit,
    Family,
    Pass,
    PassResult,
    Program,
    SourceLocation,
    get_argument,
    list_axes,
    list_state_shapes,
    name_base_op,
    name_target,
)
from passes.analysis.rules.resizer import scale_of

CASTS = frozenset({"to", "_to_copy", "type_as"})
MOVES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "clone"})
PRODUCTS = frozenset({"mul", "multiply"})


@dataclass(frozen=True)
class Norm:
    """A norm that matched.

    Attributes:
        root: the mean or the whole ``rms_norm``, with its scale if it has one.
        add: the call that adds eps; None for ``rms_norm``.
        weight: the weight's placeholder.
        offset: the number added to the weight before the product (0 or 1).
    """

    root: fx.Node
    add: fx.Node | None
    weight: fx.Node
    offset: float


@dataclass(frozen=True, kw_only=True)
class Folded(PassResult):
    """``epsilons``: each epsilon of a norm that changed, old → new, for the stock config."""

    epsilons: Mapping[float, float]


@dataclass(frozen=True)
class FoldNorms(Pass):
    """Fold the scales of cut RMS norms into their weights and epsilons."""

    name: ClassVar[str] = "fold norms"

    def run(self, program: Program) -> Folded:
        graph = program.copy_graph()
        copied = replace(program, graph=graph)
        folded: dict[str, Edit] = {}
        epsilons: dict[float, float] = {}
        # Only norms that ``rewrite`` scaled. All norms of a weight have one factor (case 3), so the first tells it.
        found = _find_foldable(copied, (n for n in graph.graph.nodes if scale_of(n) is not None))
        for weight, norms in found.items():
            factor = _compute_factor(norms[0])
            offset = norms[0].offset
            name = program.weights[weight.name]
            folded[name] = partial(_scale_weight, factor=factor, offset=offset)
            for norm in norms:
                old, new = _shrink_epsilon(norm)
                epsilons[old] = new
                graph.graph.erase_node(norm.root)
        graph.recompile()
        notes = [f"epsilon {old:g} → {new:g}" for old, new in epsilons.items()]
        result = replace(copied, state=program.state.with_edits(folded))
        return Folded(result, bool(found), tuple(notes), epsilons=epsilons)

    def ensures(self, before: Program, after: Program) -> None:
        """The weights have the same names and shapes."""
        assert list_state_shapes(after) == list_state_shapes(before), "a weight has another shape"


def _scale_weight(weight: Tensor, factor: float, offset: float) -> Tensor:
    # In float32, so that a bfloat16 weight is rounded only once.
    return ((weight.float() + offset) * factor - offset).to(weight.dtype)


def find_unfoldable(analysis: Analysis, family: Family) -> str | None:
    """The place (op, module, line) at which a cut of ``family`` leaves a scale that no weight can take; or None."""
    # On the dense graph, which has no scales yet: what matches there matches after the cut.
    means, found = _find_means(analysis, family)
    folded = {norm.root for norms in found.values() for norm in norms}
    return next((str(SourceLocation(node)) for node in means if node not in folded), None)


def find_epsilons(analysis: Analysis, family: Family) -> dict[str, float]:
    """Weight → the epsilon of its norm, which a cut of ``family`` changes."""
    _, found = _find_means(analysis, family)
    return {analysis.program.weights[weight.name]: _read_epsilon(norms[0]) for weight, norms in found.items()}


def _find_means(analysis: Analysis, family: Family) -> tuple[dict[fx.Node, None], dict[fx.Node, list[Norm]]]:
    """The means over a family's channels, and of these the foldable ones, by weight."""
    axes = {g.axis for g in family.groups}
    means = {r.node: None for r in analysis.facts.reductions if r.kind == "mean" and axes & set(list_axes(r.axis))}
    return means, _find_foldable(analysis.program, iter(means))


def _read_epsilon(norm: Norm) -> float:
    value = get_argument(norm.root, "eps") if norm.add is None else norm.add.args[1]
    assert isinstance(value, float)
    return value


def _find_foldable(program: Program, roots: Iterator[fx.Node]) -> dict[fx.Node, list[Norm]]:
    """Weight → the norms that use it, if every use of the weight is a norm with the same scale (case 3)."""
    by_weight: dict[fx.Node, list[Norm]] = {}
    for root in roots:
        norm = _match(program, root)
        if norm is not None:
            by_weight.setdefault(norm.weight, []).append(norm)
    return {
        weight: norms
        for weight, norms in by_weight.items()
        if len(norms) == len(_list_users(weight)) and len({(_compute_factor(n), n.offset) for n in norms}) == 1
    }


def _compute_factor(norm: Norm) -> float:
    """The factor for the weight; 1 before a cut."""
    # The scale of a mean is c = n'/n, and the weight takes 1/√c. The scale of an ``rms_norm`` is 1/√c itself.
    scale = scale_of(norm.root)
    if scale is None:
        return 1.0
    return 1 / math.sqrt(scale) if norm.add is not None else scale


def _shrink_epsilon(norm: Norm) -> tuple[float, float]:
    """Take the scale out of the graph. Returns the old epsilon and the new one."""
    scaled, source, scale = norm.root, norm.root.args[0], scale_of(norm.root)
    assert isinstance(source, fx.Node)
    assert scale is not None
    if norm.add is None:  # ``rms_norm`` already has the epsilon for the new number of channels
        new = get_argument(source, "eps")
        scaled.replace_all_uses_with(source)
        return new / scale**2, new  # scale² = 1/c, and new = old/c
    old = norm.add.args[1]
    assert isinstance(old, float)
    norm.add.args = (source, old / scale)
    return old, old / scale


# ---- the pattern: cases 1 and 2 ----


def _match(program: Program, root: fx.Node) -> Norm | None:
    """The norm of ``root``, which is a mean or an ``rms_norm``, or the product of one with its scale."""
    statistic = root if scale_of(root) is None else root.args[0]
    assert isinstance(statistic, fx.Node)
    op = name_base_op(statistic.target)
    if op == "rms_norm":
        return _match_rms(program, root, statistic)
    add = _find_only_call(root) if op == "mean" else None
    if add is None or name_base_op(add.target) != "add" or add.kwargs or not isinstance(add.args[1], float):
        return None
    inverse = _match_inverse_root(add)
    found = None if inverse is None else _find_weight_after(program, inverse)
    return None if found is None else Norm(root, add, *found)


def _match_rms(program: Program, root: fx.Node, norm: fx.Node) -> Norm | None:
    weight = get_argument(norm, "weight")
    if get_argument(norm, "eps") is None:  # the type's epsilon: there is no config field to change
        return None
    if weight is None:
        found = _find_weight_after(program, root)
        return None if found is None else Norm(root, None, *found)
    return Norm(root, None, weight, 0.0) if _is_parameter(program, weight) else None


def _match_inverse_root(node: fx.Node) -> fx.Node | None:
    """1/√node, or x/√node."""
    user = _find_only_call(node)
    if user is None:
        return None
    op, exponent = name_base_op(user.target), user.args[1] if len(user.args) > 1 else None
    if op == "rsqrt" or (op == "pow" and exponent == -0.5):
        return user
    if op == "sqrt" or (op == "pow" and exponent == 0.5):
        last = _find_only_call(user)
        if last is not None and _is_division_by(last, user):
            return last
    return None


def _is_division_by(node: fx.Node, divisor: fx.Node) -> bool:
    op = name_base_op(node.target)
    divides = op in ("div", "divide", "true_divide") and node.args[0] is not divisor and not node.kwargs
    return op == "reciprocal" or divides


def _find_weight_after(program: Program, node: fx.Node) -> tuple[fx.Node, float] | None:
    """The weight that multiplies ``node`` after products and moves, and the number added to it before."""
    # A product with anything but a weight (x · 1/√…) is passed through. ``view.dtype`` reads the bits as other numbers.
    while (user := _find_only_call(node)) is not None:
        others = [a for a in user.args if a is not node]
        if name_base_op(user.target) in PRODUCTS and len(others) == 1:
            found = _match_weight(program, others[0]) if isinstance(others[0], fx.Node) else None
            if found is not None:
                return found
        elif (
            name_base_op(user.target) not in CASTS | MOVES
            or user.args[0] is not node
            or name_target(user.target) == "aten.view.dtype"
        ):
            return None
        node = user
    return None


def _match_weight(program: Program, node: fx.Node) -> tuple[fx.Node, float] | None:
    """A weight and the number added to it, through calls that are used once."""
    offset = 0.0
    while node.op == "call_function" and len(node.all_input_nodes) == 1 and _find_only_call(node) is not None:
        if name_base_op(node.target) == "add" and not node.kwargs:
            offset += float(node.args[1])  # type: ignore[arg-type]
        elif name_base_op(node.target) not in CASTS:
            return None
        node = node.all_input_nodes[0]
    return (node, offset) if _is_parameter(program, node) else None


def _is_parameter(program: Program, node: fx.Node) -> bool:
    return node.op == "placeholder" and program.weights.get(node.name) in program.parameters


def _list_users(node: fx.Node) -> list[fx.Node]:
    return [u for u in node.users if u.target is not TYPE_CHECK]


def _find_only_call(node: fx.Node) -> fx.Node | None:
    users = _list_users(node)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None
