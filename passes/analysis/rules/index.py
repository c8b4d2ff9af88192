"""Ops that read or write at positions. Positions remember the axis they came from (``positions.py``)."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

from torch import fx

from mptk.ir import (
    Axis,
    AxisFacts,
    Dims,
    Results,
    Term,
    collect_axes,
    concat,
    get_argument,
    list_schema_arguments,
    make_axis,
    name_base_op,
    resolve_result_shape,
)
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.opaque import opaque
from passes.analysis.rules.pointwise import broadcast
from passes.analysis.rules.resizer import Picked, Resizer
from passes.analysis.rules.shape import cut_term
from passes.analysis.rules.table import (
    Result,
    ZeroOf,
    align,
    find_lone_axes,
    freeze_positions,
    normalize,
    record_meeting,
    rule,
)


def _zero_beside(node: fx.Node, zero: ZeroOf, facts: AxisFacts, read: Collection[int]) -> set[Axis]:
    """Zero if x is, along dimensions that are not ``read`` at positions."""
    dims = facts.dims(node.all_input_nodes[0])
    return zero(node.args[0]) & collect_axes(t for d, t in enumerate(dims) if d not in read)


def _zero_beside_dim(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    d, ndim = get_argument(node, "dim"), len(resolve_result_shape(node.all_input_nodes[0]))
    return _zero_beside(node, zero, facts, () if d is None else [normalize(d, ndim)])


@rule("aten.embedding", zero=lambda node, zero, facts: _zero_beside(node, zero, facts, [0]), positions="own")
def embedding(ctx: RuleContext, node: fx.Node, weight: Value, indices: Value, *_: object) -> Dims:
    """y[…, c] = W[indices[…], c]."""
    ctx.index(node, indices, weight.dims[0])
    record_meeting(ctx, weight.dims, [0])
    ctx.pin_input(node, indices)
    if ctx.is_input(indices.node):  # positions and types are looked up, too, but are no words
        ctx.note_role(weight.dims[0], "word")
    ctx.note_role(weight.dims[1], "embedding")
    return (*indices.dims, *weight.dims[1:])


def _zero_of_bags(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """The bags are zero if the weight is; the positions of the largest (the last result) are not."""
    # The rule has one answer for all results, so it holds only if the last one is not used.
    return zero(node.args[0]) if all(user.args[1] != 3 for user in node.users) else set()


@rule("aten.embedding_bag", zero=_zero_of_bags)
def embedding_bag(ctx: RuleContext, node: fx.Node, weight: Value, *others: object, **keywords: object) -> Results:
    """y[b, c] = Σ (or mean, or max) of W[i, c] over the indices i of bag b: only channels can be cut."""
    ctx.freeze(weight.dims[0], "indexed in bags", node)
    ctx.note_role(weight.dims[1], "embedding")
    first, *further, last = opaque(ctx, node, *others, **keywords)
    assert isinstance(first, tuple)
    assert isinstance(last, tuple)
    bags = (first[0], weight.dims[1])
    return [bags, *further, bags if get_argument(node, "mode", 0) == 2 else last]


@rule("aten.embedding_renorm_", zero="keep")
def embedding_renorm(
    ctx: RuleContext, node: fx.Node, weight: Value, indices: Value, maximum: float, order: float
) -> Dims:
    """y_c = W_c: each row that is indexed is divided by its norm if that is too large."""
    ctx.freeze(weight.dims[0], "its rows are made shorter where they are indexed", node)
    ctx.freeze(weight.dims[1], "the smallest of its values counts", node) if order < 0 else None
    ctx.reduce(node, weight.dims[1], "sum")
    record_meeting(ctx, weight.dims, [1])
    return weight.dims


def _resize_picked(resizer: Resizer, node: fx.Node) -> None:
    """Shift known positions by what the segments before them lose."""
    picked = resizer.note(node, Picked)
    if picked is not None and any(map(resizer.has_changed, picked.before)):
        indices = list(get_argument(node, "indices"))
        indices[picked.dim] = resizer.index(node, [resizer.size(before) for before in picked.before])
        node.update_arg(1, indices)


def _zero_of_index(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """Zero as x: along dimensions that are not read at positions, and along segments at known positions."""
    known = facts.note(node, Picked) is not None
    read = [d for d, i in enumerate(get_argument(node, "indices")) if i is not None and not known]
    return _zero_beside(node, zero, facts, read)


@rule("aten.index", "aten._unsafe_index", zero=_zero_of_index, resize=_resize_picked, positions="own")
def index(ctx: RuleContext, node: fx.Node, x: Value, indices: Sequence[Value | None]) -> Results | Result:
    """y[i…, rest] = x[indices[i…], rest]; adjacent index dimensions keep their place, others go to the front."""
    # A short list in the code picks single positions, which a cut can follow.
    places, values = zip(*[(d, i) for d, i in enumerate(indices) if i is not None], strict=True)
    if (known := _read_short_list(ctx, values)) is not None:
        return _pick(ctx, node, x, places[0], known)
    # Otherwise the index's broadcast dimensions replace the indexed ones. A boolean mask over several dimensions does
    # not have this form.
    record_meeting(ctx, x.dims, places)
    rest = [t for d, t in enumerate(x.dims) if d not in places]
    ndim = max(v.ndim for v in values)
    shape = resolve_result_shape(node)
    if len(shape) != len(rest) + ndim:
        return opaque(ctx, node, x, *values)
    start = places[0] if places[-1] - places[0] < len(places) else 0
    made = _index_dims(ctx, node, x, dict(zip(places, values, strict=True)), shape[start : start + ndim])
    return Result((*rest[:start], *made, *rest[start:]), positions=ctx.find_position_axis(x))


def _read_short_list(ctx: RuleContext, indices: Sequence[Value]) -> list[int] | None:
    """The positions, if the only index is a short list in the model's code."""
    known = ctx.read_constant(indices[0].node) if len(indices) == 1 else None
    # Each position becomes a segment of its own, so a long list would break the axis into as many.
    return known.tolist() if known is not None and known.dim() == 1 and known.numel() <= 8 else None


