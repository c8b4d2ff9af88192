"""exactness: which axes may be cut so that the cut model equals the masked one. A zero-propagation analysis.

"Zero the weights" is not "zero the activation": a head whose query rows are zero attends uniformly. So for every value
this pass finds the axes along which it is zero at removed positions when every weight is zero there, and then asks of
every sum over an axis whether its terms vanish. An axis with a sum that does not is *spoiled*, and the place is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Set
from typing import Any

from torch import fx

from mptk.ir.axes import Axis, coordinates, leaves
from mptk.ir.ops import base_name
from passes.analysis.aliasing import written
from passes.analysis.propagate import Walk
from passes.analysis.rules import POINTWISE
from passes.analysis.rules.table import Rule, find_rule

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
        for leaf in leaves(r.axis):
            if r.kind in ("sum", "mean") and leaf not in zeros.get(r.source, set()):
                kind = "averaged" if r.kind == "mean" else "summed"
                spoilers.setdefault(leaf, []).append(f"{kind} over while not zero ({walk.where(r.node)})")
    for node in walk.dims:
        for leaf in _infinite(node, zeros):
            spoilers.setdefault(leaf, []).append(f"infinite where it is zero ({walk.where(node)})")
    return spoilers


DIVISIONS = frozenset({"div", "div_", "divide", "true_divide", "floor_divide", "remainder", "fmod"})
INFINITE_AT_ZERO = frozenset(
    {
        *("reciprocal", "reciprocal_", "rsqrt", "rsqrt_", "log", "log_", "log2", "log2_", "log10", "log10_"),
        *("logit", "logit_", "lgamma", "lgamma_", "digamma", "digamma_", "acosh", "acosh_", "special_ndtri"),
    }
)
POWERS = frozenset({"pow", "pow_", "float_power", "float_power_"})


def _infinite(node: fx.Node, zeros: Zeros) -> set[Axis]:
    """The axes along which a call has no finite value where its operand is zero."""
    if node.op != "call_function":
        return set()
    name = base_name(node.target)
    operand: Any = None
    if name in DIVISIONS:
        operand = node.args[1]
    elif name in INFINITE_AT_ZERO or (name in POWERS and _is_negative(node.args[1])):
        operand = node.args[0]
    return zeros.get(operand, set()) if isinstance(operand, fx.Node) else set()


def _is_negative(exponent: Any) -> bool:
    return isinstance(exponent, (int, float)) and exponent < 0


def propagate_zeros(walk: Walk) -> Zeros:
    """For each value, the axes along which it is zero wherever the weights of that axis are.

    A cache is zero where all that was ever added to it is: assumed of its input, until the output confirms it.
    """
    caches = {node: set(walk.axes_of(node)) for node in walk.caches}
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
            zeros[node] = zeros[node.args[0]] & walk.axes_of(node)
        else:
            zeros[node] = _result(walk, node, zeros) & walk.axes_of(node)
            _write_back(walk, node, zeros)
    return zeros


def _result(walk: Walk, node: fx.Node, zeros: Zeros) -> set[Axis]:
    rule: Rule = find_rule(node) or POINTWISE
    operands = list(_tensors([*node.args, *node.kwargs.values()]))

    def zero(value: Any) -> set[Axis]:
        found = zeros.get(value, set()) if isinstance(value, fx.Node) else set()
        if not found or not (several := multiplicities(walk, node)):
            return found
        held = multiplicities(walk, value)
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


def multiplicities(walk: Walk, node: fx.Node) -> dict[Axis, int]:
    """How many coordinates of a value run along the same axis, for axes with more than one.

    Of an outer sum x_i + x_j over one axis, each operand is zero along its own coordinate only: the result at neither.
    """
    counts = walk.repeated.get(node)
    if counts is None:
        counts = walk.repeated[node] = {}
        dims = walk.dims[node]
        for result in dims if isinstance(dims, list) else [dims]:
            for a, n in coordinates(result or (), each=True).items():
                if n > 1:
                    counts[a] = max(n, counts.get(a, 0))
    return counts


def _uses(walk: Walk, node: fx.Node, value: fx.Node) -> Set[Axis]:
    """The axes of an operand as the call sees it (a constant has its own at each use)."""
    if value in walk.variable:
        return walk.axes_of(value)
    return {leaf for _, dims in walk.constant_uses.get(node, []) for d in dims for leaf in leaves(d)}


def _write_back(walk: Walk, node: fx.Node, zeros: Zeros) -> None:
    """Where a call leaves its target other than zero, so is all that shares the target's memory.

    Axes that the target lacks stay as they were: it is a view of fixed positions along them.
    """
    lost = walk.axes_of(node) - zeros[node]
    for target in written(node):
        for alias in walk.memory[target]:
            if alias in zeros:
                zeros[alias] = zeros[alias] - lost


def _tensors(arguments: Any) -> Iterator[fx.Node]:
    for a in arguments:
        if isinstance(a, (list, tuple)):
            yield from _tensors(a)
        elif isinstance(a, fx.Node):
            yield a
