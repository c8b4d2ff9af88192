"""Ops that move dimensions, hide them (``torch.vmap``), pair them (complex numbers) or pass them through unchanged."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mptk.compat.torch import vmap_closes, vmap_opens
from mptk.ir import ONE, Dims, concat, name_base_op, name_target, resolve_result_shape
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.pointwise import broadcast
from passes.analysis.rules.resizer import Resizer, Squeezed
from passes.analysis.rules.table import Dim, Result, normalize, normalize_all, record_meeting, rule


@rule("aten.real", "aten.imag", "aten.conj", "aten._conj", "aten.angle", zero="keep")
@rule(
    *("aten.to", "aten._to_copy", "aten.type_as", "aten.clone", "aten.contiguous", "aten.alias", "aten.detach"),
    *("aten.detach_", "aten.lift_fresh_copy", "aten.dropout", "aten.dropout_", "aten.feature_dropout"),
    *("aten.resolve_conj", "aten.resolve_neg"),
    zero="keep",
    positions="carry",
)
def same(ctx: RuleContext, node: fx.Node, x: Value, *_: object, **__: object) -> Dims:
    """y_d = x_d."""
    return x.dims


@rule("aten.transpose", "aten.swapaxes", "aten.swapdims", "aten.transpose_", zero="keep", positions="carry")
def transpose(ctx: RuleContext, node: fx.Node, x: Value, dim0: int, dim1: int) -> Dims:
    """Exchange two dimensions."""
    a, b = normalize(dim0, x.ndim), normalize(dim1, x.ndim)
    order = list(range(x.ndim))
    order[a], order[b] = b, a
    return _move(ctx, node, x, order)


@rule("aten.permute", zero="keep", positions="carry")
def permute(ctx: RuleContext, node: fx.Node, x: Value, order: Sequence[int]) -> Dims:
    """y_i = x_{order_i}."""
    return _move(ctx, node, x, normalize_all(order, x.ndim))


@rule("aten.numpy_T", zero="keep", positions="carry")
def numpy_transpose(ctx: RuleContext, node: fx.Node, x: Value) -> Dims:
    """All dimensions in reverse."""
    return x.dims[::-1]


@rule("aten.t", "aten.mT", "aten.mH", "aten.matrix_H", "aten.adjoint", zero="keep", positions="carry")
def reverse(ctx: RuleContext, node: fx.Node, x: Value) -> Dims:
    """Exchange the last two dimensions."""
    return _move(ctx, node, x, [*range(x.ndim - 2), *reversed(range(max(x.ndim - 2, 0), x.ndim))])


@rule("aten.movedim", "aten.moveaxis", zero="keep", positions="carry")
def movedim(
    ctx: RuleContext, node: fx.Node, x: Value, source: int | Sequence[int], destination: int | Sequence[int]
) -> Dims:
    """Dimensions ``source`` go to ``destination``, the others keep their order."""
    sources, targets = normalize_all(source, x.ndim), normalize_all(destination, x.ndim)
    moved = dict(zip(targets, sources, strict=True))
    rest = iter(d for d in range(x.ndim) if d not in sources)
    return _move(ctx, node, x, [moved[d] if d in moved else next(rest) for d in range(x.ndim)])


def _move(ctx: RuleContext, node: fx.Node, x: Value, order: Sequence[int]) -> Dims:
    return tuple(x.dims[d] for d in order)


@rule("aten.unsqueeze", "aten.unsqueeze_", zero="keep", positions="carry")
def unsqueeze(ctx: RuleContext, node: fx.Node, x: Value, dim: int) -> Dims:
    """Add a dimension of 1."""
    d = normalize(dim, x.ndim + 1)
    return (*x.dims[:d], ONE, *x.dims[d:])


def _resize_squeeze(resizer: Resizer, node: fx.Node) -> None:
    """Name the dimensions to drop, so that dimensions that are cut to 1 stay."""
    squeezed = resizer.note(node, Squeezed)
    if squeezed is not None and any(resizer.size(t) == 1 for t in squeezed.kept):
        resizer.replace(node, f"aten.{name_base_op(node.target)}.dims", (node.args[0], list(squeezed.gone)))


@rule("aten.squeeze", "aten.squeeze_", zero="keep", positions="carry", resize=_resize_squeeze)
def squeeze(ctx: RuleContext, node: fx.Node, x: Value, dim: Dim = None) -> Result:
    """Drop dimensions of 1 (all, or those named)."""
    # The note names them: after a cut to one unit, the call itself would drop that dimension, too.
    gone = [d for d in normalize_all(dim, x.ndim) if x.dims[d].size == 1]
    out = tuple(t for d, t in enumerate(x.dims) if d not in gone)
    return Result(out, Squeezed(tuple(gone), tuple(t for t in out if t.size > 1)))


@rule("aten.unfold", zero="keep", positions="carry")
def unfold(ctx: RuleContext, node: fx.Node, x: Value, dim: int, size: int, step: int) -> Dims:
    """x_d becomes windows; the positions in a window are the last dimension. Neither can be cut, the others pass."""
    d = normalize(dim, x.ndim)
    ctx.freeze(x.dims[d], "the order of its positions matters", node)
    record_meeting(ctx, x.dims, [d])
    windows, inside = (
        ctx.make_frozen(s, "windows over positions", node) for s in (resolve_result_shape(node)[d], size)
    )
    return (*x.dims[:d], windows, *x.dims[d + 1 :], inside)


@rule("aten.tril", "aten.triu")
def triangle(ctx: RuleContext, node: fx.Node, x: Value, *_: object, **__: object) -> Dims:
    """y_d = x_d; the last two are compared by position, so they cannot be cut."""
    for d in x.dims[-2:]:
        ctx.freeze(d, "compared by position", node)
    return x.dims


# ---- complex numbers as pairs: 1 + 1 has no axis, so the pair cannot be cut ----


def _resize_view(resizer: Resizer, node: fx.Node) -> None:
    """The op needs even strides, so an operand sliced to an odd width is copied first."""
    node.update_arg(0, resizer.copy(node, node.all_input_nodes[0]))


@rule("aten.view_as_complex", zero="keep", positions="carry", resize=_resize_view)
def view_as_complex(ctx: RuleContext, node: fx.Node, x: Value) -> Dims:
    """x_last = 1 + 1 (real, imaginary); the others pass."""
    ctx.unify(x.dims[-1], concat((ONE, ONE)), node)
    return x.dims[:-1]


@rule("aten.view_as_real", zero="keep", positions="carry")
def view_as_real(ctx: RuleContext, node: fx.Node, x: Value) -> Dims:
    """y = x · (1 + 1)."""
    return (*x.dims, concat((ONE, ONE)))


@rule("aten.complex", zero="all")
@rule("aten.polar", zero=lambda node, zero, facts: zero(node.args[0]))
def complex_(ctx: RuleContext, node: fx.Node, *args: object, **_: object) -> Dims:
    """y_d = a_d = b_d."""
    return broadcast(ctx, node, *args)


# ---- torch.vmap: its own calls hide a dimension from the calls inside, and show it again ----

VMAPPED = "its positions are the samples of torch.vmap"


@rule(name_target(vmap_opens), zero="keep", positions="carry")
def opened(ctx: RuleContext, node: fx.Node, x: Value, dim: int, level: int) -> Dims:
    """y = x without d, which is hidden and cannot be cut. No choice of other units varies along it."""
    d = normalize(dim, x.ndim)
    ctx.freeze(x.dims[d], VMAPPED, node)
    record_meeting(ctx, x.dims, [d])
    return (*x.dims[:d], *x.dims[d + 1 :])


@rule(name_target(vmap_closes), zero="keep", positions="carry")
def closed(ctx: RuleContext, node: fx.Node, x: Value, level: int, size: int, dim: int) -> Dims:
    """y = x with the hidden dimension at d."""
    d = normalize(dim, x.ndim + 1)
    return (*x.dims[:d], ctx.make_frozen(resolve_result_shape(node)[d], VMAPPED, node), *x.dims[d:])
