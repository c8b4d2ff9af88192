"""partition: cut a program's graph into stages where few bytes are live, without knowledge of architectures.

In a transformer these places are the residual stream between blocks. A value that depends only on weights and constants
is made again in each stage that uses it, so it never crosses a border.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor, fx

from mptk.compat.torch import find_schema, find_size_hint, tree_leaves
from mptk.ir import Program, find_reachable, find_storage

Wanted = Sequence[tuple[fx.Node, ...]]
"""Values that are read together, each group as soon as its last value is there."""


@dataclass(frozen=True)
class Stage:
    """A part of a graph.

    ``nodes``: its calls in order. ``weights``: the placeholders that they read, by name. ``inputs``: values of earlier
    stages that are used here or later. ``outputs``: values that are used later. ``dead``: call → values that are not
    used after it.
    """

    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    dead: Mapping[fx.Node, tuple[fx.Node, ...]]


class _Bound:
    """Calls of a graph that share a state: writes into a tensor through its views, and levels of ``torch.vmap``.

    The graph does not show these as arguments, so a stage must hold them all, or none.
    """

    def __init__(self, graph: fx.Graph) -> None:
        schemas = ((node, find_schema(node.target)) for node in graph.nodes)
        self.writes = {node: find_storage(node) for node, said in schemas if said is not None and said.is_mutable}
        self.levels = find_vmap_levels(graph)
        self.stateful = {*self.writes.values(), *(node for level in self.levels for node in level)}

    def find_needed(self, wanted: Iterable[fx.Node]) -> set[fx.Node]:
        """``wanted``, what they are made of, and what writes into that."""
        found = _find_ancestors(wanted)
        # A write has ancestors of its own, which may be written to again: until nothing is added.
        while True:
            more = {write for write, held in self.writes.items() if held in found}
            more |= {node for level in self.levels if not found.isdisjoint(level) for node in level}
            if more <= found:
                return found
            found |= _find_ancestors(more)

    def find_uncut_spans(self, made: Mapping[fx.Node, int]) -> list[tuple[int, int]]:
        """Positions (first, end) of calls after which there can be no border."""
        # From the tensor that is written to (or the level's opening) to the write (or its closing).
        groups = [(held, write) for write, held in self.writes.items() if write in made]
        groups += [(level[0], level[-1]) for level in self.levels if level[-1] in made]
        return [(max(made.get(first, 0), 0), made[last]) for first, last in groups]


class Flow:
    """The calls that the wanted values of a program need, in order, and how long each value is live.

    ``wanted``: none if it is the program's result, which is live to the end.
    """

    def __init__(self, program: Program, wanted: Wanted = ()) -> None:
        self.program, self._weights = program, program.weights
        graph = program.graph.graph
        # What is needed: the program's result, or only what the wanted values are made of.
        result = tuple(graph.output_node().all_input_nodes)
        bound = _Bound(graph)
        needed = bound.find_needed(node for group in wanted or [result] for node in group)
        self.made: dict[fx.Node, int] = {}
        """Value that depends on an input → the position of its call in ``calls``; −1 for the inputs themselves."""
        self.calls: list[fx.Node] = []
        self.fixed: list[fx.Node] = []
        """Calls that depend on no input: each stage makes again what it uses of them."""
        for node in graph.nodes:
            if node not in needed or node.name in self._weights:
                continue
            if node.op == "placeholder":
                self.made[node] = -1
            # Calls with a state are never fixed: made again, they would lack what was written.
            elif node in bound.stateful or any(source in self.made for source in node.all_input_nodes):
                self.made[node] = len(self.calls)
                self.calls.append(node)
            else:
                self.fixed.append(node)
        self.result = () if wanted else result
        self.last = self._find_last_uses(wanted)
        self.uncut = bound.find_uncut_spans(self.made)

    def _find_last_uses(self, wanted: Wanted) -> dict[fx.Node, int]:
        """Value → the position of the last call that uses it."""
        last = {value: max((self.made.get(user, -1) for user in value.users), default=-1) for value in self.made}
        # The values of a group are read together, when the last of them is there.
        for group in wanted:
            there = max(self.made[value] for value in group)
            last.update((value, max(last[value], there)) for value in group)
        last.update((value, len(self.calls)) for value in self.result if value in self.made)
        return last

    def count_live_bytes(self) -> list[float]:
        """Bytes that are live after each call, in the sizes of the trace; infinite if no border may be there."""
        # A value adds its bytes where it is made and takes them away after its last use; the running sum is what lives.
        change: list[float] = [0] * (len(self.calls) + 1)
        for value, made in self.made.items():
            size = _count_bytes(value)
            change[max(made, 0)] += size
            change[min(self.last[value], len(self.calls))] -= size
        live_bytes = list(accumulate(change[:-1]))
        for start, end in self.uncut:
            live_bytes[start:end] = [math.inf] * (end - start)
        return live_bytes

    @cached_property
    def own_weights(self) -> list[list[fx.Node]]:
        """The weights that each call reads, also through fixed calls."""
        return [[n for n in self._find_fixed_sources([call]) if n.op == "placeholder"] for call in self.calls]

    @cached_property
    def weight_bytes(self) -> dict[fx.Node, int]:
        """Bytes of each weight that is read."""
        likes = self.program.state.likes
        return {n: likes[self._weights[n.name]].nbytes for own in self.own_weights for n in own}

    def _find_fixed_sources(self, calls: Iterable[fx.Node]) -> set[fx.Node]:
        """Weights and fixed calls behind the arguments of calls."""
        return _find_ancestors(s for call in calls for s in call.all_input_nodes if s not in self.made)

    def stage(self, start: int, end: int) -> Stage:
        """The stage of calls ``start`` to ``end`` − 1."""
        own = self.calls[start:end]
        is_last = end == len(self.calls)
        # The weights and fixed calls behind its calls. A result may depend on no input: then it is the last stage's.
        sources = self._find_fixed_sources(own)
        if is_last:
            sources |= _find_ancestors(value for value in self.result if value not in self.made)
        fixed = [node for node in self.fixed if node in sources]
        nodes = [*fixed, *own]
        # When each value can go: a fixed one after its last use in this stage, any other after its last use at all.
        last_here = {source: node for node in nodes for source in node.all_input_nodes}
        dead: dict[fx.Node, list[fx.Node]] = {}
        for value in fixed:
            if value not in self.result and value in last_here:
                dead.setdefault(last_here[value], []).append(value)
        for value, last in self.last.items():
            if start <= (place := max(last, self.made[value])) < end:
                dead.setdefault(self.calls[place], []).append(value)
        return Stage(
            nodes=tuple(nodes),
            weights=tuple(sorted((n for n in sources if n.op == "placeholder"), key=lambda node: node.name)),
            inputs=tuple(v for v, made in self.made.items() if made < start and (self.last[v] >= start or not start)),
            outputs=tuple(v for v, made in self.made.items() if made < end and self.last[v] >= end),
            dead={node: tuple(values) for node, values in dead.items()},
        )


@dataclass(frozen=True)
class Partition:
    """The last calls, by name, of all stages but the last. Programs that were made from one program share them."""

    ends: tuple[str, ...]

    def has_calls(self, flow: Flow) -> bool:
        """Whether the graph has these calls."""
        return set(self.ends) <= {node.name for node in flow.calls}

    def list_stages(self, flow: Flow) -> list[Stage]:
        """The stages of a flow. A call that the partitioned graph does not have belongs to the stage around it."""
        # Another program may have the calls in another order: a border never lies before the one before it.
        place = {node.name: i + 1 for i, node in enumerate(flow.calls)}
        borders = [0, *accumulate((place[name] for name in self.ends), max), len(flow.calls)]
        return [flow.stage(start, end) for start, end in pairwise(borders)]


def partition(flow: Flow, limit: float) -> Partition:
    """Stages whose weights take at most ``limit`` bytes, unless one call needs more.

    Of all such divisions it is the one with the least live bytes at all borders together.
    """
    if sum(flow.weight_bytes.values()) <= limit:
        return Partition(())  # the search takes time with the square of the number of calls
    # Dynamic programming: ``best[end]`` is the least cost of stages up to call ``end``, and where the last one starts.
    count, live_bytes = len(flow.calls), flow.count_live_bytes()
    best: list[tuple[float, int]] = [(0.0, 0)] + [(math.inf, 0)] * count
    for start in range(count):
        if best[start][0] < math.inf:
            for end in _list_ends(flow, start, limit, live_bytes):
                cost = best[start][0] + (live_bytes[end - 1] if end < count else 0.0)
                if cost < best[end][0]:
                    best[end] = (cost, start)
    # From the end back to the first stage. The end itself is not a border.
    ends: list[str] = []
    at = count
    while at and (at := best[at][1]):
        ends.append(flow.calls[at - 1].name)
    return Partition(tuple(reversed(ends)))


def partition_blocks(flow: Flow, inner: Iterable[fx.Node]) -> Partition:
    """A stage for each of the calls ``inner``, which ends where the fewest bytes are live before the next of them.

    What follows the last of them (a final norm, the head) is a stage of its own.
    """
    places, live_bytes = sorted({flow.made[node] for node in inner}), flow.count_live_bytes()
    ends = [min(range(first, second), key=live_bytes.__getitem__) for first, second in pairwise(places)]
    ends = [end for end in ends if live_bytes[end] < math.inf]
    # Nothing follows to bound the last block: it ends where, for the first time, no more is live than at other borders.
    most = max((live_bytes[end] for end in ends), default=math.inf)
    after = range(places[-1], len(flow.calls)) if places else ()
    ends += [end for end in after if live_bytes[end] < math.inf and live_bytes[end] <= most][:1]
    return Partition(tuple(flow.calls[end].name for end in ends))


def _list_ends(flow: Flow, start: int, limit: float, live_bytes: Sequence[float]) -> Iterator[int]:
    """Where a stage from call ``start`` may end: the number of calls before it ends."""
    seen: set[fx.Node] = set()
    size, found = 0, False
    for end in range(start, len(flow.calls)):
        new = [weight for weight in flow.own_weights[end] if weight not in seen]
        seen.update(new)
        size += sum(map(flow.weight_bytes.__getitem__, new))
        # A stage has at least one possible end, also if one call alone needs more than ``limit``.
        if size > limit and found:
            return
        if live_bytes[end] < math.inf or end + 1 == len(flow.calls):
            found = True
            yield end + 1


def find_vmap_levels(graph: fx.Graph) -> list[list[fx.Node]]:
    """The calls between the opening and the closing of each outer level of ``torch.vmap``."""
    levels: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", ""))
        if name.endswith("increment_nesting"):
            if not depth:
                levels.append([])
            depth += 1
        if depth:
            levels[-1].append(node)
        depth -= name.endswith("decrement_nesting")  # after it was added: the closing belongs to the level
    return levels


def _find_ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return find_reachable(nodes, lambda node: node.all_input_nodes)


def _count_bytes(node: fx.Node) -> int:
    """Bytes of a value in the sizes of the trace."""
    return sum(
        _count_elements(t) * t.element_size() for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)
    )


def _count_elements(tensor: Tensor) -> int:
    # ``numel`` of symbolic sizes would be symbolic, and comparing it would add a guard to the graph.
    count = 1
    for size in tensor.shape:
        count *= (find_size_hint(size) or 1) if isinstance(size, torch.SymInt) else size
    return count