def _index_dims(
    ctx: RuleContext, node: fx.Node, x: Value, indices: Mapping[int, Value], shape: Sequence[int]
) -> list[Term]:
    """Index dimensions of x. Returns the index tensors' broadcast dimensions, of sizes ``shape``."""
    for d, positions in indices.items():
        ctx.index(node, positions, x.dims[d])
    out: list[Term] = [make_axis(size) for size in shape]
    for positions in indices.values():
        if ctx.is_weight(x.node):
            ctx.pin_input(node, positions)
        align(ctx, node, positions.dims, out)
    return out


def _pick(ctx: RuleContext, node: fx.Node, x: Value, d: int, positions: Sequence[int]) -> Result:
    """Read a short list of known positions. Each is a segment of its own."""
    # Cut the dimension at the positions that are read, and name what is before each: the cut shifts the list by that.
    size = x.dims[d].size
    wanted = [normalize(p, size) for p in positions]
    borders = sorted({0, size, *wanted, *(p + 1 for p in wanted)})
    sizes = [b - a for a, b in itertools.pairwise(borders)]
    segments = dict(zip(borders, cut_term(ctx, node, x.dims[d], sizes), strict=False))
    if any(segments[p].size != 1 for p in wanted):
        ctx.freeze(x.dims[d], "indexed by a constant", node)
    before = tuple(concat(segments[b] for b in borders[:-1] if b < p) for p in wanted)
    dims = (*x.dims[:d], concat(segments[p] for p in wanted), *x.dims[d + 1 :])
    return Result(dims, Picked(d, before), ctx.find_position_axis(x))


@rule("aten.index_select", zero=_zero_beside_dim, positions="own")
def index_select(ctx: RuleContext, node: fx.Node, x: Value, dim: int, indices: Value) -> Result:
    """y_d = the index's axis."""
    d = normalize(dim, x.ndim)
    ctx.index(node, indices, x.dims[d])
    record_meeting(ctx, x.dims, [d])
    return Result((*x.dims[:d], *indices.dims, *x.dims[d + 1 :]), positions=ctx.find_position_axis(x))


@rule("aten.gather", zero=_zero_beside_dim, positions="own")
def gather(ctx: RuleContext, node: fx.Node, x: Value, dim: int, indices: Value, **_: object) -> Result:
    """y has the index's axes; those other than d are x's."""
    d = normalize(dim, x.ndim)
    ctx.index(node, indices, x.dims[d])
    _tie_other_dims(ctx, node, x, indices, d, "gathered in part")
    return Result(indices.dims, positions=ctx.find_position_axis(x))


def _tie_other_dims(ctx: RuleContext, node: fx.Node, x: Value, other: Value, d: int, reason: str) -> None:
    """Tie dimensions other than d. If their sizes differ, neither can be cut."""
    record_meeting(ctx, x.dims, [d])
    for i, (a, b) in enumerate(zip(x.dims, other.dims, strict=True)):
        if i != d and a.size == b.size:
            ctx.unify(a, b, node)
        elif i != d:
            ctx.freeze(a, reason, node)
            ctx.freeze(b, reason, node)


