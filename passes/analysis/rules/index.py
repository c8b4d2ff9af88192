"""Ops that read or write at positions, and ops that make positions. Positions remember the axis they came from."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import fx

from mptk.ir.axes import ONE, Term, axis, concat, require_size
from mptk.ir.ops import argument, named_argument, op_name, set_argument
from passes.analysis.rules.opaque import opaque
from passes.analysis.rules.pointwise import broadcast, zero_of_clamp
from passes.analysis.rules.table import Dims, Value, align, carry, forget, lone, meet, normalize, rule

if TYPE_CHECKING:
    from passes.analysis.propagate import Walk
    from passes.transforms.rewrite import Resizer


def _zero_beside(node: fx.Node, zero: Any, w: Walk, read: Collection[int]) -> Any:
    """Where x is, along dimensions that are not ``read`` at positions."""
    dims = w.dims.get(cast("fx.Node", node.args[0]), ())
    return zero(node.args[0]) & {leaf for d, t in enumerate(dims) if d not in read for leaf in w.leaves_of(t)}


def _zero_beside_dim(node: fx.Node, zero: Any, w: Walk) -> Any:
    d: Any = named_argument(node, "dim")
    return _zero_beside(node, zero, w, () if d is None else [normalize(d, len(w.shape(node.all_input_nodes[0])))])


@rule("aten.embedding", zero=lambda node, zero, w: _zero_beside(node, zero, w, [0]), positions=True)
def embedding(w: Walk, node: fx.Node, weight: Value, indices: Value, *_: Any) -> Dims:
    """y[…, c] = W[indices[…], c]."""
    w.index(node, indices, weight.dims[0])
    meet(w, weight.dims, [0])
    w.pin_input(node, indices)
    w.role(weight.dims[1], "embedding")
    return (*indices.dims, *weight.dims[1:])


@rule("aten.embedding_bag", zero=lambda node, zero, w: zero(node.args[0]))
def embedding_bag(w: Walk, node: fx.Node, weight: Value, *others: Any, **keywords: Any) -> Any:
    """y[b, c] = Σ (or mean) of W[i, c] over the indices i of bag b: channels pass, rows, indices and bags do not."""
    if named_argument(node, "mode", 0) == 2:
        return opaque(w, node, weight, *others, **keywords)
    w.freeze(weight.dims[0], "indexed in bags", node)
    w.role(weight.dims[1], "embedding")
    (bags, _), *further = opaque(w, node, *others, **keywords)
    return [(bags, weight.dims[1]), *further]


def _resize_picked(r: Resizer, node: fx.Node) -> None:
    """Known positions follow the segments before them."""
    if r.note(node) is None:
        return
    d, positions = r.note(node)
    if any(map(r.changed, positions)):
        indices: Any = list(node.args[1])  # type: ignore[arg-type]
        indices[d] = r.index(node, [r.size(before) for before in positions])
        node.update_arg(1, indices)


def _zero_of_index(node: fx.Node, zero: Any, w: Walk) -> Any:
    """Of known positions only segments are taken, and zeros with them."""
    indices = cast("Sequence[Any]", node.args[1])
    known = w.notes.get(node) is not None
    return _zero_beside(node, zero, w, [d for d, i in enumerate(indices) if i is not None and not known])


@rule("aten.index", "aten._unsafe_index", zero=_zero_of_index, resize=_resize_picked, positions=True)
def index(w: Walk, node: fx.Node, x: Value, indices: Sequence[Value | None]) -> Dims:
    """y[i…, rest] = x[indices[i…], rest]; index dimensions stand where they stood if adjacent, else in front."""
    places, values = zip(*[(d, i) for d, i in enumerate(indices) if i is not None], strict=True)
    if (known := _short_list(w, values)) is not None:
        return _pick(w, node, x, places[0], known)
    meet(w, x.dims, places)
    rest = [t for d, t in enumerate(x.dims) if d not in places]
    ndim = max(v.ndim for v in values)
    if len(w.shape(node)) != len(rest) + ndim:
        return tuple(opaque(w, node, x, *values))
    start = places[0] if places[-1] - places[0] < len(places) else 0
    for d, v in zip(places, values, strict=True):
        w.index(node, v, x.dims[d])
    return (*rest[:start], *_index_dims(w, node, x, values, w.shape(node)[start : start + ndim]), *rest[start:])


def _short_list(w: Walk, indices: Sequence[Value]) -> list[int] | None:
    """The positions, where the only index is a short list written in the model."""
    known = w.constant(indices[0].node) if len(indices) == 1 else None
    return known.tolist() if known is not None and known.dim() == 1 and known.numel() <= 8 else None


def _index_dims(w: Walk, node: fx.Node, x: Value, values: Sequence[Value], shape: Sequence[int]) -> list[Term]:
    """The index tensors' broadcast dimensions."""
    carry(w, node, x)
    out: list[Term] = [axis(size) for size in shape]
    for v in values:
        if w.is_weight(x.node):
            w.pin_input(node, v)
        for i, d in enumerate(v.dims, start=len(shape) - v.ndim):
            if d.size == shape[i]:
                w.unify(out[i], d, node)
    return out


