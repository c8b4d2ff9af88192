"""exactness: which axes may be cut so that the cut model equals the masked one. A zero-propagation analysis.

"Zero the weights" is not "zero the activation": a head whose query rows are zero attends uniformly. So for every value
this pass finds the axes along which it is zero at removed positions when every weight is zero there, and then asks of
every sum over an axis whether its terms vanish. An axis with a sum that does not is *spoiled*, and the place is kept.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import fx

from mptk.axes import Axis, Product, Term, leaves, resolve
from passes.propagate import Walk, mutated
from passes.rules import POINTWISE
from passes.rules.table import Rule, find_rule, op_name

Zeros = dict[fx.Node, set[Axis]]


def find_spoilers(walk: Walk) -> dict[Axis, list[str]]:
    """Axis → why cutting it would change the result, for every axis where it would."""
    zeros = propagate_zeros(walk)
    spoilers: dict[Axis, list[str]] = {}
    for c in walk.contractions:
        safe = zeros.get(c.left[0], set()) | zeros.get(c.right[0], set())
        for leaf in leaves(c.axis):
            if leaf not in safe:
                spoilers.setdefault(leaf, []).append(f"summed over while not zero ({walk.where(c.node)})")
    for r in walk.reductions:
        source = next(iter(_tensors(r.node.args)))
        for leaf in leaves(r.axis):
            if r.kind in ("sum", "mean") and leaf not in zeros.get(source, set()):
                kind = "averaged" if r.kind == "mean" else "summed"
                spoilers.setdefault(leaf, []).append(f"{kind} over while not zero ({walk.where(r.node)})")
    for node in walk.dims:
        for leaf in _infinite(node, zeros):
            spoilers.setdefault(leaf, []).append(f"infinite where it is zero ({walk.where(node)})")
    return spoilers


DIVISIONS = frozenset({"div", "div_", "divide", "true_divide", "floor_divide", "remainder", "fmod"})
INFINITE_AT_ZERO = frozenset({"reciprocal", "reciprocal_", "rsqrt", "rsqrt_", "log", "log_", "log2", "log10"})


def _infinite(node: fx.Node, zeros: Zeros) -> set[Axis]:
    """The axes along which a call has no finite value where its operand is zero."""
    if node.op != "call_function":
        return set()
    name = op_name(node).split(".")[1]
    operand: Any = None
    if name in DIVISIONS:
        operand = node.args[1]
    elif name in INFINITE_AT_ZERO or (name == "pow" and _is_negative(node.args[1])):
        operand = node.args[0]
    return zeros.get(operand, set()) if isinstance(operand, fx.Node) else set()


def _is_negative(exponent: Any) -> bool:
    return isinstance(exponent, (int, float)) and exponent < 0


def propagate_zeros(walk: Walk) -> Zeros:
    """For each value, the axes along which it is zero wherever the weights of that axis are.

    A cache is zero where all that was ever added to it is: assumed of its input, until the output confirms it.
    """
    caches = {node: _axes(walk, node) for node in walk.caches}
    while True:
        zeros = _propagate_zeros(walk, caches)
        confirmed = {node: caches[node] & zeros[walk.caches[node]] for node in caches}
        if confirmed == caches:
            return zeros
        caches = confirmed


def _propagate_zeros(walk: Walk, caches: Zeros) -> Zeros:
    zeros: Zeros = dict(caches)
    for node in walk.program.graph.graph.nodes:
        if node not in walk.variable or node in caches:
            continue
        if node.op == "placeholder":
            zeros[node] = {leaf for d in walk.dims[node] for leaf in leaves(d)}
        elif node.target is operator.getitem:
            zeros[node] = zeros[node.args[0]] & _axes(walk, node)
        else:
            zeros[node] = _result(walk, node, zeros) & _axes(walk, node)
            _write_back(node, zeros)
    return zeros


def _axes(walk: Walk, node: fx.Node) -> set[Axis]:
    dims = walk.dims[node]
    several = dims if isinstance(dims, list) else [dims]
    return {leaf for result in several if result is not None for d in result for leaf in leaves(d)}


def _result(walk: Walk, node: fx.Node, zeros: Zeros) -> set[Axis]:
    rule: Rule = find_rule(node) or POINTWISE
    operands = list(_tensors([*node.args, *node.kwargs.values()]))
    several = multiplicities(walk.dims[node])

    def zero(value: Any) -> set[Axis]:
        found = zeros.get(value, set()) if isinstance(value, fx.Node) else set()
        if not several or not found:
            return found
        held = multiplicities(walk.dims[value])
        return {a for a in found if held.get(a, 1) >= several.get(a, 1)}

    if callable(rule.zero):
        return set(rule.zero(node, zero, walk))
    if rule.zero in ("keep", "move"):
        return zero(operands[0])
    if rule.zero == "any":
        return set().union(*map(zero, operands))
    if rule.zero == "all":
        return set.intersection(*map(zero, operands))
    if rule.zero == "join":
        nonzero = set().union(*(_uses(walk, node, v) - zero(v) for v in operands))
        result: set[Axis] = set().union(*map(zero, operands)) - nonzero
        return result
    return set()


def multiplicities(dims: Any) -> dict[Axis, int]:
    """How many coordinates of a value run along the same axis, for axes with more than one.

    Of an outer sum x_i + x_j over one axis, each operand is zero along its own coordinate only: the result at neither.
    """
    counts: Counter[Axis] = Counter()
    for result in dims if isinstance(dims, list) else [dims]:
        counts |= sum((_coordinates(d) for d in result or ()), Counter())
    return {a: n for a, n in counts.items() if n > 1}


def _coordinates(term: Term) -> Counter[Axis]:
    term = resolve(term)
    if isinstance(term, Axis):
        return Counter([term])
    counts: Counter[Axis] = Counter()
    for part in term.factors if isinstance(term, Product) else term.segments:
        counts = counts + _coordinates(part) if isinstance(term, Product) else counts | _coordinates(part)
    return counts


def _uses(walk: Walk, node: fx.Node, value: fx.Node) -> set[Axis]:
    """The axes of an operand as the call sees it (a constant has its own at each use)."""
    if value in walk.variable:
        return _axes(walk, value)
    return {leaf for _, dims in walk.constant_uses.get(node, []) for d in dims for leaf in leaves(d)}


def _write_back(node: fx.Node, zeros: Zeros) -> None:
    """An in-place call leaves its target zero only where its result is, and so whatever the target is a view of."""
    pending = mutated(node)
    seen: set[fx.Node] = set()
    while pending:
        target = pending.pop()
        if target in seen or target not in zeros:
            continue
        seen.add(target)
        zeros[target] = zeros[target] & zeros[node]
        pending += mutated(target, views=True)


def _tensors(arguments: Any) -> Iterator[fx.Node]:
    for a in arguments:
        if isinstance(a, (list, tuple)):
            yield from _tensors(a)
        elif isinstance(a, fx.Node):
            yield a
