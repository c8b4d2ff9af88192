"""Ops that depend on the order of positions along some dimensions: these cannot be cut, the others pass.

The result has fresh axes there, since its positions are not the operand's positions.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mptk.ir import ONE, Dims, Results, Term, concat, get_argument, name_base_op, resolve_result_shape
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.opaque import opaque
from passes.analysis.rules.table import normalize, normalize_all, record_meeting, rule, zero_of_first

ORDER = "the order of its positions matters"


def pin_dims(ctx: RuleContext, node: fx.Node, x: Value, dims: Sequence[int], sizes: Sequence[int]) -> Dims:
    """Freeze dimensions ``dims`` of x; the result has fresh axes of ``sizes`` there."""
    out = list(x.dims)
    record_meeting(ctx, x.dims, dims)
    for d in dims:
        ctx.freeze(x.dims[d], ORDER, node)
        out[d] = ctx.make_frozen(sizes[d], ORDER, node)
    return tuple(out)


DEFAULT_DIMS: dict[str, tuple[int, ...] | None] = {"2": (-2, -1), "n": None}
"""The dimensions of a transform, by the end of its name; else the last one."""


@rule(*(f"aten.fft_{kind}fft{n}" for kind in ("", "i", "r", "ir") for n in ("", "2", "n")), zero="keep")
def fourier(ctx: RuleContext, node: fx.Node, x: Value, sizes: object = None, *_: object, **__: object) -> Dims:
    """y_d = Σ over all positions of x_d, which pins d; the other dimensions pass."""
    dims = get_argument(node, "dim", DEFAULT_DIMS.get(name_base_op(node.target)[-1], -1))
    # ``fftn(x, sizes)`` without dimensions transforms as many of the last ones as there are sizes.
    if dims is None and isinstance(sizes, (list, tuple)):
        dims = range(-len(sizes), 0)
    return pin_dims(ctx, node, x, normalize_all(dims, x.ndim), resolve_result_shape(node))


@rule("aten.roll", zero="keep", positions="carry")
def roll(ctx: RuleContext, node: fx.Node, x: Value, shifts: object, dims: Sequence[int] = ()) -> Dims:
    """y_d = x_d shifted, which pins d. Without dimensions x is flattened first, which pins all."""
    return pin_dims(ctx, node, x, normalize_all(dims, x.ndim), x.shape)


@rule("aten.flip", zero="keep", positions="carry")
def flip(ctx: RuleContext, node: fx.Node, x: Value, dims: Sequence[int]) -> Dims:
    """y_d = x_d in reverse, which pins d."""
    return pin_dims(ctx, node, x, [normalize(d, x.ndim) for d in dims], x.shape)


@rule("aten.flipud", "aten.msort", "aten.fliplr", zero="keep", positions="carry")
def reordered(ctx: RuleContext, node: fx.Node, x: Value) -> Dims:
    """y_0 = x_0 in another order, which pins dimension 0; for ``fliplr``, dimension 1."""
    return pin_dims(ctx, node, x, [int(name_base_op(node.target) == "fliplr")], x.shape)


@rule("aten.rot90", zero="keep", positions="carry")
def rot90(ctx: RuleContext, node: fx.Node, x: Value, k: int = 1, dims: Sequence[int] = (0, 1)) -> Dims:
    """Turned in the plane of two dimensions, which pins both."""
    return pin_dims(ctx, node, x, [normalize(d, x.ndim) for d in dims], resolve_result_shape(node))


@rule("aten.logcumsumexp")
@rule("aten.cumprod", zero="keep")
def scan(ctx: RuleContext, node: fx.Node, x: Value, dim: int, **_: object) -> Dims:
    """y_d combines each position with all before it, which pins d."""
    return pin_dims(ctx, node, x, [normalize(dim, x.ndim)], x.shape)


@rule("aten.cummax", "aten.cummin", zero=zero_of_first)
def extremes(ctx: RuleContext, node: fx.Node, x: Value, dim: int) -> list[Dims]:
    """y_d = the largest so far and its position, which pins d."""
    return [pin_dims(ctx, node, x, [normalize(dim, x.ndim)], x.shape)] * 2


@rule("aten.diff", zero="all")
def diff(ctx: RuleContext, node: fx.Node, x: Value, n: int = 1, dim: int = -1, *ends: object, **named: object) -> Dims:
    """y_d = x_d less the position before it, which pins d; ``prepend`` and ``append`` have the other axes."""
    d = normalize(dim, x.ndim)
    for other in (*ends, *named.values()):
        for i, t in enumerate(other.dims if isinstance(other, Value) else ()):
            ctx.freeze(t, ORDER, node) if i == d else ctx.unify(t, x.dims[i], node)
    return pin_dims(ctx, node, x, [d], resolve_result_shape(node))


@rule("aten.kthvalue", zero=zero_of_first)
def kthvalue(ctx: RuleContext, node: fx.Node, x: Value, k: int, dim: int = -1, keepdim: bool = False) -> list[Dims]:
    """The k-th smallest value along d, which pins d."""
    return median(ctx, node, x, dim, keepdim)


@rule("aten.median.dim", "aten.nanmedian.dim", "aten.mode", zero=zero_of_first)
def median(ctx: RuleContext, node: fx.Node, x: Value, dim: int = -1, keepdim: bool = False) -> list[Dims]:
    """The median along d depends on all its positions, which pins d."""
    d = normalize(dim, x.ndim)
    ctx.freeze(x.dims[d], "ranked", node)
    return [tuple(ONE if i == d else t for i, t in enumerate(x.dims) if keepdim or i != d)] * 2


@rule("aten.quantile", "aten.nanquantile", zero="keep")
def quantile(
    ctx: RuleContext, node: fx.Node, x: Value, q: object, dim: int | None = None, keepdim: bool = False, **_: object
) -> Results:
    """A quantile along d depends on all its positions, which pins d; several are a dimension before the others."""
    if dim is None:
        return opaque(ctx, node, x, q)
    d = normalize(dim, x.ndim)
    ctx.freeze(x.dims[d], "ranked", node)
    several = [ctx.make_frozen(size, "quantiles", node) for size in (q.shape if isinstance(q, Value) else ())]
    return (*several, *(ONE if i == d else t for i, t in enumerate(x.dims) if keepdim or i != d))


@rule("aten.diagonal", zero="keep", positions="carry")
def diagonal(ctx: RuleContext, node: fx.Node, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Results:
    """y[…, k] = x[…, k, …, k]: both dimensions are one axis. Other diagonals than the main one are opaque."""
    # On the main diagonal both dimensions are read at the same position, so a cut must remove the same of both.
    i, j = normalize(dim1, x.ndim), normalize(dim2, x.ndim)
    if offset or x.dims[i].size != x.dims[j].size:
        return opaque(ctx, node, x)
    ctx.unify(x.dims[i], x.dims[j], node)
    return (*(t for d, t in enumerate(x.dims) if d not in (i, j)), x.dims[i])


@rule("aten.linalg_diagonal", zero="keep", positions="carry")
def linalg_diagonal(
    ctx: RuleContext, node: fx.Node, x: Value, offset: int = 0, dim1: int = -2, dim2: int = -1
) -> Results:
    """y[…, k] = x[…, k, …, k]."""
    return diagonal(ctx, node, x, offset, dim1, dim2)


@rule("aten.diag_embed", zero="keep")
def diag_embed(ctx: RuleContext, node: fx.Node, x: Value, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Results:
    """y[…, k, …, k] = x[…, k]: two dimensions of one axis. Other diagonals than the main one are opaque."""
    if offset:
        return opaque(ctx, node, x)
    # In ascending order, so that the first insertion does not move the second one's place.
    out = list(x.dims[:-1])
    for d in sorted((normalize(dim1, x.ndim + 1), normalize(dim2, x.ndim + 1))):
        out.insert(d, x.dims[-1])
    return tuple(out)


@rule("aten.diag", zero="keep")
def diag(ctx: RuleContext, node: fx.Node, x: Value, offset: int = 0) -> Results:
    """The diagonal of a matrix, or the matrix of a diagonal."""
    return diag_embed(ctx, node, x, offset) if x.ndim == 1 else diagonal(ctx, node, x, offset)


@rule("aten.fill_diagonal_", zero=lambda node, zero, facts: zero(node.args[0]) if node.args[1] == 0 else set())
def fill_diagonal(ctx: RuleContext, node: fx.Node, x: Value, *_: object, **__: object) -> Dims:
    """y = x with a number where all positions are equal: the dimensions are one axis, or none can be cut."""
    for d in x.dims[1:]:
        if d.size == x.dims[0].size:
            ctx.unify(x.dims[0], d, node)
        else:
            ctx.freeze(d, "written at fixed positions", node)
            ctx.freeze(x.dims[0], "written at fixed positions", node)
    return x.dims


@rule("aten.block_diag", zero="join")
def block_diag(ctx: RuleContext, node: fx.Node, blocks: Sequence[Value]) -> Dims:
    """y = the blocks along a diagonal, and zeros: it has the blocks' rows in order, and their columns."""
    # A vector is a matrix of one row, and a number a matrix of one element.
    return tuple(concat((ONE, ONE, *x.dims)[-2:][i] for x in blocks) for i in (0, 1))


@rule("aten.select_scatter", zero="all")
def select_scatter(ctx: RuleContext, node: fx.Node, x: Value, source: Value, dim: int, index: int) -> Dims:
    """y = x with the source at one position of d, which cannot be cut; the source has the other dimensions."""
    d = normalize(dim, x.ndim)
    _write(ctx, node, x, (*source.dims[:d], x.dims[d], *source.dims[d:]), d)
    return x.dims


@rule("aten.slice_scatter", zero="all")
def slice_scatter(
    ctx: RuleContext, node: fx.Node, x: Value, source: Value, dim: int = 0, *_: object, **__: object
) -> Dims:
    """y = x with the source at a slice of d, which cannot be cut in either; the others are equal."""
    _write(ctx, node, x, source.dims, normalize(dim, x.ndim))
    return x.dims


def _write(ctx: RuleContext, node: fx.Node, x: Value, source: Sequence[Term], d: int) -> None:
    for i, (a, b) in enumerate(zip(x.dims, source, strict=True)):
        if i == d:
            ctx.freeze(a, "written at fixed positions", node)
            ctx.freeze(b, "written at fixed positions", node)
        else:
            ctx.unify(a, b, node)
