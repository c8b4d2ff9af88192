"""Ops that depend on the order of positions along some dimensions: these cannot be cut, the others pass.

The result has fresh axes there, since its positions are not the operand's positions.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mptk.ir.axes import ONE
from mptk.ir.axis_facts import Dims, Results
from mptk.ir.ops import base_name, named_argument
from mptk.ir.sizes import result_shape
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.opaque import opaque
from passes.analysis.rules.table import meet, normalize, normalize_all, rule, zero_of_first

ORDER = "the order of its positions matters"


def pinned(ctx: RuleContext, node: fx.Node, x: Value, dims: Sequence[int], sizes: Sequence[int]) -> Dims:
    """Freeze dimensions ``dims`` of x; the result has fresh axes of ``sizes`` there."""
    out = list(x.dims)
    meet(ctx, x.dims, dims)
    for d in dims:
        ctx.freeze(x.dims[d], ORDER, node)
        out[d] = ctx.frozen(sizes[d], ORDER, node)
    return tuple(out)


DEFAULT_DIMS: dict[str, tuple[int, ...] | None] = {"2": (-2, -1), "n": None}
"""The dimensions of a transform, by the end of its name; else the last one."""


@rule(*(f"aten.fft_{kind}fft{n}" for kind in ("", "i", "r", "ir") for n in ("", "2", "n")), zero="keep")
def fourier(ctx: RuleContext, node: fx.Node, x: Value, sizes: object = None, *_: object, **__: object) -> Dims:
    """y_d = Σ over all positions of x_d, which pins d; the other dimensions pass."""
    dims = named_argument(node, "dim", DEFAULT_DIMS.get(base_name(node.target)[-1], -1))
    if dims is None and isinstance(sizes, (list, tuple)):
        dims = range(-len(sizes), 0)
    return pinned(ctx, node, x, normalize_all(dims, x.ndim), result_shape(node))


@rule("aten.roll", zero="keep", positions="carry")
def roll(ctx: RuleContext, node: fx.Node, x: Value, shifts: object, dims: Sequence[int] = ()) -> Dims:
    """y_d = x_d shifted, which pins d. Without dimensions x is flattened first, which pins all."""
    return pinned(ctx, node, x, normalize_all(dims, x.ndim), x.shape)


@rule("aten.flip", zero="keep", positions="carry")
def flip(ctx: RuleContext, node: fx.Node, x: Value, dims: Sequence[int]) -> Dims:
    """y_d = x_d in reverse, which pins d."""
    return pinned(ctx, node, x, [normalize(d, x.ndim) for d in dims], x.shape)


@rule("aten.flipud", "aten.msort", zero="keep", positions="carry")
def first(ctx: RuleContext, node: fx.Node, x: Value) -> Dims:
    """y_0 = x_0 in another order, which pins dimension 0."""
    return pinned(ctx, node, x, [0], x.shape)


@rule("aten.fliplr", zero="keep", positions="carry")
def fliplr(ctx: RuleContext, node: fx.Node, x: Value) -> Dims:
    """y_1 = x_1 in reverse, which pins dimension 1."""
    return pinned(ctx, node, x, [1], x.shape)


@rule("aten.rot90", zero="keep", positions="carry")
def rot90(ctx: RuleContext, node: fx.Node, x: Value, k: int = 1, dims: Sequence[int] = (0, 1)) -> Dims:
    """Turned in the plane of two dimensions, which pins both."""
    return pinned(ctx, node, x, [normalize(d, x.ndim) for d in dims], result_shape(node))


@rule("aten.logcumsumexp")
@rule("aten.cumprod", zero="keep")
def scan(ctx: RuleContext, node: fx.Node, x: Value, dim: int, **_: object) -> Dims:
    """y_d combines each position with all before it, which pins d."""
    return pinned(ctx, node, x, [normalize(dim, x.ndim)], x.shape)


@rule("aten.cummax", "aten.cummin", zero=zero_of_first)
def extremes(ctx: RuleContext, node: fx.Node, x: Value, dim: int) -> list[Dims]:
    """y_d = the largest so far and its position, which pins d."""
    return [pinned(ctx, node, x, [normalize(dim, x.ndim)], x.shape)] * 2


@rule("aten.diff", zero="all")
def diff(ctx: RuleContext, node: fx.Node, x: Value, n: int = 1, dim: int = -1, *ends: object, **named: object) -> Dims:
    """y_d = x_d less the position before it, which pins d; ``prepend`` and ``append`` have the other axes."""
    d = normalize(dim, x.ndim)
    for other in (*ends, *named.values()):
        for i, t in enumerate(other.dims if isinstance(other, Value) else ()):
            ctx.freeze(t, ORDER, node) if i == d else ctx.unify(t, x.dims[i], node)
    return pinned(ctx, node, x, [d], result_shape(node))


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
    several = [ctx.frozen(size, "quantiles", node) for size in (q.shape if isinstance(q, Value) else ())]
    return (*several, *(ONE if i == d else t for i, t in enumerate(x.dims) if keepdim or i != d))