def _pick(w: Walk, node: fx.Node, x: Value, d: int, positions: Sequence[int]) -> Dims:
    """A short list of known positions: each is a segment of its own."""
    carry(w, node, x)
    from passes.analysis.rules.shape import _cut

    size = x.dims[d].size
    wanted = [normalize(p, size) for p in positions]
    borders = sorted({0, size, *wanted, *(p + 1 for p in wanted)})
    sizes = [b - a for a, b in itertools.pairwise(borders)]
    segments = dict(zip(borders, _cut(w, node, x.dims[d], sizes), strict=False))
    if any(segments[p].size != 1 for p in wanted):
        w.freeze(x.dims[d], "indexed by a constant", node)
    w.notes[node] = (d, [concat(segments[b] for b in borders[:-1] if b < p) for p in wanted])
    return (*x.dims[:d], concat(segments[p] for p in wanted), *x.dims[d + 1 :])


@rule("aten.index_select", zero=_zero_beside_dim, positions=True)
def index_select(w: Walk, node: fx.Node, x: Value, dim: int, indices: Value) -> Dims:
    """y_d = the index's axis."""
    carry(w, node, x)
    d = normalize(dim, x.ndim)
    w.index(node, indices, x.dims[d])
    meet(w, x.dims, [d])
    return (*x.dims[:d], *indices.dims, *x.dims[d + 1 :])


@rule("aten.gather", zero=_zero_beside_dim, positions=True)
def gather(w: Walk, node: fx.Node, x: Value, dim: int, indices: Value, **_: Any) -> Dims:
    """y has the index's axes; those beside d are x's."""
    carry(w, node, x)
    d = normalize(dim, x.ndim)
    w.index(node, indices, x.dims[d])
    _beside(w, node, x, indices, d, "gathered in part")
    return indices.dims


def _beside(w: Walk, node: fx.Node, x: Value, other: Value, d: int, reason: str) -> None:
    """Dimensions other than d are the same axes; where sizes differ, neither can be cut."""
    meet(w, x.dims, [d])
    for i, (a, b) in enumerate(zip(x.dims, other.dims, strict=True)):
        if i != d and a.size == b.size:
            w.unify(a, b, node)
        elif i != d:
            w.freeze(a, reason, node)
            w.freeze(b, reason, node)


@rule("aten.take_along_dim", zero=_zero_beside_dim, positions=True)
def take_along_dim(w: Walk, node: fx.Node, x: Value, indices: Value, dim: int | None = None) -> Dims:
    """As gather, other dimensions broadcast; without a dimension, from x flattened."""
    beside = [i for i in range(x.ndim) if dim is not None and i != normalize(dim, x.ndim)]
    if dim is None or any(x.dims[i].size != indices.dims[i].size for i in beside):
        return tuple(opaque(w, node, x, indices))
    return gather(w, node, x, dim, indices)


def _zero_of_scatter(node: fx.Node, zero: Any, w: Walk) -> Any:
    """Zero where x is, along the positions' axis (removed ones are never written to) and where the values are too."""
    base, dim, value = cast(
        "tuple[fx.Node, int, Any]", (*node.args[:2], argument(node, 3, "src", argument(node, 3, "value")))
    )
    along = lone(w, w.dims[base], dim) if base in w.dims else set()
    return zero(base) & (along | zero(value)) if value != 0 else zero(base)


@rule(
    "aten.scatter",
    "aten.scatter_",
    "aten.scatter_add",
    "aten.scatter_add_",
    "aten.scatter_reduce",
    zero=_zero_of_scatter,
    positions=True,
)
def scatter(w: Walk, node: fx.Node, x: Value, dim: int, indices: Value, *values: Any, **_: Any) -> Dims:
    """y = x with values written at positions of d."""
    d = normalize(dim, x.ndim)
    forget(w, node, x, *values)
    w.index(node, indices, x.dims[d])
    written = [v for v in values if isinstance(v, Value)]
    for value in (indices, *written):
        _beside(w, node, x, value, d, "written in part")
    for v in written:
        if v.dims[d].size == indices.dims[d].size:
            w.unify(indices.dims[d], v.dims[d], node)
        else:
            w.freeze(v.dims[d], "written in part", node)
    return x.dims


