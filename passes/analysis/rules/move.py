"""Ops that move dimensions or pass them through unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from mptk.ir.axes import ONE
from mptk.ir.ops import base_name
from passes.analysis.rules.table import Dims, Value, meet, normalize, normalize_all, rule

if TYPE_CHECKING:
    from passes.analysis.propagate import Walk
    from passes.transforms.rewrite import Resizer


@rule(
    "aten.to",
    "aten._to_copy",
    "aten.type_as",
    "aten.clone",
    "aten.contiguous",
    "aten.alias",
    "aten.detach",
    "aten.detach_",
    "aten.lift_fresh_copy",
    "aten.dropout",
    "aten.dropout_",
    "aten.feature_dropout",
    "aten.resolve_conj",
    "aten.resolve_neg",
    zero="move",
)
def same(w: Walk, node: fx.Node, x: Value, *_: Any, **__: Any) -> Dims:
    """y_d = x_d."""
    return x.dims


@rule("aten.transpose", "aten.swapaxes", "aten.swapdims", "aten.transpose_", zero="move")
def transpose(w: Walk, node: fx.Node, x: Value, dim0: int, dim1: int) -> Dims:
    """Two dimensions change places."""
    a, b = normalize(dim0, x.ndim), normalize(dim1, x.ndim)
    order = list(range(x.ndim))
    order[a], order[b] = b, a
    return _move(w, node, x, order)


@rule("aten.permute", zero="move")
def permute(w: Walk, node: fx.Node, x: Value, order: Sequence[int]) -> Dims:
    """y_i = x_{order_i}."""
    return _move(w, node, x, normalize_all(order, x.ndim))


@rule("aten.numpy_T", zero="move")
def numpy_transpose(w: Walk, node: fx.Node, x: Value) -> Dims:
    """All dimensions in reverse."""
    return x.dims[::-1]


@rule("aten.t", "aten.mT", "aten.mH", "aten.matrix_H", "aten.adjoint", zero="move")
def reverse(w: Walk, node: fx.Node, x: Value) -> Dims:
    """The last two dimensions change places."""
    return _move(w, node, x, [*range(x.ndim - 2), *reversed(range(max(x.ndim - 2, 0), x.ndim))])


@rule("aten.movedim", "aten.moveaxis", zero="move")
def movedim(w: Walk, node: fx.Node, x: Value, source: Any, destination: Any) -> Dims:
    """Dimensions ``source`` go to ``destination``, the others keep their order."""
    sources, targets = normalize_all(source, x.ndim), normalize_all(destination, x.ndim)
    moved = dict(zip(targets, sources, strict=True))
    rest = iter(d for d in range(x.ndim) if d not in sources)
    return _move(w, node, x, [moved[d] if d in moved else next(rest) for d in range(x.ndim)])


def _move(w: Walk, node: fx.Node, x: Value, order: Sequence[int]) -> Dims:
    return tuple(x.dims[d] for d in order)


@rule("aten.unsqueeze", "aten.unsqueeze_", zero="move")
def unsqueeze(w: Walk, node: fx.Node, x: Value, dim: int) -> Dims:
    """A dimension of 1 comes in."""
    d = normalize(dim, x.ndim + 1)
    return (*x.dims[:d], ONE, *x.dims[d:])


def _resize_squeeze(r: Resizer, node: fx.Node) -> None:
    """Dimensions that are cut to 1 stay: the others are named."""
    gone, stays = r.note(node)
    if any(r.size(t) == 1 for t in stays):
        r.replace(node, f"aten.{base_name(node.target)}.dims", (node.args[0], gone))


@rule("aten.squeeze", "aten.squeeze_", zero="move", resize=_resize_squeeze)
def squeeze(w: Walk, node: fx.Node, x: Value, dim: Any = None) -> Dims:
    """Dimensions of 1 go (all, or those named)."""
    gone = [d for d in normalize_all(dim, x.ndim) if x.dims[d].size == 1]
    out = tuple(t for d, t in enumerate(x.dims) if d not in gone)
    w.notes[node] = (gone, [t for t in out if t.size > 1])
    return out


@rule("aten.unfold", zero="move")
def unfold(w: Walk, node: fx.Node, x: Value, dim: int, size: int, step: int) -> Dims:
    """x_d becomes windows, and each window's positions a last dimension; neither can be cut, the others pass."""
    d = normalize(dim, x.ndim)
    w.freeze(x.dims[d], "the order of its positions matters", node)
    meet(w, x.dims, [d])
    windows, inside = (w.frozen(s, "windows over positions", node) for s in (w.shape(node)[d], size))
    return (*x.dims[:d], windows, *x.dims[d + 1 :], inside)


@rule("aten.tril", "aten.triu")
def triangle(w: Walk, node: fx.Node, x: Value, *_: Any, **__: Any) -> Dims:
    """y_d = x_d; the last two are compared by position and cannot be cut."""
    for d in x.dims[-2:]:
        w.freeze(d, "compared by position", node)
    return x.dims
