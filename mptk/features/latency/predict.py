"""predict: the milliseconds of a decoder in ONNX Runtime from its families' widths.

    T(widths) = Σ t_matmul(M, K, N) + Σ t_attention(M, past, heads, KV heads, dims) + Σ (a + b · elements)

The sums run over the products with weights, the attentions and all other operators of the graph. M is the number of new
tokens. Operators are timed (``operator_times.py``) at a few widths of each family; between these, times are
interpolated linearly. In a quantised graph the products have weights in blocks of 8 or 4 bits; the rest is the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import fx

from mptk.cost.budgets import list_phase_tokens
from mptk.cost.model import Shares, compute_depth_shares, count_example_tokens, find_unrepeated, is_attention, is_view
from mptk.cost.operator_times import ATTENTION, BLOCK_MATMUL, ELEMENTWISE, MATMUL, Operator, interpolate
from mptk.errors import AnalysisError
from mptk.ir import (
    Analysis,
    Axis,
    AxisFacts,
    Contraction,
    SourceLocation,
    Term,
    compute_size,
    get_argument,
    list_block_calls,
    list_schema_arguments,
)
from passes.targets.onnx.block_weights import choose_format

PROBES = (0.91, 0.83, 0.71)
"""Shares of the dense widths at which two operators' sizes are compared."""
KNOTS = {1: 6, 2: 4, 3: 3}
"""Number of families that an operator depends on → number of widths at which it is timed for each; else 2."""

BITS: Mapping[str, Literal[8, 4]] = {"int8": 8, "int4": 4}
"""Scheme → the bits of its products' weights."""

FractionalWidths = Mapping[str, float]
SizesOf = Callable[[Mapping[Axis, float]], tuple[float, ...]]
"""Sizes of axes → an operator's sizes."""
Measure = Callable[[Sequence[Operator]], Mapping[Operator, float]]
"""Operators → milliseconds of each."""


@dataclass(frozen=True)
class OperatorGroup:
    """``count`` operators of one kind, whose sizes are the same function of the axes' sizes.

    ``block``: a block in which they all are, or one like it, if blocks can be removed; the stack's axis and its number.
    """

    kind: str
    count: int
    sizes: SizesOf
    block: tuple[Axis, int] | None = None

    def count_left(self, shares: Shares) -> float:
        """How many operators are left, on average over the choices of blocks."""
        axis, unit = self.block or (None, 0)
        return self.count * shares[axis][unit] if axis in shares else self.count

    def make_operator(self, axes: Mapping[Axis, float]) -> Operator:
        return Operator(self.kind, tuple(round(size) for size in self.sizes(axes)))


@dataclass(frozen=True)
class Grid:
    """Milliseconds at the knots of some families' widths. ``values`` has one dimension for each family."""

    knots: Mapping[str, Sequence[int]]
    values: npt.NDArray[np.float64]

    def __call__(self, widths: FractionalWidths) -> float:
        values = self.values
        for name, knots in self.knots.items():
            values = interpolate(knots, values, widths.get(name, knots[-1]))
        return float(values)


