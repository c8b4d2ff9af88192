"""attention: give the ONNX Attention operator what an exported decoder computes around it.

``FoldKVPass`` moves the KV cache and the layout of heads into the operator. ``GroupQueriesPass`` then makes masks and
grouped queries fast in ONNX Runtime. A node of another form does not change, and all operators are standard ones.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes.targets.onnx.tensors import change_tensor

HEADS_TO_FRONT = (0, 2, 1, 3)
"""The permutation between [batch, sequence, heads, dim] and [batch, heads, sequence, dim], in either direction."""


class FoldKVPass(ir.passes.InPlacePass):
    """Move the KV cache into the Attention operator, and its heads into the layout of the projections.

    An exported decoder concatenates each layer's past and new keys and values, repeats them for every query head that
    shares them, and attends. ONNX ``Attention`` (opset 23) takes the past as inputs, returns the present as outputs,
    and supports grouped heads, so nothing is repeated in memory. For every Attention node:

    1. If K and V are ``repeat(Concat(past, new))`` (the repeat is optional) and ``past`` is a graph input, the node
       takes ``new`` and ``past``. Its present outputs replace the concatenations, also as the graph's outputs.
    2. If then query, new key and new value are ``Transpose(Reshape(x))``, with or without rotary embedding, and the
       result goes through ``Reshape(Transpose(y))``, the transposes and reshapes are dropped. Attention and rotary
       embedding then work on the projections' own layout [batch, sequence, heads × dim].

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

    A node in ``earlier`` that reads the present (to make a mask from the values, say) keeps the concatenation, since it
    comes before the new node.
    """
    query, key, value, mask = (*node.inputs, None)[:4]
    # A traced decoder has an explicit mask, no past yet, and heads in an axis of their own. Any other form is left.
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
        num_outputs=3,  # the result, the present keys and the present values
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
    # A slice as ``new`` may be empty (an encoder's positions, after the first step). ONNX Runtime's Attention refuses
    # that, so the concatenation stays.
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
    # The same operators may also broadcast something else: only the shapes tell.
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
    if len(node.inputs) < 6:  # case 1 did not apply
        return False
    operands = [_match_flat(operand) for operand in node.inputs[:3]]
    merged = _match_merged(node.outputs[0])
    query_heads, key_heads = _read_dimension(node.inputs[0], 1), _read_dimension(node.inputs[1], 1)
    if any(flat is None for flat in operands) or merged is None or query_heads is None or key_heads is None:
        return False
    # With three axes the operator cannot read the number of heads from a shape.
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
        """The operand in three axes. A rotary embedding is made again on the flat value."""
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
    # Without its number of heads a rotary embedding could not work on three axes.
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
            # The output's name is part of the interface: the new value takes it.
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


LOWEST = np.array(np.finfo(np.float32).min)
"""Of a masked position. −inf would make NaN of a padded token's row, in which everything may be masked."""
MaskSource = tuple[ir.Value, int, bool]
"""The source of a new mask: the old mask, the number of repeats of its rows, and ``_Heads.flat``."""


