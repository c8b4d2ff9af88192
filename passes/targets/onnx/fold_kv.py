"""fold_kv: move the KV cache of an ONNX decoder into the Attention operator.

An exported decoder concatenates each layer's past and new keys and values, repeats them for every query head that
shares them, and attends. ONNX ``Attention`` (opset 23) takes the past as inputs, returns the present as outputs, and
supports grouped heads, so nothing is repeated in memory. For every Attention node:

1. If K and V are ``repeat(Concat(past, new))`` (the repeat is optional) and ``past`` is a graph input, the node takes
   ``new`` and ``past``. Its present outputs replace the concatenations, also as the graph's outputs. A slice as ``new``
   may be empty, which ONNX Runtime's Attention refuses: then the concatenations stay.
2. If then query, new key and new value are ``Transpose(Reshape(x))``, with or without rotary embedding, and the result
   goes through ``Reshape(Transpose(y))``, the transposes and reshapes are dropped. Attention and rotary embedding then
   work on the projections' own layout [batch, sequence, heads × dim].

A node of another form does not change. All operators are standard ones, so padding may be on either side.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import onnx_ir as ir

HEADS_TO_FRONT = (0, 2, 1, 3)


class FoldKVPass(ir.passes.InPlacePass):
    """Move the KV cache into the Attention operator, and its heads into the layout of the projections.

    Uses the shapes of the values around each Attention node; leaves unused nodes behind.
    """

    def requires(self, model: ir.Model) -> None:
        """Opset 23 or later: its Attention takes a past."""
        opset = model.opset_imports.get("", 0)
        if opset < 23:
            raise ir.passes.PreconditionError(f"opset {opset} has no Attention")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified, earlier = False, set[ir.Node]()
        for node in list(model.graph):
            earlier.add(node)
            if node.op_type == "Attention" and node.domain == "":
                folded = _fold_past(model.graph, node, earlier)
                flattened = _fold_layout(model.graph, folded)
                modified |= folded is not node or flattened
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class _Cached:
    """A key or value operand: ``repeat(present)``, with ``present = Concat(past, new)``."""

    past: ir.Value
    new: ir.Value
    present: ir.Value


def _fold_past(graph: ir.Graph, node: ir.Node, earlier: Set[ir.Node]) -> ir.Node:
    """Case 1. Returns the new Attention node, or ``node`` itself if it does not have the form.

    A node in ``earlier`` that reads the present (to make a mask from the values, say) keeps the concatenation.
    """
    query, key, value, mask = (*node.inputs, None)[:4]
    has_past = len(node.inputs) > 4 and node.inputs[4] is not None
    is_causal = node.attributes.get_int("is_causal", 0)
    if has_past or is_causal or len(node.outputs[0].shape or ()) != 4:
        return node
    keys, values = _match_cached(key), _match_cached(value)
    if keys is None or values is None or _read_dimension(keys.new, 1) != _read_dimension(values.new, 1):
        return node
    folded = ir.node(
        "Attention",
        inputs=[query, keys.new, values.new, mask, keys.past, values.past],
        attributes=node.attributes,
        num_outputs=3,
        name=node.name,
    )
    graph.insert_before(node, folded)
    for old, new in zip((node.outputs[0], keys.present, values.present), folded.outputs, strict=True):
        _replace_uses(graph, old, new, earlier)
    graph.remove(node, safe=True)
    return folded


def _match_cached(operand: ir.Value | None) -> _Cached | None:
    if operand is None:
        return None
    present = _undo_repeat(operand)
    concat = find_producer(present, "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.attributes.get_int("axis", None) not in (2, -2):
        return None
    past, new = concat.inputs
    if past is None or new is None or not past.is_graph_input() or find_producer(new, "Slice") is not None:
        return None
    return _Cached(past, new, present)


def _undo_repeat(value: ir.Value) -> ir.Value:
    """``x`` if ``value`` is ``Reshape(Expand(Unsqueeze(x, 2)))``: each head of x repeated in place. Else ``value``."""
    reshape = find_producer(value, "Reshape")
    expand = reshape and find_producer(reshape.inputs[0], "Expand")
    unsqueeze = expand and find_producer(expand.inputs[0], "Unsqueeze")
    if reshape is None or expand is None or unsqueeze is None:
        return value
    source, axes = unsqueeze.inputs[:2]
    expanded = expand.outputs[0].shape
    if source is None or axes is None or axes.const_value is None or expanded is None or len(expanded) != 5:
        return value
    batch, heads, repeat, tokens, size = expanded
    is_repeat = (
        axes.const_value.numpy().tolist() == [2]
        and source.shape == ir.Shape([batch, heads, tokens, size])
        and isinstance(heads, int)
        and isinstance(repeat, int)
        and value.shape == ir.Shape([batch, heads * repeat, tokens, size])
    )
    return source if is_repeat else value


def _fold_layout(graph: ir.Graph, node: ir.Node) -> bool:
    """Case 2. Returns whether the node had the form."""
    if len(node.inputs) < 6:
        return False
    operands = [_match_flat(operand) for operand in node.inputs[:3]]
    merged = _match_merged(node.outputs[0])
    query_heads, key_heads = _read_dimension(node.inputs[0], 1), _read_dimension(node.inputs[1], 1)
    if any(flat is None for flat in operands) or merged is None or query_heads is None or key_heads is None:
        return False
    attributes = [ir.AttrInt64("q_num_heads", query_heads), ir.AttrInt64("kv_num_heads", key_heads)]
    inputs = [flat.build(graph, node) for flat in operands if flat is not None]
    folded = ir.node(
        "Attention",
        inputs=[*inputs, *node.inputs[3:]],
        attributes={**node.attributes, **{attribute.name: attribute for attribute in attributes}},
        num_outputs=3,
        name=node.name,
    )
    graph.insert_before(node, folded)
    folded.outputs[0].shape, folded.outputs[0].type = merged.shape, merged.type
    _replace_uses(graph, merged, folded.outputs[0])
    for old, new in zip(node.outputs[1:], folded.outputs[1:], strict=True):
        _replace_uses(graph, old, new)
    return True


@dataclass(frozen=True)
class _Flat:
    """A 4-D operand made from ``flat`` [batch, sequence, heads × dim], through ``rotary`` or directly."""

    flat: ir.Value
    rotary: ir.Node | None

    def build(self, graph: ir.Graph, before: ir.Node) -> ir.Value:
        if self.rotary is None:
            return self.flat
        node = ir.node(
            "RotaryEmbedding",
            inputs=[self.flat, *self.rotary.inputs[1:]],
            attributes=self.rotary.attributes,
            name=self.rotary.name,
        )
        graph.insert_before(before, node)
        node.outputs[0].shape, node.outputs[0].type = self.flat.shape, self.flat.type
        return node.outputs[0]


def _match_flat(operand: ir.Value | None) -> _Flat | None:
    rotary = find_producer(operand, "RotaryEmbedding")
    if rotary is not None and rotary.attributes.get_int("num_heads", None) != _read_dimension(operand, 1):
        return None
    transpose = find_producer(rotary.inputs[0] if rotary is not None else operand, "Transpose")
    reshape = transpose and find_producer(transpose.inputs[0], "Reshape")
    if transpose is None or reshape is None or _read_permutation(transpose) != HEADS_TO_FRONT:
        return None
    flat, split = reshape.inputs[0], reshape.outputs[0]
    return _Flat(flat, rotary) if flat is not None and _is_merge(flat, split) else None


def _match_merged(value: ir.Value) -> ir.Value | None:
    """The only use of ``value`` [batch, heads, sequence, dim], if it is ``Reshape(Transpose(value))``, heads merged."""
    transpose = _find_only_user(value, "Transpose")
    reshape = transpose and _find_only_user(transpose.outputs[0], "Reshape")
    if transpose is None or reshape is None or _read_permutation(transpose) != HEADS_TO_FRONT:
        return None
    return reshape.outputs[0] if _is_merge(reshape.outputs[0], transpose.outputs[0]) else None


def _is_merge(flat: ir.Value, split: ir.Value) -> bool:
    """Whether shapes are [batch, sequence, heads × dim] and [batch, sequence, heads, dim]."""
    if flat.shape is None or split.shape is None or len(flat.shape) != 3 or len(split.shape) != 4:
        return False
    batch, sequence, heads, size = split.shape
    return isinstance(heads, int) and isinstance(size, int) and flat.shape == ir.Shape([batch, sequence, heads * size])


def _replace_uses(graph: ir.Graph, old: ir.Value, new: ir.Value, earlier: Set[ir.Node] = frozenset()) -> None:
    """Use ``new`` instead of ``old`` everywhere except in ``earlier``, and as the graph's output if ``old`` was one."""
    new.shape, new.type = new.shape or old.shape, new.type or old.type
    for user, index in tuple(old.uses()):
        if user not in earlier:
            user.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
            new.name, old.name = old.name, f"{old.name}_earlier"


def find_producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes ``value``, if it is of this standard operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def _find_only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = [user for user, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type and not value.is_graph_output() else None


def _read_permutation(transpose: ir.Node) -> tuple[int, ...]:
    return tuple(transpose.attributes.get_ints("perm", ()))


def _read_dimension(value: ir.Value | None, dimension: int) -> int | None:
    size = value.shape[dimension] if value is not None and value.shape is not None else None
    return size if isinstance(size, int) else None
