"""blocks: find residual blocks in the graph: modules of one list whose result is their input plus what they add.

No model is known by name. A list of modules is a stack of blocks if each of them

1. has one input and one result with the same axes;
2. adds to it: a path of calls leads from the input to the result through an addition and through no product with a
   weight. Several additions in a row (attention, then feed-forward) and norms behind them are such a path.

A block stays, with the reason, if more than its result is used elsewhere: a position bias that other blocks read, a
weight that they share, memory of others that it writes. It also stays if its result is not used: some classes read a
vision tower's last block but one. A KV cache that only it continues goes with it. If lists are nested, the outermost
one counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from mptk.ir import (
    Axis,
    AxisFacts,
    Block,
    Program,
    SourceLocation,
    Stack,
    find_reachable,
    list_module_paths,
    make_prefix,
    name_base_op,
    resolve,
    split_block_name,
)

_ADDITIONS = frozenset({"add", "add_"})
Lists = dict[str, dict[int, set[fx.Node]]]
"""Path of a list → number of each of its modules → the calls within."""


def find_stacks(program: Program, facts: AxisFacts) -> tuple[Stack, ...]:
    """The stacks of the program of which at least one block can be removed, in the graph's order."""
    lists = _find_module_lists(program.graph.graph)
    found: list[Stack] = []
    # Outer lists first, by the depth of their path. A list inside a stack that was found goes with its blocks.
    for module in sorted(lists, key=lambda path: path.count(".") if path else -1):
        if any(split_block_name(other.module, module) for other in found):
            continue
        blocks = _BlockSearch(program, facts, module, lists[module]).find_blocks()
        # The only block of a list cannot be removed.
        if len(blocks) > 1 and any(not block.stays for block in blocks):
            found.append(Stack(module, Axis(len(blocks)), tuple(blocks)))
    order = {node: i for i, node in enumerate(program.graph.graph.nodes)}
    return tuple(sorted(found, key=lambda stack: order[stack.blocks[0].output]))


def explain_no_stack(program: Program, facts: AxisFacts) -> str:
    """Why a program has no stack, in a few words about its list of modules with the most calls."""
    lists = _find_module_lists(program.graph.graph)
    if not lists:
        return "no list of modules"
    module = max(lists, key=lambda path: sum(map(len, lists[path].values())))
    blocks = _BlockSearch(program, facts, module, lists[module]).find_blocks()
    if len(lists[module]) == 1:
        return f"{module} has one block"
    if not blocks:
        return f"a module of {module} is not an input plus what it adds, of the same axes"
    return next(f"every block stays: {block.stays}" for block in blocks)


def _find_module_lists(graph: fx.Graph) -> Lists:
    """Every list of modules, numbered from 0 without a gap, with the calls of each module."""
    found: Lists = {}
    for node in graph.nodes:
        for path in list_module_paths(node) if node.op == "call_function" else ():
            parent, _, number = path.rpartition(".")
            if number.isdigit():
                found.setdefault(parent, {}).setdefault(int(number), set()).add(node)
    return {path: modules for path, modules in found.items() if sorted(modules) == list(range(len(modules)))}