@dataclass(frozen=True)
class GroupQueriesPass(ir.passes.InPlacePass):
    """Convert Attention's mask to floats once, and fold grouped queries into the row axis.

    ONNX Runtime multiplies each query head by its keys separately, so it reads the keys again for every head of the
    group. It also converts a bool mask to floats in every layer. Instead:

    1. A bool mask becomes 0 and ``LOWEST``, once for all layers.
    2. The queries of a group become rows of one head. The mask's rows are repeated to match, once for all layers.
       [batch, heads, sequence, dim] → [batch, KV heads, repeat × sequence, dim] is only a change of shape.
       [batch, sequence, heads × dim] → [batch, sequence × repeat, KV heads × dim] is one if heads are in the order
       (repeat, KV head), so the columns of the query projection and the rows of the output projection are reordered.

    Step 2 makes decode faster and prefill slower: ONNX Runtime splits heads among threads, and fewer heads are left (3
    instead of 9, ``docs/onnx.md``). So it is optional (``rows``).

    Uses the shapes of the values around each Attention node. Leaves unused nodes behind.
    """

    rows: bool = True

    def requires(self, model: ir.Model) -> None:
        """No unused nodes, since each would count as a use."""
        used = {value for node in model.graph for value in node.inputs} | set(model.graph.outputs)
        unused = [node.name for node in model.graph if used.isdisjoint(node.outputs)]
        if unused:
            raise ir.passes.PreconditionError(f"{unused[0]} is used by nothing")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        made: dict[MaskSource, ir.Value] = {}
        for node in [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]:
            mask = node.inputs[3] if len(node.inputs) > 3 else None
            if mask is not None and mask.dtype in (ir.DataType.BOOL, ir.DataType.FLOAT):
                # Step 2 comes first, since it decides how the mask's rows are repeated.
                heads = _read_heads(node, mask) if self.rows else None
                grouped = heads is not None and _to_rows(model.graph, node, heads)
                key = (mask, heads.repeat, heads.flat) if heads is not None and grouped else (mask, 1, False)
                if key not in made:
                    steps = ir.tape.Tape()
                    made[key] = _mask(steps, *key)
                    model.graph.insert_before(node, steps.nodes)
                node.replace_input_with(3, made[key])
        return ir.passes.PassResult(model, bool(made))


@dataclass(frozen=True)
class _Heads:
    """Query and KV heads, channels of a query and of a value; ``flat``: heads and channels share the last axis."""

    query: int
    key: int
    dim: int
    value_dim: int
    flat: bool

    @property
    def repeat(self) -> int:
        return self.query // self.key

    def shape(self, heads: int, dim: int) -> list[int]:
        """The shape argument of a Reshape to this number of heads (0: the size does not change)."""
        return [0, -1, heads * dim] if self.flat else [0, heads, -1, dim]

    def order(self, dim: int) -> npt.NDArray[np.int64]:
        """Channels of all heads in the order (repeat, KV head)."""
        old = np.arange(self.query * dim).reshape(self.key, self.repeat, dim)
        return old.transpose(1, 0, 2).flatten()


def _read_heads(node: ir.Node, mask: ir.Value) -> _Heads | None:
    """The sizes of ``node``; None if no heads share keys, or if the mask differs between heads."""
    query, key, result = (value.shape if value is not None else None for value in (*node.inputs[:2], node.outputs[0]))
    softcap = node.attributes.get_float("softcap", 0.0)
    if softcap or query is None or key is None or result is None or mask.shape is None:
        return None
    flat = len(query) == 3
    counts = [node.attributes.get_int(f"{side}_num_heads", 0) for side in ("q", "kv")] if flat else [query[1], key[1]]
    sizes = [size for size in (*counts, query[-1], result[-1]) if isinstance(size, int)]
    # All sizes must be numbers, and all heads of a group must have one mask, since they become rows of one head.
    if len(sizes) < 4 or len(mask.shape) != 4 or mask.shape[1] != 1:
        return None
    heads, groups, dim, value_dim = sizes
    per = heads if flat else 1  # three axes: the last one has the channels of all heads
    return _Heads(heads, groups, dim // per, value_dim // per, flat) if heads > groups else None


def _to_rows(graph: ir.Graph, node: ir.Node, heads: _Heads) -> bool:
    """Step 2: reshape the query and the result of ``node``. Returns whether the node has the form."""
    query, result = node.inputs[0], node.outputs[0]
    assert query is not None
    if heads.flat and not _put_in_order(node, heads):
        return False
    if heads.flat:
        node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads.key)
    # The users are taken before the new Reshape, which must not read its own result.
    steps, after, users = ir.tape.Tape(), ir.tape.Tape(), tuple(result.uses())
    rows = _reshape(steps, query, heads.shape(heads.key, heads.dim))
    restored = _reshape(after, result, heads.shape(heads.query, heads.value_dim))
    restored.shape = result.shape
    for user, index in users:
        user.replace_input_with(index, restored)
    node.replace_input_with(0, rows)
    graph.insert_before(node, steps.nodes)
    graph.insert_after(node, after.nodes)
    result.shape = ir.Shape([None if size < 1 else size for size in heads.shape(heads.key, heads.value_dim)])
    return True


