"""Ops that read or write at fixed positions: diagonals, and writes of a slice or of one position."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mptk.ir.axes import ONE, Axis, Term, concat
from mptk.ir.axis_facts import AxisFacts, Dims, Results
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.opaque import opaque
from passes.analysis.rules.table import ZeroOf, normalize, rule


@rule("aten.diagonal", zero="keep", positions="carry")
def diagonal(ctx: RuleContext, node: fx.Node, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Results:
    """y[…, k] = x[…, k, …, k]: both dimensions are one axis. Other diagonals than the main one are opaque."""
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
    out = list(x.dims[:-1])
    for d in sorted((normalize(dim1, x.ndim + 1), normalize(dim2, x.ndim + 1))):
        out.insert(d, x.dims[-1])
    return tuple(out)


@rule("aten.diag", zero="keep")
def diag(ctx: RuleContext, node: fx.Node, x: Value, offset: int = 0) -> Results:
    """The diagonal of a matrix, or the matrix of a diagonal."""
    return diag_embed(ctx, node, x, offset) if x.ndim == 1 else diagonal(ctx, node, x, offset)


def _zero_of_filled(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    return zero(node.args[0]) if node.args[1] == 0 else set()


@rule("aten.fill_diagonal_", zero=_zero_of_filled)
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
    """y = the blocks along a diagonal, and zeros: its rows are those of the blocks in order, and so its columns."""
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
