"""vocabulary: the axes that count a model's tokens: the rows of what is looked up by token ids, and of the output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mptk.compat.torch import tree_leaves
from mptk.errors import AnalysisError
from mptk.ir import Analysis, Axis, list_axes, name_base_op, resolve
from passes.analysis.rules.context import ID_MOVES


@dataclass(frozen=True)
class Vocabulary:
    """Where a model's tokens are counted.

    Attributes:
        rows: how many there are.
        axes: the weights' axes.
        inputs: which of the program's inputs are token ids.
        predicted: whether the last dimension of the output is tokens, too.
    """

    rows: int
    axes: frozenset[Axis]
    inputs: tuple[bool, ...]
    predicted: bool


def find_vocabulary(analysis: Analysis, *, predicts: bool) -> Vocabulary:
    """The vocabulary of an analysed model. ``predicts``: its output is logits of tokens, if they are as many.

    Raises:
        MptkError: it looks up nothing by token ids, or tables of several sizes.
    """
    program, facts = analysis.program, analysis.facts
    inputs = [node for node in program.list_placeholders() if node.name in program.user_inputs]
    names = program.inputs or tuple(node.name for node in inputs)
    # The tables that token ids index. Several tables of one size (per-layer embeddings) are cut alike.
    looked_up: set[Axis] = set()
    for node, name in zip(inputs, names, strict=True):
        if name.endswith("input_ids"):
            looked_up.update(axis for table in find_tables(node) for axis in list_axes(resolve(facts.dims(table)[0])))
    sizes = sorted({axis.size for axis in looked_up})
    if len(sizes) != 1:
        found = " and ".join(map(str, sizes)) or "no"
        raise AnalysisError(
            f"the model looks up {found} rows by token ids, and one table is trimmed; leave out --vocabulary"
        )
    # The output's last dimension: a tied head has the table's axis; an untied one has its own, of the same size.
    axes, predicted = set(looked_up), False
    outputs = [n for n in tree_leaves(program.graph.graph.output_node().args[0]) if isinstance(n, fx.Node)]
    last = resolve(facts.dims(outputs[0])[-1])
    if isinstance(last, Axis) and (last in axes or (predicts and last.size == sizes[0])):
        axes, predicted = axes | {last}, True
    return Vocabulary(sizes[0], frozenset(axes), tuple(name.endswith("input_ids") for name in names), predicted)


def find_tables(node: fx.Node) -> set[fx.Node]:
    """The tables whose rows a value of integers picks, also through views."""
    found: set[fx.Node] = set()
    for user in node.users:
        if user.op != "call_function":
            continue
        op = name_base_op(user.target)
        if op == "embedding" and user.args[1] is node:
            assert isinstance(user.args[0], fx.Node)
            found.add(user.args[0])
        elif op in ID_MOVES:
            found |= find_tables(user)
    return found