@rule(
    "aten.index_add",
    "aten.index_add_",
    "aten.index_copy",
    "aten.index_copy_",
    zero=_zero_of_scatter,
    positions=True,
)
def index_add(w: Walk, node: fx.Node, x: Value, dim: int, indices: Value, source: Value, **_: Any) -> Dims:
    """y = x with source added at positions of d."""
    d = normalize(dim, x.ndim)
    forget(w, node, x, source)
    w.index(node, indices, x.dims[d])
    meet(w, x.dims, [d])
    w.unify(indices.dims[0], source.dims[d], node)
    for i, (a, b) in enumerate(zip(x.dims, source.dims, strict=True)):
        if i != d:
            w.unify(a, b, node)
    return x.dims


@rule("aten.index_put", "aten.index_put_", zero="drop", positions=True)
def index_put(w: Walk, node: fx.Node, x: Value, indices: Sequence[Value | None], values: Value, *_: Any) -> Dims:
    """y = x with values written at positions."""
    forget(w, node, x, values)
    given = [i for i in indices if i is not None]
    for d, i in enumerate(indices):
        if i is not None:
            w.index(node, i, x.dims[d])
    meet(w, x.dims, [d for d, i in enumerate(indices) if i is not None])
    rest = [t for d, t in enumerate(x.dims) if d >= len(indices) or indices[d] is None]
    align(w, node, values.dims, (*given[0].dims, *rest))
    return x.dims


# ---- ops that make positions ----


@rule("aten.topk", zero="drop", positions=True)
def topk(w: Walk, node: fx.Node, x: Value, k: int, dim: int = -1, *_: Any) -> list[Dims]:
    """The k largest positions of d: at least k must stay."""
    d = normalize(dim, x.ndim)
    require_size(x.dims[d], k)
    kind = "max" if named_argument(node, "largest", True) else "min"
    return _ranked(w, node, x, d, w.frozen(k, "the top-k positions", node), kind)


@rule("aten.sort", zero="drop", positions=True)
def sort(w: Walk, node: fx.Node, x: Value, dim: int = -1, *_: Any, **__: Any) -> list[Dims]:
    """All positions of d in order of size."""
    d = normalize(dim, x.ndim)
    if x.node in w.domains:
        return _grouped(w, node, x, d)
    w.freeze(x.dims[d], "sorted", node)
    return _ranked(w, node, x, d, w.frozen(x.dims[d].size, "sorted positions", node), "max")


def _grouped(w: Walk, node: fx.Node, x: Value, d: int) -> list[Dims]:
    """Sorting positions groups rows by them: the rows are permuted, the values keep their axis."""
    w.domains[node] = [w.domains[x.node], None]
    w.routed.append((x.dims[d], w.domains[x.node]))
    return [x.dims, x.dims]


@rule("aten.max.dim", "aten.min.dim", zero="drop", positions=True)
def max_dim(w: Walk, node: fx.Node, x: Value, dim: int, keepdim: bool = False) -> list[Dims]:
    """The largest position of d."""
    d = normalize(dim, x.ndim)
    out = _ranked(w, node, x, d, axis(1), "min" if op_name(node).startswith("aten.min") else "max")
    return out if keepdim else [tuple(t for i, t in enumerate(o) if i != d) for o in out]


def _ranked(w: Walk, node: fx.Node, x: Value, d: int, found: Term, kind: str) -> list[Dims]:
    forget(w, node, x)
    w.reduce(node, x.dims[d], kind)
    meet(w, x.dims, [d])
    w.domains[node] = [None, x.dims[d]]
    out = (*x.dims[:d], found, *x.dims[d + 1 :])
    return [out, out]


@rule("aten.argmax", "aten.argmin", zero="drop", positions=True)
def argmax(w: Walk, node: fx.Node, x: Value, dim: int | None = None, keepdim: bool = False) -> Dims:
    """The largest position of d (of all, if none is given)."""
    if dim is None:
        return opaque(w, node, x)  # type: ignore[no-any-return]
    d = normalize(dim, x.ndim)
    forget(w, node, x)
    w.reduce(node, x.dims[d], "min" if op_name(node).startswith("aten.argmin") else "max")
    w.domains[node] = x.dims[d]
    return tuple(ONE if i == d else t for i, t in enumerate(x.dims) if keepdim or i != d)