@rule("aten.take_along_dim", zero=_zero_beside_dim, positions="own")
def take_along_dim(
    ctx: RuleContext, node: fx.Node, x: Value, indices: Value, dim: int | None = None
) -> Results | Result:
    """Like gather, but other dimensions broadcast. Without a dimension, x is flattened first."""
    beside = [i for i in range(x.ndim) if dim is not None and i != normalize(dim, x.ndim)]
    if dim is None or any(x.dims[i].size != indices.dims[i].size for i in beside):
        return opaque(ctx, node, x, indices)
    return gather(ctx, node, x, dim, indices)


def _zero_of_scatter(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """Zero if x is, along the positions' axis (removed ones are never written), and along others if values are, too."""
    base, dim = zero(node.args[0]), get_argument(node, "dim")
    value = next(
        get_argument(node, name) for name in ("src", "source", "value") if name in list_schema_arguments(node.target)
    )
    dims = facts.dims(node.all_input_nodes[0])
    along = find_lone_axes(dims, dim) if dims else set()
    return base & (along | zero(value)) if value != 0 else base


@rule(
    *("aten.scatter", "aten.scatter_", "aten.scatter_add", "aten.scatter_add_", "aten.scatter_reduce"),
    zero=_zero_of_scatter,
    positions="own",
)
def scatter(ctx: RuleContext, node: fx.Node, x: Value, dim: int, indices: Value, *values: object, **_: object) -> Dims:
    """y = x with values written at positions of d."""
    d = normalize(dim, x.ndim)
    freeze_positions(ctx, node, x, *values)
    ctx.index(node, indices, x.dims[d])
    written = [v for v in values if isinstance(v, Value)]
    for value in (indices, *written):
        _tie_other_dims(ctx, node, x, value, d, "written in part")
    for v in written:
        if v.dims[d].size == indices.dims[d].size:
            ctx.unify(indices.dims[d], v.dims[d], node)
        else:
            ctx.freeze(v.dims[d], "written in part", node)
    return x.dims


@rule(
    *("aten.index_add", "aten.index_add_", "aten.index_copy", "aten.index_copy_"),
    zero=_zero_of_scatter,
    positions="own",
)
def index_add(ctx: RuleContext, node: fx.Node, x: Value, dim: int, indices: Value, source: Value, **_: object) -> Dims:
    """y = x with source added at positions of d."""
    d = normalize(dim, x.ndim)
    freeze_positions(ctx, node, x, source)
    ctx.index(node, indices, x.dims[d])
    record_meeting(ctx, x.dims, [d])
    ctx.unify(indices.dims[0], source.dims[d], node)
    for i, (a, b) in enumerate(zip(x.dims, source.dims, strict=True)):
        if i != d:
            ctx.unify(a, b, node)
    return x.dims


@rule("aten.index_put", "aten.index_put_", zero="drop", positions="own")
def index_put(
    ctx: RuleContext, node: fx.Node, x: Value, indices: Sequence[Value | None], values: Value, *_: object
) -> Dims:
    """y = x with values written at positions."""
    freeze_positions(ctx, node, x, values)
    given = [i for i in indices if i is not None]
    for d, i in enumerate(indices):
        if i is not None:
            ctx.index(node, i, x.dims[d])
    record_meeting(ctx, x.dims, [d for d, i in enumerate(indices) if i is not None])
    rest = [t for d, t in enumerate(x.dims) if d >= len(indices) or indices[d] is None]
    align(ctx, node, values.dims, (*given[0].dims, *rest))
    return x.dims


def _is_row_mask(node: fx.Node) -> bool:
    """Whether a mask has one value for each row, expanded along it."""
    # transformers' image models expand a mask of tokens [B, S, 1] to the embeddings' shape.
    while node.op == "call_function" and name_base_op(node.target) in ("to", "clone", "expand", "expand_as"):
        node = node.all_input_nodes[0]
    value = node.meta["val"]
    return bool(value.ndim > 0 and value.shape[-1] == 1)


@rule(
    "aten.masked_scatter",
    "aten.masked_scatter_",
    zero=lambda node, zero, facts: zero(node.args[0]) & zero(node.args[2]),
)
def masked_scatter(ctx: RuleContext, node: fx.Node, x: Value, mask: Value, source: Value) -> Dims:
    """y = x, with the source's elements in order at set positions of the mask. For whole rows, y_last = source_last."""
    if not _is_row_mask(mask.node) or source.dims[-1].size != x.dims[-1].size:
        opaque(ctx, node, x, mask, source)
    else:
        ctx.unify(source.dims[-1], x.dims[-1], node)
        record_meeting(ctx, source.dims, range(source.ndim - 1))
        for d in source.dims[:-1]:
            ctx.freeze(d, "its rows are taken in order", node)
    return broadcast(ctx, node, x, mask)
