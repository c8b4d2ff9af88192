"""remove_blocks: remove whole residual blocks from a graph, or mask them.

In the cut program (``RemoveBlocks``) a block's input takes the place of its result; its calls, its weights and its KV
cache are gone, and the blocks that stay are counted anew in the names of the weights. In the masked one
(``mask_blocks``) its contribution is multiplied by 0:

    y' = x + 0 · (y − x)

Cases of the removal:

1. several blocks in a row: each takes the input of the first;
2. calls in a block that others need although they depend on nothing of it (a number of tokens): they stay;
3. a number of tokens that is read from a cache that is gone: it is read from a cache that stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, fx
from torch.export.graph_signature import ExportGraphSignature, TensorArgument

from mptk.errors import TargetError
from mptk.ir import (
    Analysis,
    Block,
    Cut,
    Pass,
    PassResult,
    Program,
    Renumbering,
    build_renumbering,
    find_reachable,
    list_removed_blocks,
    make_prefix,
    name_base_op,
)
from passes.analysis.rules.resizer import scale_of


def mask_blocks(graph: fx.Graph, blocks: Sequence[Block]) -> None:
    """Multiply by 0 what each of ``blocks`` adds to its input. ``graph``: a copy of theirs, with their names."""
    nodes = {node.name: node for node in graph.nodes}
    masked: dict[str, fx.Node] = {}
    for block in blocks:
        # A block behind a masked one adds to the masked result.
        x, y = (nodes[value.name] for value in (block.input, block.output))
        x = masked.get(x.name, x)
        with graph.inserting_after(y):
            added = graph.call_function(torch.ops.aten.sub.Tensor, (y, x))
        with graph.inserting_after(added):
            nothing = graph.call_function(torch.ops.aten.mul.Tensor, (added, 0.0))
        with graph.inserting_after(nothing):
            result = graph.call_function(torch.ops.aten.add.Tensor, (x, nothing))
        for node in (added, nothing, result):
            node.meta["val"] = y.meta["val"]
        # The block's own later calls keep its result: they may write into it, and would else write into the masked one.
        own = {added.name, *(node.name for node in block.nodes)}
        y.replace_all_uses_with(result, delete_user_cb=lambda user, own=own: user.name not in own)
        masked[y.name] = result


@dataclass(frozen=True)
class RemoveBlocks(Pass):
    """Remove the blocks that a plan does not keep, with their weights and caches."""

    analysis: Analysis
    cut: Cut
    name: ClassVar[str] = "remove blocks"

    def requires(self, program: Program) -> None:
        """Every value that enters or leaves a block is in the program."""
        names = {node.name for node in program.graph.graph.nodes}
        ends = {value.name for block in self._blocks for value in (block.input, block.output)}
        assert ends <= names, f"{min(ends - names)} is not in the program"

    def run(self, program: Program) -> PassResult:
        blocks = self._blocks
        if not blocks:
            return PassResult(program, False)
        names = build_renumbering(self.analysis, self.cut)
        removal = _Removal(program.copy_graph(), blocks)
        removal.run(_list_weights(program, blocks))
        result = replace(
            program,
            graph=removal.module,
            signature=_keep_signature(program.signature, removal.graph, names),
            state=program.state.select_names(names.map_names(program.state)),
            aliases=_rename_aliases(program.aliases, names),
        )
        return PassResult(result, True, (f"{len(blocks)} blocks removed",))

    def ensures(self, before: Program, after: Program) -> None:
        """The graph has exactly the inputs that are left, and every weight among them is there."""
        left = {node.name for node in after.list_placeholders()}
        assert left == {spec.arg.name for spec in after.signature.input_specs}, "an input is missing in the graph"
        assert set(after.weights.values()) <= set(after.state), "a weight is missing"

    @property
    def _blocks(self) -> list[Block]:
        return list_removed_blocks(self.analysis, self.cut)


class _Removal:
    """Edits ``module``, a copy of the graph. ``gone``: the names of the caches that are removed."""

    def __init__(self, module: fx.GraphModule, blocks: Sequence[Block]) -> None:
        self.module, self.graph, self.blocks = module, module.graph, blocks
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.within = {node.name for block in blocks for node in block.nodes}
        self.gone = {cache.name for block in blocks for cache in block.caches}
        # What must stay: the output, and calls outside of the blocks that have an effect or that nothing reads anyway.
        self.roots = [n for n in self.graph.nodes if n.name not in self.within and (not n.users or n.is_impure())]
        self.values: dict[str, fx.Node] = {}
        """The name of a removed block's result → what takes its place."""

    def run(self, weights: Iterable[str]) -> None:
        self._drop_outputs()
        # In order, so that a block behind a removed one takes what took its place (case 1).
        for block in self.blocks:
            before, instead = self._find_value(block.output), self._find_value(block.input)
            before.replace_all_uses_with(instead, delete_user_cb=lambda user: user.name not in self.within)
            self.values[block.output.name] = instead
        self._read_elsewhere()
        self._erase()
        # Placeholders last: erasing is only allowed without users.
        for name in self.gone | set(weights):
            self.graph.erase_node(self.nodes[name])
        self.graph.lint()
        self.module.recompile()

    def _find_value(self, value: fx.Node) -> fx.Node:
        """The value in this graph. The pass before may have multiplied it for all its users."""
        node: fx.Node = self.values.get(value.name, self.nodes[value.name])
        return next((user for user in node.users if scale_of(user) is not None), node)

    def _drop_outputs(self) -> None:
        output = self.graph.output_node()
        results = {value.name for block in self.blocks for value in block.caches.values()}
        output.args = (tuple(v for v in cast("Sequence[fx.Node]", output.args[0]) if v.name not in results),)

    def _read_elsewhere(self) -> None:
        """Read the sizes that calls outside take from a removed cache from an input that stays (case 3)."""
        others = [n for n in self.graph.nodes if n.op == "placeholder" and n.name not in self.gone]
        for name in self.gone:
            for user in [u for u in self.nodes[name].users if u.name not in self.within]:
                # Two dimensions of the same symbolic size are equal in each call.
                taken = str(user.meta["val"]) if name_base_op(user.target) == "sym_size" else None
                sizes = ((n, d) for n in others for d, size in enumerate(_shape(n)) if str(size) == taken)
                if (holder := next(sizes, None)) is None:
                    raise TargetError(
                        f"{user.name} reads {name}, the cache of a block; keep that block, or write no ONNX",
                        name=user.name,
                    )
                user.args = holder

    def _erase(self) -> None:
        """Erase the calls that nothing needs any more; calls of a block that others need stay (case 2)."""
        needed = find_reachable(self.roots, lambda node: node.all_input_nodes)
        for node in reversed(list(self.graph.nodes)):
            if node not in needed and node.op != "placeholder":
                self.graph.erase_node(node)