def _put_in_order(node: ir.Node, heads: _Heads) -> bool:
    """Reorder the heads of query and output projection, if both exist and have no other use."""
    # Back from the query: rotary embedding, bias, product. Forward from the result: the output projection.
    query, result = node.inputs[0], node.outputs[0]
    rotary = _find_sole_producer(query, "RotaryEmbedding")
    if rotary is not None:
        query = rotary.inputs[0]
    columns: list[ir.Value | None] = []
    bias = _find_sole_producer(query, "Add")
    if bias is not None:
        query, added = bias.inputs if _is_weight(bias.inputs[1], 1) else bias.inputs[::-1]
        if not _is_weight(added, 1):
            return False
        columns.append(added)
    product = _find_sole_producer(query, "MatMul")
    output = next(iter(result.uses())).node if _is_used_once(result) else None
    if product is None or output is None or output.op_type != "MatMul" or output.inputs[0] is not result:
        return False
    # Everything is checked before the first weight changes: a node of another form must stay whole.
    weight, rows = product.inputs[1], output.inputs[1]
    if not _is_weight(weight, 2) or not _is_weight(rows, 2):
        return False
    for column in (*columns, weight):
        change_tensor(column, lambda weight: np.take(weight, heads.order(heads.dim), -1))
    change_tensor(rows, lambda weight: np.take(weight, heads.order(heads.value_dim), 0))
    return True


def _find_sole_producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes ``value``, if it is of this operator and ``value`` is used once."""
    return find_producer(value, op_type) if value is not None and _is_used_once(value) else None


def _is_used_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _is_weight(value: ir.Value | None, rank: int) -> bool:
    """Whether ``value`` is an initialiser of this rank that is used once."""
    constant = value.const_value if value is not None and value.is_initializer() and len(value.uses()) == 1 else None
    return constant is not None and constant.shape.rank() == rank


def _mask(steps: ir.tape.Tape, mask: ir.Value, repeat: int, flat: bool) -> ir.Value:
    """``mask`` as floats with repeated rows: each row is repeated in place if ``flat``, else the whole is repeated."""
    if mask.dtype == ir.DataType.BOOL:
        old = mask.shape
        mask = steps.op(
            "Where", [mask, _add_constant(steps, np.zeros((), dtype=np.float32)), _add_constant(steps, LOWEST)]
        )
        mask.shape, mask.type = old, ir.TensorType(ir.DataType.FLOAT)
    if repeat == 1:
        return mask
    # An axis of size 1 beside the rows is expanded and merged into them: behind them, each row is repeated in place;
    # before them, the whole is repeated.
    axis = 3 if flat else 2
    times = np.where(np.arange(5) == axis, repeat, 1)
    rows = steps.op("Unsqueeze", [mask, _add_constant(steps, np.array([axis]))])
    rows = steps.op("Expand", [rows, _add_constant(steps, times)])
    shape = steps.op(
        "Concat", [_add_constant(steps, np.array([0, 0, -1])), steps.op("Shape", [mask], {"start": 3})], {"axis": 0}
    )
    return steps.op("Reshape", [rows, shape])


def _reshape(steps: ir.tape.Tape, value: ir.Value, shape: list[int]) -> ir.Value:
    result = steps.op("Reshape", [value, _add_constant(steps, np.array(shape))])
    result.shape, result.type = ir.Shape([size if size > 0 else None for size in shape]), value.type
    return result


def _add_constant(steps: ir.tape.Tape, array: npt.NDArray[np.generic]) -> ir.Value:
    result = steps.op("Constant", [], {"value": ir.tensor(array)})
    result.const_value = ir.tensor(array)
    return result
