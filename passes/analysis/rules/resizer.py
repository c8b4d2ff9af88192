"""resizer: what a rule's ``resize`` may do when the graph is cut, the notes it goes by, and its common forms."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.node import Argument

from mptk.ir import (
    ArgumentPath,
    AxisFacts,
    Cut,
    Dims,
    Note,
    Term,
    find_argument_at,
    get_argument,
    resolve,
    set_argument,
)

_SCALE = "mptk_scale"
"""The key of ``scale_of`` in a node's metadata, which copies of the graph keep."""

# ---- the notes of rules about a call ----


@dataclass(frozen=True)
class Counted:
    """A number among the call's arguments counts the positions of ``term`` (groups, classes, bins)."""

    term: Term


@dataclass(frozen=True)
class Averaged:
    """A mean runs over ``terms``."""

    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Segments:
    """Dimension ``dim`` of the operand is cut into ``parts``, in order."""

    dim: int
    parts: tuple[Term, ...]


@dataclass(frozen=True)
class Picked:
    """The call reads known positions of dimension ``dim``. ``before``: the terms before each."""

    dim: int
    before: tuple[Term, ...]


@dataclass(frozen=True)
class Repeated:
    """Each position of dimension ``dim`` of the result is repeated ``times``."""

    dim: int
    times: Term


@dataclass(frozen=True)
class Squeezed:
    """Dimensions ``gone`` of the operand, of size 1, are dropped. ``kept``: the terms with more positions."""

    gone: tuple[int, ...]
    kept: tuple[Term, ...]


# ---- the smaller graph ----


@dataclass
class Resizer:
    """Edits a copy of the graph. The rules' ``resize`` functions get it as their argument."""

    facts: AxisFacts
    cut: Cut
    graph: fx.GraphModule

    def __post_init__(self) -> None:
        self.original = {n.name: n for n in self.facts.graph.nodes}

    def find_untouched(self) -> set[str]:
        """Names of the calls that did not change: same target, same arguments."""
        return {n.name for n in self.graph.graph.nodes if n.name in self.original and self._is_same_call(n)}

    def cut_caches(self) -> set[str]:
        """Give the cache inputs that lose channels their new shape. Returns their names."""
        names = set()
        for node in self.graph.graph.find_nodes(op="placeholder"):
            original = self.original[node.name]
            if original in self.facts.caches and any(map(self.has_changed, self.facts.dims(original))):
                value = node.meta["val"]
                pairs = zip(value.shape, self.facts.dims(original), strict=True)
                sizes = [self.size(term) if self.has_changed(term) else size for size, term in pairs]
                with value.fake_mode:
                    node.meta["val"] = value.new_empty(sizes)
                names.add(node.name)
        return names

    def _is_same_call(self, node: fx.Node) -> bool:
        original = self.original[node.name]
        names = [fx.map_arg((n.args, n.kwargs), lambda source: source.name) for n in (node, original)]
        # ``rewrite`` makes every view a reshape, which by itself changes nothing.
        viewed = node.target is torch.ops.aten.reshape.default and str(original.target) == "aten.view.default"
        return names[0] == names[1] and (node.target == original.target or viewed)

    # ---- for rules ----

    def dims(self, node: fx.Node) -> Dims:
        """The terms of a node's result in the dense graph."""
        return self.facts.dims(self.original[node.name])

    def note(self, node: fx.Node, kind: type[Note]) -> Note | None:
        """What the op's axis rule noted for its resizing, if it is of this kind."""
        return self.facts.note(self.original[node.name], kind)

    def size(self, term: Term) -> int:
        """The size of a dimension after the cut."""
        return self.cut.size(term)

    def has_changed(self, term: Term) -> bool:
        return self.cut.size(term) != term.size

    def scale_argument(self, argument: Argument, term: Term) -> Argument:
        """A size argument after the cut. −1 stays; a symbolic size that also counts channels is scaled."""
        if not self.has_changed(term) or argument == -1:
            return argument
        if isinstance(argument, int):
            return self.size(term)
        # Multiply first: the product is a multiple of the old size, so the division leaves no rest.
        if isinstance(argument, fx.Node):
            with self.graph.graph.inserting_after(argument):
                scaled = self.graph.graph.call_function(operator.mul, (argument, self.size(term)))
            with self.graph.graph.inserting_after(scaled):
                return self.graph.graph.call_function(operator.floordiv, (scaled, term.size))
        return argument

    def replace(self, node: fx.Node, op: str, arguments: tuple[Argument, ...]) -> None:
        """Make ``node`` another call."""
        _, name, overload = op.split(".")
        node.target = getattr(getattr(torch.ops.aten, name), overload)
        node.args, node.kwargs = arguments, {}

    def scale(self, node: fx.Node, factor: float) -> None:
        """Multiply the result of ``node`` by ``factor`` for all its users."""
        with self.graph.graph.inserting_after(node):
            scaled = self.graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
        scaled.meta[_SCALE] = factor
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    def index(self, before: fx.Node, positions: Sequence[int]) -> fx.Node:
        """A constant index of ``positions``, for use in ``before``."""
        with self.graph.graph.inserting_before(before):
            return _index_of(self.graph.graph, positions)

    def copy(self, before: fx.Node, source: fx.Node) -> fx.Node:
        """A contiguous copy of ``source``, for use in ``before``."""
        with self.graph.graph.inserting_before(before):
            return self.graph.graph.call_function(
                torch.ops.aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
            )

    def compute_epsilon(self, node: fx.Node) -> float:
        """The default epsilon of a norm: its type's epsilon, for float32 or wider."""
        dtype = self.original[node.name].meta["val"].dtype
        return torch.finfo(torch.promote_types(dtype, torch.float32)).eps

    # ---- constants ----

    def select_constants(self, node: fx.Node, original: fx.Node) -> None:
        """If the cut shortens the axes of a constant, index the constant at this use."""
        for path, dims in self.facts.constant_uses.get(original, []):
            for d, term in enumerate(dims):
                if self.cut.has_choice(term):
                    source = find_argument_at(node, path)
                    _put(node, path, self._select(node, source, d, term))

    def _select(self, before: fx.Node, source: fx.Node, dim: int, term: Term) -> fx.Node:
        index = self.index(before, self.cut.find_positions(resolve(term)).tolist())
        with self.graph.graph.inserting_before(before):
            return self.graph.graph.call_function(torch.ops.aten.index_select.default, (source, dim, index))


