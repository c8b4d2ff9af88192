"""Ops that make positions (ranks), and ops that use them as numbers. Positions remember their axis."""

from __future__ import annotations

from torch import fx

from mptk.ir import (
    ONE,
    Dims,
    ReductionKind,
    Results,
    Term,
    collect_axes,
    get_argument,
    make_axis,
    name_base_op,
    require_size,
    resolve_result_shape,
    set_argument,
)
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.opaque import opaque
from passes.analysis.rules.pointwise import broadcast, zero_of_clamp
from passes.analysis.rules.resizer import Counted, Resizer, count_argument
from passes.analysis.rules.table import Result, find_lone_axes, freeze_positions, normalize, record_meeting, rule


@rule("aten.topk", zero="drop", positions="own")
def topk(ctx: RuleContext, node: fx.Node, x: Value, k: int, dim: int = -1, *_: object) -> Result:
    """The k largest positions of d: at least k must stay."""
    # The candidates can be cut: a removed one is −inf and so never among the k, as long as k others stay.
    d = normalize(dim, x.ndim)
    require_size(x.dims[d], k)
    kind: ReductionKind = "max" if get_argument(node, "largest", True) else "min"
    return _rank_values(ctx, node, x, d, ctx.make_frozen(k, "the top-k positions", node), kind)


@rule("aten.sort", zero="drop", positions="own")
def sort(ctx: RuleContext, node: fx.Node, x: Value, dim: int = -1, *_: object, **__: object) -> Result:
    """All values along d, sorted, and their positions."""
    d = normalize(dim, x.ndim)
    # Sorted positions group rows, like tokens by their expert: rows are permuted, and the values keep their axis.
    if (domain := ctx.find_position_axis(x)) is not None:
        ctx.route(x.dims[d], domain)
        return Result([x.dims, x.dims], positions=[domain, None])
    ctx.freeze(x.dims[d], "sorted", node)
    return _rank_values(ctx, node, x, d, ctx.make_frozen(x.dims[d].size, "sorted positions", node), "max")


@rule("aten.max.dim", "aten.min.dim", zero="drop", positions="own")
def max_dim(ctx: RuleContext, node: fx.Node, x: Value, dim: int, keepdim: bool = False) -> Result:
    """The largest value along d, and its position."""
    d = normalize(dim, x.ndim)
    # Like a top-1, whose dimension is then dropped.
    kept = _rank_values(ctx, node, x, d, make_axis(1), "min" if name_base_op(node.target) == "min" else "max")
    out = (*x.dims[:d], *x.dims[d + 1 :])
    return kept if keepdim else Result([out, out], positions=kept.positions)


def _rank_values(ctx: RuleContext, node: fx.Node, x: Value, d: int, found: Term, kind: ReductionKind) -> Result:
    """Sorted values along d, and their positions in d."""
    freeze_positions(ctx, node, x)
    ctx.reduce(node, x.dims[d], kind)
    record_meeting(ctx, x.dims, [d])
    out = (*x.dims[:d], found, *x.dims[d + 1 :])
    return Result([out, out], positions=[None, x.dims[d]])


@rule("aten.argmax", "aten.argmin", zero="drop", positions="own")
def argmax(
    ctx: RuleContext, node: fx.Node, x: Value, dim: int | None = None, keepdim: bool = False
) -> Results | Result:
    """The position of the largest value along d, or of all values if d is not given."""
    if dim is None:
        return opaque(ctx, node, x)
    d = normalize(dim, x.ndim)
    freeze_positions(ctx, node, x)
    ctx.reduce(node, x.dims[d], "min" if name_base_op(node.target) == "argmin" else "max")
    out = tuple(ONE if i == d else t for i, t in enumerate(x.dims) if keepdim or i != d)
    return Result(out, positions=x.dims[d])


@rule("aten.argsort", zero="drop", positions="own")
def argsort(ctx: RuleContext, node: fx.Node, x: Value, dim: int = -1, *_: object, **__: object) -> Dims | Result:
    """The positions along d, sorted by value."""
    if ctx.find_position_axis(x) is not None:
        return x.dims
    d = normalize(dim, x.ndim)
    ctx.freeze(x.dims[d], "sorted", node)
    record_meeting(ctx, x.dims, [d])
    out = (*x.dims[:d], ctx.make_frozen(x.dims[d].size, "sorted positions", node), *x.dims[d + 1 :])
    return Result(out, positions=x.dims[d])


@rule(
    "aten.one_hot",
    zero=lambda node, zero, facts: find_lone_axes(facts.dims(node), -1),
    resize=count_argument("num_classes"),
    positions="own",
)
def one_hot(ctx: RuleContext, node: fx.Node, x: Value, num_classes: int = -1) -> Result:
    """y[…, c] = [x = c]: the new dimension is the positions' axis."""
    # Only the positions of an axis of this size follow its cut. All other classes are just numbers.
    classes = resolve_result_shape(node)[-1]
    domain = ctx.find_position_axis(x)
    if domain is None or domain.size != classes:
        freeze_positions(ctx, node, x)
        domain = ctx.make_frozen(classes, "classes of positions of unknown origin", node)
    return Result((*x.dims, domain), Counted(domain))


def _resize_histc(resizer: Resizer, node: fx.Node) -> None:
    """Bins of width one from 0: bins = n', max = n' − 1 (n bins end at n − 1)."""
    bins = resizer.note(node, Counted)
    if bins is not None and resizer.has_changed(bins.term):
        new = resizer.size(bins.term)
        set_argument(node, "bins", new)
        set_argument(node, "max", get_argument(node, "max") - (bins.term.size - new))


@rule(
    "aten.histc", zero=lambda node, zero, facts: collect_axes(facts.dims(node)), resize=_resize_histc, positions="own"
)
def histc(ctx: RuleContext, node: fx.Node, x: Value, bins: int = 100, *_: object, **__: object) -> Result:
    """The count of each position: the result's dimension is the positions' axis."""
    domain = ctx.find_position_axis(x)
    if domain is None or domain.size != bins:
        freeze_positions(ctx, node, x)
        domain = ctx.make_frozen(bins, "bins of values", node)
    return Result((domain,), Counted(domain))


@rule("aten.clamp", "aten.clamp_", zero=zero_of_clamp, resize=count_argument("max", less=1), positions="own")
def clamp(ctx: RuleContext, node: fx.Node, x: Value, *bounds: object, **kwargs: object) -> Dims | Result:
    """y_d = x_d. Positions of an axis clamped to its whole range stay positions of it."""
    low, high = get_argument(node, "min"), get_argument(node, "max")
    dims, domain = broadcast(ctx, node, x, *bounds, **kwargs), ctx.find_position_axis(x)
    # The upper bound then follows the cut (``count_argument``).
    if domain is not None and low in (None, 0) and high == domain.size - 1:
        return Result(dims, Counted(domain), positions=domain)
    freeze_positions(ctx, node, x)
    return dims