@dataclass(frozen=True)
class _BlockSearch:
    """The search for the blocks of one list."""

    program: Program
    facts: AxisFacts
    module: str
    modules: Mapping[int, set[fx.Node]]

    def find_blocks(self) -> list[Block]:
        """The blocks in their order; none if one of the modules is not a residual block."""
        found: list[Block] = []
        for unit in sorted(self.modules):
            # A block's ends: a value that leaves it, and a value outside to which it adds on the way there.
            nodes = self.modules[unit]
            exits = [node for node in self.facts.graph.nodes if node in nodes and not nodes.issuperset(node.users)]
            ends = [(x, y) for y in reversed(exits) for x in self._find_residual_inputs(y, nodes)]
            if not ends:
                return []
            # Several pairs may fit. The block that continues the one before is meant; else the last value that leaves.
            before = found[-1].output if found else None
            x, y = next(((x, y) for x, y in ends if x is before), ends[0])
            caches = {i: o for i, o in self.facts.caches.items() if o in nodes}
            path = f"{make_prefix(self.module)}{unit}"
            # Why it stays: what else leaves it, and whether its result counts.
            others = [e for e in exits if e is not y]
            reason = next(self._find_reasons(unit, nodes, others, set(caches.values())), _explain_unread(y, nodes))
            found.append(Block(path, x, y, frozenset(nodes), caches, reason))
        return found

    def _find_residual_inputs(self, y: fx.Node, nodes: set[fx.Node]) -> list[fx.Node]:
        """The values outside ``nodes`` with the axes of ``y`` to which the block adds on the way to ``y``."""
        if not isinstance(self.facts.results.get(y), tuple):
            return []
        products = {product.node for product in self.facts.contractions}

        # Walk back from y. A state is a node and whether an addition was on the way. A sum of products ends the way.
        def list_sources(state: tuple[fx.Node, bool]) -> list[tuple[fx.Node, bool]]:
            node, added = state
            if node not in nodes or node in products:
                return []
            added = added or name_base_op(node.target) in _ADDITIONS
            return [(source, added) for source in node.all_input_nodes]

        ways = find_reachable([(y, False)], list_sources)
        return sorted(node for node, added in ways if added and node not in nodes and self._is_alike(node, y))

    def _is_alike(self, x: fx.Node, y: fx.Node) -> bool:
        """Whether two values have the same axes, sizes and type."""
        if not isinstance(self.facts.results.get(x), tuple):
            return False
        one, other = x.meta["val"], y.meta["val"]
        dims = [tuple(map(resolve, self.facts.dims(value))) for value in (x, y)]
        return dims[0] == dims[1] and one.shape == other.shape and one.dtype == other.dtype

    def _find_reasons(
        self, unit: int, nodes: set[fx.Node], exits: Sequence[fx.Node], caches: set[fx.Node]
    ) -> Iterator[str]:
        """Why a block cannot be removed."""
        # Other values of it that are used outside, except its cache as an output of the graph.
        for node in exits:
            users = [user for user in node.users if user not in nodes and not (node in caches and user.op == "output")]
            if users and self._is_made_within(node, nodes):
                yield f"{_place(users[0])} uses {SourceLocation(node)}"
        # Memory that it changes for others. Views that are made later follow the result, so they need no check.
        for call, changed in self.facts.writes.items():
            before = (v for v in changed if v not in nodes and v < call)
            if call in nodes and (other := next(before, None)) is not None:
                yield f"{SourceLocation(call)} writes into {other.name}, which is not its own"
        # Weights of it that others use, under its name or under one of their own.
        for node in self.program.list_placeholders():
            name = self.program.weights.get(node.name)
            if name is not None and self._is_in_unit(name, unit) and not nodes.issuperset(node.users):
                yield f"{_place(next(user for user in node.users if user not in nodes))} uses its {name}"
        for alias, name in self.program.aliases.items():
            if self._is_in_unit(name, unit) and not self._is_in_unit(alias, unit):
                yield f"{alias} is the same weight as its {name}"

    def _is_made_within(self, node: fx.Node, nodes: set[fx.Node]) -> bool:
        """Whether a value depends on weights or activations in the block. If not, it is there without the block."""
        within = find_reachable([node], lambda source: nodes.intersection(source.all_input_nodes))
        return not within.isdisjoint(self.facts.results)

    def _is_in_unit(self, name: str, unit: int) -> bool:
        at = split_block_name(self.module, name)
        return at is not None and at[0] == unit


def _explain_unread(result: fx.Node, nodes: set[fx.Node]) -> str:
    """The reason to keep a block whose result is multiplied by 0: the class takes a layer from the list's end."""
    # The task of images and text adds 0.0 · features.sum() to the logits, so that the trace has these blocks at all.
    sums = [user for user in result.users if user not in nodes]
    factors = [user for node in sums if name_base_op(node.target) == "sum" for user in node.users]
    zero = factors and all(name_base_op(user.target) == "mul" and 0.0 in user.args for user in factors)
    return "the model leaves its result out" if zero and len(factors) == len(sums) else ""


def _place(node: fx.Node) -> str:
    """The module that a call is in, for people."""
    paths = list_module_paths(node)
    return paths[-1] if paths else "the model's output"


def name_stacks(stacks: Sequence[Stack]) -> list[str]:
    """A name for each: ``layers``; if there are several, with the part of its path that tells it from the others."""
    if len(stacks) == 1:
        return ["layers"]
    # The first part of the paths in which all differ: encoder.layers and decoder.layers → encoder, decoder.
    parts = [stack.module.split(".") for stack in stacks]
    for place in range(min(map(len, parts), default=0)):
        words = [path[place] for path in parts]
        if len(set(words)) == len(words):
            return [f"layers.{word}" if word.isdigit() else f"{word.removesuffix('s')}_layers" for word in words]
    return [f"layers.{i}" for i in range(1, len(stacks) + 1)]