def scale_of(node: fx.Node) -> float | None:
    """The number that ``Resizer.scale`` multiplies by in ``node``; None for any other node."""
    factor: float | None = node.meta.get(_SCALE)
    return factor


def _index_of(graph: fx.Graph, positions: Sequence[int]) -> fx.Node:
    """A constant index as graph nodes: one range if the positions are contiguous, else a concatenation of ranges."""
    # Ranges and no constant tensor, which would be one more weight of the graph.
    ranges: list[list[int]] = []
    for position in positions:
        if ranges and position == ranges[-1][1]:
            ranges[-1][1] = position + 1
        else:
            ranges.append([position, position + 1])
    parts = [
        graph.call_function(torch.ops.aten.arange.start, (a, b), {"dtype": torch.int64, "device": torch.device("cpu")})
        for a, b in ranges
    ]
    return parts[0] if len(parts) == 1 else graph.call_function(torch.ops.aten.cat.default, (parts,))


def _put(node: fx.Node, path: ArgumentPath, new: fx.Node) -> None:
    """Replace the argument at a place, which may be in nested lists."""

    def put(value: Argument, steps: ArgumentPath) -> Argument:
        if not steps:
            return new
        assert isinstance(value, (list, tuple))
        return [put(v, steps[1:]) if i == steps[0] else v for i, v in enumerate(value)]

    if isinstance(path[0], str):
        node.update_kwarg(path[0], put(node.kwargs[path[0]], path[1:]))
    else:
        node.update_arg(path[0], put(node.args[path[0]], path[1:]))


# ---- common forms ----

Resize = Callable[[Resizer, fx.Node], None]


def shape_argument(name: str = "size") -> Resize:
    """The argument is the list of the result's sizes."""

    def resize(resizer: Resizer, node: fx.Node) -> None:
        sizes = get_argument(node, name)
        set_argument(node, name, [resizer.scale_argument(s, d) for s, d in zip(sizes, resizer.dims(node), strict=True)])

    return resize


def count_argument(name: str, less: int = 0) -> Resize:
    """The argument is the number of positions of the rule's ``Counted`` axis, minus a constant."""

    def resize(resizer: Resizer, node: fx.Node) -> None:
        counted = resizer.note(node, Counted)
        if counted is not None and resizer.has_changed(counted.term):
            set_argument(node, name, resizer.size(counted.term) - less)

    return resize