class Latency:
    """Milliseconds of one step at any widths, which may be fractions. Families that are not named stay whole.

    Args:
        analysis: of a language model.
        ladders: family that may be cut → its legal widths, ascending, the dense width last.
        objective: a phase of ``OBJECTIVES``.
        measure: operators → milliseconds of each. Called once.
        scheme: of a quantised graph, a key of ``BITS``; "": of the float32 graph.
        context: tokens in the KV cache in decode; None: ``PROMPT``.

    Raises:
        MptkError: the objective is unknown, or the model has an operation that cannot be timed here.
    """

    def __init__(
        self,
        analysis: Analysis,
        ladders: Mapping[str, Sequence[int]],
        objective: str,
        measure: Measure,
        scheme: str = "",
        context: int | None = None,
    ) -> None:
        self._analysis = analysis
        parts = find_parts(analysis, *list_phase_tokens(objective, context), scheme)
        self._simple = [p for p in parts if p.kind == ELEMENTWISE]

        # Products and attentions are timed on a grid of the widths that they depend on. For element-wise operators two
        # sizes are enough: their time is a line.
        knots = [(p, self._choose_knots(p, ladders)) for p in parts if p.kind != ELEMENTWISE]
        self._ends = [1, max(p.make_operator({}).sizes[0] for p in self._simple)]
        ends = [Operator(ELEMENTWISE, (size,)) for size in self._ends]
        # All operators in one call, so that the rounds of timing are spread over all of them.
        wanted = {self._make_operator(p, widths) for p, k in knots for widths in _list_corners(k)}
        times = measure(sorted(wanted | set(ends)))
        self._grids = [(p, self._build_grid(p, k, times)) for p, k in knots]
        self._end_ms = np.array([times[end] for end in ends])

    def __call__(self, widths: FractionalWidths) -> float:
        axes = self._analysis.sizes(widths)
        shares = compute_depth_shares(self._analysis, widths)
        total = sum(part.count_left(shares) * grid(widths) for part, grid in self._grids)
        return total + sum(p.count_left(shares) * self._predict_elementwise(p.sizes(axes)[0]) for p in self._simple)

    def _predict_elementwise(self, elements: float) -> float:
        return float(interpolate(self._ends, self._end_ms, elements))

    def _make_operator(self, part: OperatorGroup, widths: FractionalWidths) -> Operator:
        return part.make_operator(self._analysis.sizes(widths))

    def _choose_knots(self, part: OperatorGroup, ladders: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
        """The widths at which a part is timed: for each family that it depends on, evenly spread over the ladder."""
        names = [
            name
            for name, ladder in ladders.items()
            if self._make_operator(part, {name: ladder[0]}) != part.make_operator({})
        ]
        return {name: sample_rungs(ladders[name], KNOTS.get(len(names), 2)) for name in names}

    def _build_grid(
        self, part: OperatorGroup, knots: Mapping[str, Sequence[int]], times: Mapping[Operator, float]
    ) -> Grid:
        """Measured times, made monotonic in width: no operator counts as slower than a wider one."""
        values = np.array([times[self._make_operator(part, widths)] for widths in _list_corners(knots)])
        values = values.reshape([len(k) for k in knots.values()])
        for axis in range(values.ndim):
            values = np.flip(np.minimum.accumulate(np.flip(values, axis), axis), axis)
        return Grid(knots, values)


def sample_rungs(ladder: Sequence[int], most: int) -> list[int]:
    """At most ``most`` entries, evenly spread, with both ends."""
    if len(ladder) <= most:
        return list(ladder)
    return [ladder[round(i * (len(ladder) - 1) / (most - 1))] for i in range(most)]


def _list_corners(knots: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    return [dict(zip(knots, combination, strict=True)) for combination in itertools.product(*knots.values())]


# ---- what a model computes ----


def find_parts(analysis: Analysis, tokens: int, past: int, scheme: str = "") -> list[OperatorGroup]:
    """The operators of one step with ``tokens`` new and ``past`` cached tokens; equal ones are counted as one part.

    ``scheme``: as of ``Latency``.
    """
    # The trace is of some example tokens; rows are scaled to the phase's.
    share = tokens / count_example_tokens(analysis)
    products = analysis.facts.contractions
    found = [(p.node, *_describe_contraction(analysis, p, share, tokens, past)) for p in products]
    if scheme:
        head = find_logit_product(analysis)
        found = [
            (n, BLOCK_MATMUL, _add_format(sizes, BITS[scheme], n is head)) if kind == MATMUL else (n, kind, sizes)
            for n, kind, sizes in found
        ]
    found += [(node, ELEMENTWISE, _count_elements(analysis, node, share)) for node in _find_other_calls(analysis)]

    # Operators of removable blocks are kept apart by stack, since a depth changes how many of them are left.
    blocks = {
        node: (stack.axis, unit) for node, (stack, unit) in list_block_calls(analysis.stacks) if unit not in stack.stay
    }
    # Sizes that are equal at three arbitrary points are taken as one function of the widths. Family i has the share
    # x^(i + 1), so that no two families are alike.
    points = [analysis.sizes({f.name: f.size * x ** (i + 1) for i, f in enumerate(analysis.families)}) for x in PROBES]
    equal: dict[tuple[str, Axis | None, tuple[float, ...]], list[tuple[fx.Node, SizesOf]]] = {}
    for node, kind, sizes in found:
        values = tuple(round(x, 6) for point in points for x in sizes(point))
        stack, _ = blocks.get(node, (None, 0))
        equal.setdefault((kind, stack, values), []).append((node, sizes))
    return [
        OperatorGroup(kind, len(same), sizes, blocks.get(node))
        for (kind, _, _), same in equal.items()
        for node, sizes in same[:1]
    ]


def _describe_contraction(
    analysis: Analysis, product: Contraction, share: float, tokens: int, past: int
) -> tuple[str, SizesOf]:
    facts = analysis.facts
    weights = [side for side in (product.right, product.left) if facts.is_weight(side[0])]
    if not weights and is_attention(product.node):
        return ATTENTION, _describe_attention(facts, product.node, tokens, past)
    if not weights or len(facts.dims(weights[0][0])) != 2:
        what = "has a weight of other than two dimensions" if weights else "multiplies two activations"
        raise AnalysisError(
            f"no latency can be predicted: {SourceLocation(product.node)} {what}; use --budget flops",
            name=SourceLocation(product.node),
        )
    weight, dim = weights[0]
    n = facts.dims(weight)[1 - dim]

    def compute_sizes(axes: Mapping[Axis, float]) -> tuple[float, ...]:
        # The output has rows times columns elements, so the rows follow from it.
        columns = compute_size(n, axes)
        return _multiply_sizes(product.out, axes) / columns * share, compute_size(product.axis, axes), columns

    return MATMUL, compute_sizes


def find_logit_product(analysis: Analysis) -> fx.Node | None:
    """The product that gives the logits; None if the first output comes from none."""
    products = {product.node for product in analysis.facts.contractions}
    node: fx.Node | None = analysis.program.graph.graph.output_node().all_input_nodes[0]
    while node is not None and node not in products:  # a cast, or a cap on the logits
        node = next(iter(node.all_input_nodes), None)
    return node


def _add_format(sizes: SizesOf, bits: Literal[8, 4], logits: bool) -> SizesOf:
    """The sizes of a product whose weights are rounded, as its quantised graph rounds them."""

    def compute_sizes(axes: Mapping[Axis, float]) -> tuple[float, ...]:
        rows, k, n = sizes(axes)
        return rows, k, n, *choose_format(bits, round(k), logits)

    return compute_sizes


def _describe_attention(facts: AxisFacts, node: fx.Node, tokens: int, past: int) -> SizesOf:
    """The KV heads are counted in the keys before these are repeated for the query heads that share them."""
    q, k, v = (facts.dims(get_argument(node, name)) for name in ("query", "key", "value"))
    before = facts.dims(find_unrepeated(get_argument(node, "key")))

    def compute_sizes(axes: Mapping[Axis, float]) -> tuple[float, ...]:
        # Between the batch and the last two dimensions (tokens, channels) are the heads.
        groups = _multiply_sizes(k[1:-2], axes) * _multiply_sizes(before, axes) / _multiply_sizes(k, axes)
        return (
            tokens,
            past,
            _multiply_sizes(q[1:-2], axes),
            groups,
            compute_size(q[-1], axes),
            compute_size(v[-1], axes),
        )

    return compute_sizes


def _count_elements(analysis: Analysis, node: fx.Node, share: float) -> SizesOf:
    dims = analysis.facts.dims(node)
    return lambda axes: (_multiply_sizes(dims, axes) * share,)


def _find_other_calls(analysis: Analysis) -> list[fx.Node]:
    """The calls that compute an activation and are neither a product nor a view."""
    facts, products = analysis.facts, {product.node for product in analysis.facts.contractions}
    nodes = [n for n, dims in facts.results.items() if n.op == "call_function" and isinstance(dims, tuple)]
    nodes = [n for n in nodes if n in facts.activations and n not in products]
    return [n for n in nodes if list_schema_arguments(n.target) and not is_view(n)]


def _multiply_sizes(dims: Sequence[Term], axes: Mapping[Axis, float]) -> float:
    return math.prod(compute_size(term, axes) for term in dims)
