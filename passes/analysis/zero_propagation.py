"""zero_propagation: find the axes that can be cut so that the cut model equals the masked one.

"Zero the weights" is not "zero the activation": a head with zero query rows attends uniformly. So the analysis assumes
that every weight is zero at removed positions, and finds the axes along which each value is then zero, too. For every
sum over an axis it checks that the removed terms vanish. If they do not, the axis is *spoiled*, with the place.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet

from torch import fx

from mptk.ir import Axis, AxisFacts, SourceLocation, collect_axes, count_coordinates, list_axes, name_base_op
from passes.analysis.dependence import list_nodes
from passes.analysis.rules import POINTWISE
from passes.analysis.rules.table import find_rule

Zeros = dict[fx.Node, set[Axis]]
Multiplicities = Callable[[fx.Node], Mapping[Axis, int]]


def find_spoilers(facts: AxisFacts) -> dict[Axis, list[str]]:
    """Axis → the reasons why a cut of it would change the result; only axes with such a reason."""
    zeros = propagate_zeros(facts)
    spoilers: dict[Axis, list[str]] = {}

    def spoil(axes: Iterable[Axis], reason: str, node: fx.Node) -> None:
        for axis in axes:
            spoilers.setdefault(axis, []).append(f"{reason} ({SourceLocation(node)})")

    # A product is zero if either operand is.
    for product in facts.contractions:
        safe = zeros.get(product.left[0], set()) | zeros.get(product.right[0], set())
        spoil((a for a in list_axes(product.axis) if a not in safe), "summed over while not zero", product.node)
    # The masked reference leaves removed channels out of all other kinds of reductions (``masked_reference.py``).
    for reduction in facts.reductions:
        if reduction.kind in ("sum", "mean"):
            safe = zeros.get(reduction.source, set())
            verb = "averaged" if reduction.kind == "mean" else "summed"
            spoil(
                (a for a in list_axes(reduction.axis) if a not in safe), f"{verb} over while not zero", reduction.node
            )
    for node in facts.results:
        spoil(_find_infinite_axes(node, zeros), "infinite where it is zero", node)
    return spoilers


def find_divisors(facts: AxisFacts) -> dict[fx.Node, set[Axis]]:
    """Weight → the axes along which calls would be infinite if it were zero there, such as Snake's α in sin²(αx)/α.

    The masked model keeps the numbers of such a weight. The quotient must then be zero by other weights; if it is not,
    the axis is spoiled.
    """
    zeros, found = propagate_zeros(facts), dict[fx.Node, set[Axis]]()
    for node in facts.results:
        axes = _find_infinite_axes(node, zeros)
        # Back from the divisor to all weights that it is made of.
        waiting = [n for n in node.all_input_nodes if axes and facts.is_weight(n) and axes & zeros[n]]
        while waiting:
            source = waiting.pop()
            if source.op == "placeholder":
                found.setdefault(source, set()).update(axes)
            waiting += [n for n in source.all_input_nodes if n in facts.results]
    return found


DIVISIONS = frozenset({"div", "div_", "divide", "true_divide", "floor_divide", "remainder", "fmod"})
INFINITE_AT_ZERO = frozenset(
    {
        *("reciprocal", "reciprocal_", "rsqrt", "rsqrt_", "log", "log_", "log2", "log2_", "log10", "log10_"),
        *("logit", "logit_", "lgamma", "lgamma_", "digamma", "digamma_", "acosh", "acosh_", "special_ndtri"),
    }
)
POWERS = frozenset({"pow", "pow_", "float_power", "float_power_"})


def _find_infinite_axes(node: fx.Node, zeros: Zeros) -> set[Axis]:
    """The axes along which a call has no finite value if its operand is zero there."""
    if node.op != "call_function":
        return set()
    name = name_base_op(node.target)
    operand: object = None
    if name in DIVISIONS:
        operand = node.args[1]
    elif name in INFINITE_AT_ZERO or (name in POWERS and isinstance(p := node.args[1], (int, float)) and p < 0):
        operand = node.args[0]
    return zeros.get(operand, set()) if isinstance(operand, fx.Node) else set()


def propagate_zeros(facts: AxisFacts) -> Zeros:
    """Value → the axes along which it is zero at the positions at which the weights of that axis are zero.

    A cache is zero along an axis if every value added to it is. This is assumed of its input until the output confirms
    it.
    """
    caches = {node: set(facts.find_axes(node)) for node in facts.caches}
    multiplicities = functools.cache(functools.partial(find_multiplicities, facts))
    # A greatest fixed point: the assumption only shrinks, so this ends.
    while True:
        zeros = _Propagation(facts, caches, multiplicities).run()
        confirmed = {node: caches[node] & zeros[facts.caches[node]] for node in caches}
        if confirmed == caches:
            return zeros
        caches = confirmed


def find_multiplicities(facts: AxisFacts, node: fx.Node) -> Mapping[Axis, int]:
    """Axis → the number of coordinates of a value along it, for axes with more than one.

    In an outer sum x_i + x_j over one axis, each operand is zero along its own coordinate only, so the result is zero
    along neither.
    """
    # Axes with one coordinate, nearly all, are left out: the common case of an empty result is then quick.
    counts: dict[Axis, int] = {}
    for dims in facts.list_dims(node):
        for a, n in count_coordinates(dims, each=True).items():
            if n > 1:
                counts[a] = max(n, counts.get(a, 0))
    return counts


class _Propagation:
    """One walk from the weights and ``caches``, whose zeros are assumed, to the outputs."""

    def __init__(self, facts: AxisFacts, caches: Zeros, multiplicities: Multiplicities) -> None:
        self.facts, self.caches, self.multiplicities = facts, caches, multiplicities
        self.zeros = dict(caches)

    def run(self) -> Zeros:
        for node in self.facts.results:
            if node not in self.caches:
                self.zeros[node] = self._visit(node)
                self._write_back(node)
        return self.zeros

    def _visit(self, node: fx.Node) -> set[Axis]:
        axes = self.facts.find_axes(node)
        # This is the assumption: a weight is zero along all its axes, unless something is divided by it.
        if node.op == "placeholder":
            return set(axes.difference(self.facts.divisors.get(node, ())))
        if node.target is operator.getitem:
            return self.zeros[node.all_input_nodes[0]] & axes
        return self._find_zero_axes(node) & axes

    def _find_zero_axes(self, node: fx.Node) -> set[Axis]:
        """The axes along which the result of a call is zero, by the rule of its op."""
        rule = find_rule(node) or POINTWISE
        zero = functools.partial(self._find_operand_zeros, node)
        if callable(rule.zero):
            return rule.zero(node, zero, self.facts)
        operands = list(list_nodes([*node.args, *node.kwargs.values()]))
        if rule.zero == "drop":
            return set()
        if rule.zero == "keep":
            return zero(operands[0])
        if rule.zero == "all":
            return set.intersection(*map(zero, operands))
        found: set[Axis] = set().union(*map(zero, operands))
        if rule.zero == "any":
            return found
        # A concatenation: an operand without the axis has no removed positions of it.
        assert rule.zero == "join", f"{rule.zero} is no kind of zero"
        return found.difference(*(self._find_use_axes(node, v) - zero(v) for v in operands))

    def _find_operand_zeros(self, node: fx.Node, value: object) -> set[Axis]:
        """The axes along which an operand is zero. It must have as many coordinates along them as the result.

        A constant that holds zeros only is zero along each axis of which the result has one coordinate.
        """
        if not isinstance(value, fx.Node):
            return set()
        if value in self.facts.zeros:
            return {a for a in self.facts.find_axes(node) if self.multiplicities(node).get(a, 1) == 1}
        found = self.zeros.get(value, set())
        if not found or not (several := self.multiplicities(node)):
            return found
        held = self.multiplicities(value)
        return {a for a in found if held.get(a, 1) >= several.get(a, 1)}

    def _find_use_axes(self, node: fx.Node, value: fx.Node) -> AbstractSet[Axis]:
        """The axes of an operand at this call (a constant has its own axes at each use)."""
        if value in self.facts.results:
            return self.facts.find_axes(value)
        return collect_axes(t for _, dims in self.facts.constant_uses.get(node, []) for t in dims)

    def _write_back(self, node: fx.Node) -> None:
        """If a call writes numbers other than zero, no value that shares the target's memory is zero there.

        Axes that the target lacks do not change: the target is a view of fixed positions along them.
        """
        lost = self.facts.find_axes(node) - self.zeros[node]
        for changed in self.facts.writes.get(node, ()):
            if changed in self.zeros:
                self.zeros[changed] = self.zeros[changed] - lost
