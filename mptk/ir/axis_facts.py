"""axis_facts: the findings of the axis analysis. The terms of every value, and what the calls do along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

from torch import fx

from mptk.ir.axes import Axis, Term, collect_axes

Dims = tuple[Term, ...]
"""One term for each dimension of a tensor."""

Results = Dims | list[Dims] | list[Dims | None]
"""The dimensions of a call's result. Several results are a list, with None for a result that is not a tensor."""

Positions = Term | list[Term | None] | None
"""The axis whose positions a value's integers are, for example after an argmax. Several results are a list."""

ArgumentPath = tuple[int | str, ...]
"""The place of an argument in a call: its position or its name, then positions in nested lists."""

ReductionKind = Literal["sum", "mean", "statistic", "max", "min"]

Note = TypeVar("Note")


@dataclass(frozen=True)
class Contraction:
    """A sum of products over ``axis``. ``left``, ``right``: (node, dimension) of an operand; ``out``: the result."""

    node: fx.Node
    axis: Term
    left: tuple[fx.Node, int]
    right: tuple[fx.Node, int]
    out: Dims


@dataclass(frozen=True)
class Reduction:
    """A call reduces the operand ``source`` over ``axis``. A ``statistic`` is a mean with a variance."""

    node: fx.Node
    axis: Term
    kind: ReductionKind
    source: fx.Node


@dataclass(frozen=True)
class Route:
    """The rows of a value were routed to experts: a row determines its expert."""

    rows: Term
    expert: Term


@dataclass(frozen=True, eq=False)
class AxisFacts:
    """The result of the axis analysis of ``graph``.

    Only values that depend on a weight or a cache have terms of their own (``results``). All others are constants of
    the analysis: they get fresh axes at each use (``constant_uses``).

    Attributes:
        results: value → the terms of its dimensions, in the graph's order.
        weights: name of a weight in the program's state → its terms.
        constant_uses: call → its constant arguments: the place of each, and its terms at this use.
        zeros: constants that are zero everywhere.
        contractions: every sum of products, in the graph's order.
        reductions: every other operation that combines positions along an axis.
        inner: dimensions of values inside a call, such as attention scores.
        routes: rows that were routed to experts.
        notes: call → its rule's note for the cut (``passes/analysis/rules/resizer.py``).
        activations: values that depend on the user's inputs.
        caches: an input that the model continues (a KV cache) → the output that continues it.
        writes: call that writes in place → every value whose memory it may change, in the graph's order.
        divisors: weight that something is divided by → the axes along which the masked model keeps its numbers.
    """

    graph: fx.Graph
    results: Mapping[fx.Node, Results]
    weights: Mapping[str, Dims]
    constant_uses: Mapping[fx.Node, Sequence[tuple[ArgumentPath, Dims]]] = field(repr=False)
    zeros: AbstractSet[fx.Node] = field(repr=False)
    contractions: Sequence[Contraction] = field(repr=False)
    reductions: Sequence[Reduction] = field(repr=False)
    inner: Sequence[Dims] = field(repr=False)
    routes: Sequence[Route] = field(repr=False)
    notes: Mapping[fx.Node, object] = field(repr=False)
    activations: AbstractSet[fx.Node] = field(repr=False)
    caches: Mapping[fx.Node, fx.Node] = field(repr=False)
    writes: Mapping[fx.Node, Sequence[fx.Node]] = field(repr=False)
    divisors: Mapping[fx.Node, AbstractSet[Axis]] = field(default_factory=dict, repr=False)

    def dims(self, node: fx.Node) -> Dims:
        """The terms of a value, which must be one tensor; no terms for a constant."""
        found = self.results.get(node, ())
        assert isinstance(found, tuple), f"{node} has several results"
        return found

    def list_dims(self, node: fx.Node) -> list[Dims]:
        """The terms of each tensor among a value's results."""
        return list_tensor_dims(self.results[node])

    def find_axes(self, node: fx.Node) -> frozenset[Axis]:
        """All axes of a value."""
        return self._axes[node]

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a value depends only on weights (a weight, its transpose, a merge of several)."""
        return node in self.results and node not in self.activations

    def has_weight(self, product: Contraction) -> bool:
        """Whether an operand of a product is a weight. If not, both are activations."""
        return self.is_weight(product.left[0]) or self.is_weight(product.right[0])

    def note(self, node: fx.Node, kind: type[Note]) -> Note | None:
        """The note of a call's rule, if it is of this kind."""
        found = self.notes.get(node)
        return found if isinstance(found, kind) else None

    # Terms are final once the analysis is done, so their axes can be kept. Only then may this be asked.
    @cached_property
    def _axes(self) -> dict[fx.Node, frozenset[Axis]]:
        return {
            node: frozenset(collect_axes(t for dims in self.list_dims(node) for t in dims)) for node in self.results
        }


def list_tensor_dims(results: Results) -> list[Dims]:
    """The terms of each tensor among a call's results."""
    return [dims for dims in results if dims is not None] if isinstance(results, list) else [results]


def find_argument_at(node: fx.Node, path: ArgumentPath) -> fx.Node:
    """The argument of a call at a place."""
    value = node.kwargs[path[0]] if isinstance(path[0], str) else node.args[path[0]]
    for step in path[1:]:
        assert isinstance(value, (list, tuple))
        assert isinstance(step, int)
        value = value[step]
    assert isinstance(value, fx.Node)
    return value