@rule("aten.argsort", zero="drop", positions=True)
def argsort(w: Walk, node: fx.Node, x: Value, dim: int = -1, *_: Any, **__: Any) -> Dims:
    """Positions of d in order."""
    if x.node in w.domains:
        return x.dims
    d = normalize(dim, x.ndim)
    w.freeze(x.dims[d], "sorted", node)
    meet(w, x.dims, [d])
    w.domains[node] = x.dims[d]
    return (*x.dims[:d], w.frozen(x.dims[d].size, "sorted positions", node), *x.dims[d + 1 :])


def _resize_count(position: int, name: str) -> Any:
    def resize(r: Resizer, node: fx.Node) -> None:
        if r.changed(r.note(node)):
            set_argument(node, position, name, r.size(r.note(node)))

    return resize


@rule(
    "aten.one_hot",
    zero=lambda node, zero, w: lone(w, w.dims[node], -1),
    resize=_resize_count(1, "num_classes"),
    positions=True,
)
def one_hot(w: Walk, node: fx.Node, x: Value, num_classes: int = -1) -> Dims:
    """y[…, c] = [x = c]: the new dimension is the positions' axis."""
    classes = w.shape(node)[-1]
    domain = w.domains.get(x.node)
    if domain is None or domain.size != classes:
        forget(w, node, x)
        domain = w.frozen(classes, "classes of positions of unknown origin", node)
    w.notes[node] = domain
    return (*x.dims, domain)


def _resize_histc(r: Resizer, node: fx.Node) -> None:
    """Bins of width one from 0: bins = n', max = n' − 1 (as the n bins ended at n − 1)."""
    if r.changed(r.note(node)):
        new = r.size(r.note(node))
        removed = r.note(node).size - new
        set_argument(node, 1, "bins", new)
        set_argument(node, 3, "max", argument(node, 3, "max") - removed)


@rule("aten.histc", zero=lambda node, zero, w: w.leaves_of(w.notes[node]), resize=_resize_histc, positions=True)
def histc(w: Walk, node: fx.Node, x: Value, bins: int = 100, min: Any = 0, max: Any = 0) -> Dims:
    """How often each position occurs: the result's dimension is the positions' axis."""
    domain = w.domains.get(x.node)
    if domain is None or domain.size != bins:
        forget(w, node, x)
        domain = w.frozen(bins, "bins of values", node)
    w.notes[node] = domain
    return (domain,)


def _resize_bounds(r: Resizer, node: fx.Node) -> None:
    if r.note(node) is not None and r.changed(r.note(node)):
        set_argument(node, 2, "max", r.size(r.note(node)) - 1)


@rule("aten.clamp", "aten.clamp_", zero=zero_of_clamp, resize=_resize_bounds, positions=True)
def clamp(w: Walk, node: fx.Node, x: Value, *bounds: Any, **kwargs: Any) -> Dims:
    """y_d = x_d. Positions of an axis clamped to its whole range stay positions of it."""
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    domain = w.domains.get(x.node)
    w.notes[node] = None
    if domain is not None and low in (None, 0) and high == domain.size - 1:
        w.notes[node] = w.domains[node] = domain
    elif domain is not None:
        w.freeze(domain, "its positions are computed with", node)
    return broadcast(w, node, x, *bounds, **kwargs)


def _whole_rows(node: fx.Node) -> bool:
    """Whether a mask is one decision for a row, expanded along it."""
    while node.op == "call_function" and op_name(node).split(".")[1] in ("to", "clone", "expand", "expand_as"):
        node = node.all_input_nodes[0]
    value = node.meta["val"]
    return bool(value.ndim > 0 and value.shape[-1] == 1)


@rule(
    "aten.masked_scatter",
    "aten.masked_scatter_",
    zero=lambda node, zero, w: zero(node.args[0]) & zero(node.args[2]),
)
def masked_scatter(w: Walk, node: fx.Node, x: Value, mask: Value, source: Value) -> Dims:
    """y = x, with the source's elements in order where the mask is set: whole rows of it, then y_last = source_last."""
    if not _whole_rows(mask.node) or source.dims[-1].size != x.dims[-1].size:
        opaque(w, node, x, mask, source)
    else:
        w.unify(source.dims[-1], x.dims[-1], node)
        meet(w, source.dims, range(source.ndim - 1))
        for d in source.dims[:-1]:
            w.freeze(d, "its rows are taken in order", node)
    return broadcast(w, node, x, mask)