def _shape(node: fx.Node) -> Sequence[object]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _list_weights(program: Program, blocks: Sequence[Block]) -> list[str]:
    """The placeholders of the weights of ``blocks``."""
    # By name and not by use: a weight of a block that nothing reads must go, too. The prefix ends in a dot.
    starts = tuple(make_prefix(block.module) for block in blocks)
    targets = ((s.arg.name, s.target) for s in program.signature.input_specs if s.target is not None)
    return [name for name, target in targets if target.startswith(starts)]


def _keep_signature(signature: ExportGraphSignature, graph: fx.Graph, names: Renumbering) -> ExportGraphSignature:
    """The signature of what is left: its inputs, their weights' new names, and its results."""
    left = {node.name for node in graph.nodes if node.op == "placeholder"}
    inputs = [spec for spec in signature.input_specs if spec.arg.name in left]
    results = cast("Sequence[fx.Node]", graph.output_node().args[0])
    like = signature.output_specs[0]
    return replace(
        signature,
        input_specs=[s if s.target is None else replace(s, target=names.find_new(s.target)) for s in inputs],
        output_specs=[replace(like, arg=TensorArgument(name=result.name)) for result in results],
    )


def _rename_aliases(aliases: Mapping[str, str], names: Renumbering) -> dict[str, str]:
    pairs = {names.find_new(alias): names.find_new(owner) for alias, owner in aliases.items()}
    return {alias: owner for alias, owner in pairs.items() if alias is not None and owner is not None}
