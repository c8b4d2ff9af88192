"""group_queries: convert Attention's mask to floats once, and fold grouped queries into the row axis.

ONNX Runtime multiplies each query head by its keys separately, so it reads the keys again for every head of the group.
It also converts a bool mask to floats in every layer. Instead:

1. A bool mask becomes 0 and the lowest float, once for all layers. −inf would not do: a padded token's row may be
   masked everywhere.
2. The queries of a group become rows of one head. The mask's rows are repeated to match, once for all layers.
   [batch, heads, sequence, dim] → [batch, KV heads, repeat × sequence, dim] is only a change of shape.
   [batch, sequence, heads × dim] → [batch, sequence × repeat, KV heads × dim] is one if heads are in the order
   (repeat, KV head), so the columns of the query projection and the rows of the output projection are reordered.

Step 2 makes decode faster and prefill slower: ONNX Runtime splits heads among threads, and fewer heads are left (3
instead of 9, ``docs/onnx.md``). So it is optional. A node of another form keeps its heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes.targets.onnx.fold_kv import find_producer
from passes.targets.onnx.tensors import change_tensor

LOWEST = np.array(np.finfo(np.float32).min)
MaskSource = tuple[ir.Value, int, bool]
"""The source of a new mask: the old mask, the number of repeats of its rows, and ``_Heads.flat``."""


@dataclass(frozen=True)
class GroupQueriesPass(ir.passes.InPlacePass):
    """Convert Attention's mask to floats once, and fold grouped queries into the row axis.

    Uses the shapes of the values around each Attention node. Leaves unused nodes behind. ``rows``: whether to do
    step 2.
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
    if len(sizes) < 4 or len(mask.shape) != 4 or mask.shape[1] != 1:
        return None
    heads, groups, dim, value_dim = sizes
    per = heads if flat else 1
    return _Heads(heads, groups, dim // per, value_dim // per, flat) if heads > groups else None


def _to_rows(graph: ir.Graph, node: ir.Node, heads: _Heads) -> bool:
    """Reshape the query and the result of ``node``. Returns whether the node has the form."""
    query, result = node.inputs[0], node.outputs[0]
    assert query is not None
    if heads.flat and not _put_in_order(node, heads):
        return False
    if heads.flat:
        node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads.key)
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
