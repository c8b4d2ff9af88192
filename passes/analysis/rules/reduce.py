"""Ops that reduce over axes: sums, means, norms, softmax. Their axes are recorded for the exactness check.

Masked channels in a reduction (``Reduction.kind``):
- ``sum``: removed channels must be zero; then nothing changes;
- ``mean``: they must be zero, and the cut mean is scaled by n'/n, so that it equals the masked one;
- ``statistic`` (mean subtraction, variance): statistics run over the kept channels;
- ``max`` (softmax, top-k), ``min``: removed channels count as −inf, as +inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import fx

from mptk.ir import (
    ONE,
    Axis,
    AxisFacts,
    Dims,
    ReductionKind,
    Results,
    SourceLocation,
    collect_axes,
    get_argument,
    name_base_op,
    name_op,
    require_size,
    resolve_result_shape,
    set_argument,
    split_product,
)
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.contract import zero_of_kept
from passes.analysis.rules.pointwise import broadcast
from passes.analysis.rules.resizer import Averaged, Counted, Resizer, count_argument
from passes.analysis.rules.table import (
    Dim,
    Order,
    Result,
    ZeroOf,
    align,
    find_lone_axes,
    normalize,
    normalize_all,
    record_meeting,
    rule,
)


def _reduce_dims(x: Value, dims: Sequence[int], keepdim: bool) -> Dims:
    return tuple(ONE if d in dims else t for d, t in enumerate(x.dims) if keepdim or d not in dims)


def _freeze_reduced(ctx: RuleContext, node: fx.Node, x: Value, dim: Dim, keepdim: bool, reason: str) -> Dims:
    dims = normalize_all(dim, x.ndim)
    for d in dims:
        ctx.freeze(x.dims[d], reason, node)
    return _reduce_dims(x, dims, keepdim)


def _reduce_over(ctx: RuleContext, node: fx.Node, x: Value, dim: Dim, keepdim: bool, kind: ReductionKind) -> Dims:
    dims = normalize_all(dim, x.ndim)
    for d in dims:
        ctx.reduce(node, x.dims[d], kind)
    return _reduce_dims(x, dims, keepdim)


def _resize_mean(resizer: Resizer, node: fx.Node) -> None:
    """mean over n' kept channels · n'/n = mean over n channels, if the removed ones are zero."""
    averaged = resizer.note(node, Averaged)
    assert averaged is not None
    old, new = math.prod(t.size for t in averaged.terms), math.prod(map(resizer.size, averaged.terms))
    if old != new:
        resizer.scale(node, new / old)


@rule("aten.mean", zero="keep", resize=_resize_mean)
def mean(ctx: RuleContext, node: fx.Node, x: Value, dim: Dim = None, keepdim: bool = False, **_: object) -> Result:
    """y = (1/n) Σ_d x."""
    averaged = Averaged(tuple(x.dims[d] for d in normalize_all(dim, x.ndim)))
    return Result(_reduce_over(ctx, node, x, dim, keepdim, "mean"), averaged)


@rule("aten.sum", "aten.nansum", "aten.any", "aten.count_nonzero", zero="keep")
def sum_(ctx: RuleContext, node: fx.Node, x: Value, dim: Dim = None, keepdim: bool = False, **_: object) -> Dims:
    """y = Σ_d x."""
    return _reduce_over(ctx, node, x, dim, keepdim, "sum")


@rule("aten.linalg_vector_norm", "aten.norm", zero="keep")
def vector_norm(
    ctx: RuleContext, node: fx.Node, x: Value, order: Order = 2, dim: Dim = None, keepdim: bool = False, **__: object
) -> Dims:
    """y = (Σ_d |x|^p)^(1/p). Zeros do not disturb it unless p is negative."""
    if isinstance(order, (int, float)) and order < 0:
        for d in normalize_all(dim, x.ndim):
            ctx.freeze(x.dims[d], "the smallest of its values counts", node)
    return sum_(ctx, node, x, dim, keepdim)


@rule("aten.linalg_matrix_norm", zero="keep")
def matrix_norm(
    ctx: RuleContext,
    node: fx.Node,
    x: Value,
    order: Order = "fro",
    dim: Sequence[int] = (-2, -1),
    keepdim: bool = False,
    **__: object,
) -> Dims:
    """y = the norm of the matrices in two dimensions. Zeros do not disturb it unless the order is negative."""
    for d in dim:
        record_meeting(ctx, x.dims, [normalize(d, x.ndim)])
    return vector_norm(ctx, node, x, order, dim, keepdim)


@rule("aten.linalg_norm", zero="keep")
def linalg_norm(
    ctx: RuleContext, node: fx.Node, x: Value, order: Order = None, dim: Dim = None, keepdim: bool = False, **__: object
) -> Dims:
    """y = a matrix norm if an order and two dimensions are given, else a vector norm."""
    # torch takes two dimensions without an order for one long vector.
    dims = normalize_all(dim, x.ndim)
    norm = matrix_norm if order is not None and len(dims) == 2 else vector_norm
    return norm(ctx, node, x, order, dims, keepdim)


@rule("aten.renorm", zero="keep")
def renorm(ctx: RuleContext, node: fx.Node, x: Value, order: float, dim: int, maxnorm: float) -> Dims:
    """y_d = x_d, divided by its norm over all other dimensions if that is too large."""
    others = [d for d in range(x.ndim) if d != normalize(dim, x.ndim)]
    for d in others:
        ctx.reduce(node, x.dims[d], "sum")
    record_meeting(ctx, x.dims, others)
    return x.dims


@rule(
    *("aten.cumsum", "aten.cumsum_"),
    zero=lambda node, zero, facts: zero(node.args[0]) - collect_axes([facts.dims(node)[get_argument(node, "dim")]]),
)
def cumsum(ctx: RuleContext, node: fx.Node, x: Value, dim: int, **_: object) -> Dims:
    """y_d = x_d; each position is the sum up to it, so positions with zeros can be removed."""
    ctx.reduce(node, x.dims[dim], "sum")
    record_meeting(ctx, x.dims, [normalize(dim, x.ndim)])
    return x.dims


def read_correction(node: fx.Node) -> int:
    """The number that a variance subtracts from the number of positions; 1 by default."""
    correction = get_argument(node, "correction")
    return int(get_argument(node, "unbiased", True)) if correction is None else int(correction)


@rule("aten.var", "aten.std", "aten.var_mean", "aten.std_mean", zero="drop")
def variance(ctx: RuleContext, node: fx.Node, x: Value, *_: object, **__: object) -> Results:
    """y = variance over d (and its mean). Its divisor is n − correction, so more positions than that must stay."""
    dim = get_argument(node, "dim")
    for d in normalize_all(dim, x.ndim):
        require_size(x.dims[d], read_correction(node) + 1)
    out = _reduce_over(ctx, node, x, dim, get_argument(node, "keepdim", False), "statistic")
    return [out, out] if isinstance(node.meta["val"], (tuple, list)) else out


@rule("aten.amax", "aten.amin", "aten.max.default", "aten.min.default", "aten.all", "aten.logsumexp", zero="drop")
def extremum(ctx: RuleContext, node: fx.Node, x: Value, dim: Dim = None, keepdim: bool = False, **_: object) -> Dims:
    """y = max over d (or min). For ``all``, −inf counts as true."""
    return _reduce_over(ctx, node, x, dim, keepdim, "min" if name_base_op(node.target) in ("amin", "min") else "max")


@rule("aten.aminmax")
def aminmax(ctx: RuleContext, node: fx.Node, x: Value, *, dim: int | None = None, keepdim: bool = False) -> list[Dims]:
    """y = min and max over d: no number is neutral for both, so d cannot be cut."""
    return [_freeze_reduced(ctx, node, x, dim, keepdim, "both its smallest and its largest value count")] * 2


@rule("aten.prod")
def prod(ctx: RuleContext, node: fx.Node, x: Value, dim: Dim = None, keepdim: bool = False, **_: object) -> Dims:
    """y = Π_d x: a zero factor makes it zero, so d cannot be cut."""
    return _freeze_reduced(ctx, node, x, dim, keepdim, "multiplied over")


@rule(
    *("aten.softmax", "aten._softmax"),
    zero=lambda node, zero, facts: find_lone_axes(facts.dims(node), get_argument(node, "dim")),
)
def softmax(ctx: RuleContext, node: fx.Node, x: Value, dim: int, *_: object, **__: object) -> Dims:
    """y_d = x_d, normalised over d. A removed channel counts as −inf: its share is zero."""
    d = normalize(dim, x.ndim)
    ctx.reduce(node, x.dims[d], "max")
    record_meeting(ctx, x.dims, [d])
    # Scores of an attention, [batch, heads, queries, keys]. Roles serve only names.
    if x.ndim > 3:
        for t in x.dims[1:d]:
            ctx.note_role(t, "head") if t is not x.dims[-2] else None
    return x.dims


@rule("aten.log_softmax", "aten._log_softmax")
def log_softmax(ctx: RuleContext, node: fx.Node, x: Value, dim: int, *_: object, **__: object) -> Dims:
    """y_d = x_d. A removed channel would be −inf, which later ops could not use, so d cannot be cut."""
    ctx.freeze(x.dims[dim], "log of a share of it", node)
    record_meeting(ctx, x.dims, [normalize(dim, x.ndim)])
    return x.dims


def _zero_of_norm(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """The last step is affine: zero if the weight and the bias are."""
    weight, bias = get_argument(node, "weight"), get_argument(node, "bias")
    return zero(weight) & zero(bias) if bias is not None else zero(weight)


def _resize_norm(resizer: Resizer, node: fx.Node) -> None:
    # The sizes of the last dimensions, as many as there were.
    dims = resizer.dims(node)
    shape = list(get_argument(node, "normalized_shape"))
    set_argument(node, "normalized_shape", [resizer.size(d) for d in dims[len(dims) - len(shape) :]])


@rule("aten.layer_norm", zero=_zero_of_norm, resize=_resize_norm)
def layer_norm(
    ctx: RuleContext, node: fx.Node, x: Value, shape: Sequence[int], *affine: object, **named: object
) -> Dims:
    """y = (x − mean) / √(var + eps) · weight + bias over the last dimensions."""
    _reduce_norm(ctx, node, x, len(shape), [*affine[:2], named.get("weight"), named.get("bias")], "statistic")
    return x.dims


def _reduce_norm(
    ctx: RuleContext, node: fx.Node, x: Value, count: int, affine: Iterable[object], kind: ReductionKind
) -> None:
    """A norm over the last ``count`` dimensions. Its weights have these dimensions."""
    first = x.ndim - count
    for value in affine:
        if isinstance(value, Value):
            for a, b in zip(value.dims, x.dims[first:], strict=True):
                ctx.unify(a, b, node)
    for d in x.dims[first:]:
        ctx.reduce(node, d, kind)
    record_meeting(ctx, x.dims, range(first, x.ndim))


def _zero_of_rms(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    weight = get_argument(node, "weight")
    return zero(node.args[0]) | (zero(weight) if weight is not None else set())


def _resize_rms(resizer: Resizer, node: fx.Node) -> None:
    """rms_norm(x; eps) over n channels = √(n/n') · rms_norm(x'; eps · n/n') over the n' that are not zero."""
    dims = resizer.dims(node)
    count = len(get_argument(node, "normalized_shape"))
    old = math.prod(d.size for d in dims[-count:])
    new = math.prod(resizer.size(d) for d in dims[-count:])
    _resize_norm(resizer, node)
    # The factor on x' is exact only with the epsilon changed, too; ``fold_norms`` later moves it into the weight.
    if old != new:
        eps = get_argument(node, "eps")
        eps = resizer.compute_epsilon(node) if eps is None else eps
        set_argument(node, "eps", eps * old / new)
        resizer.scale(node, math.sqrt(old / new))


@rule("aten.rms_norm", zero=_zero_of_rms, resize=_resize_rms)
def rms_norm(
    ctx: RuleContext, node: fx.Node, x: Value, shape: Sequence[int], weight: Value | None = None, *_: object
) -> Dims:
    """y = x / √(mean(x²) + eps) · weight over the last dimensions."""
    _reduce_norm(ctx, node, x, len(shape), [weight], "mean")
    return x.dims


@rule("aten.group_norm", zero=_zero_of_norm, resize=count_argument("num_groups"))
def group_norm(
    ctx: RuleContext, node: fx.Node, x: Value, groups: int, *affine: object, **kwargs: object
) -> Dims | Result:
    """Channels = groups · inner; statistics over inner and all further dimensions."""
    _tie_channels(ctx, node, x, (*affine[:2], kwargs.get("weight"), kwargs.get("bias")))
    # Statistics run over the channels of a group. Groups can be cut, and so can channels of each.
    parts = split_product(x.dims[1], groups, last=False, where=SourceLocation(node))
    if parts is None:
        ctx.freeze(x.dims[1], "group norm cuts across its units", node)
        return x.dims
    for t in (parts[1], *x.dims[2:]):
        ctx.reduce(node, t, "statistic")
    ctx.note_inner((x.dims[0], parts[0]))
    return Result(x.dims, Counted(parts[0]))


def _tie_channels(ctx: RuleContext, node: fx.Node, x: Value, affine: Sequence[object]) -> None:
    """Weights, biases and statistics have one number for each channel (dimension 1)."""
    for value in affine:
        if isinstance(value, Value):
            ctx.unify(value.dims[0], x.dims[1], node)


def _own_statistics(node: fx.Node) -> bool:
    """Whether a norm computes statistics of its input."""
    own = get_argument(node, "training", get_argument(node, "use_input_stats"))
    return bool(own) or get_argument(node, "running_mean") is None


def _zero_of_batch_norm(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """The last step is affine. Without bias, zero channels stay zero if the statistics are their own."""
    weight, bias = node.args[1], node.args[2]
    if bias is not None:
        return zero(weight) & zero(bias) if weight is not None else set()
    # Zeros have mean 0 and variance 0, so they stay 0 · rsqrt(eps). With saved statistics they become −mean/deviation.
    channels = collect_axes([facts.dims(node)[1]]) if _own_statistics(node) else set()
    return zero(node.args[0]) & channels | (zero(weight) if weight is not None else set())


@rule("aten.batch_norm", "aten.instance_norm", zero=_zero_of_batch_norm)
def batch_norm(ctx: RuleContext, node: fx.Node, x: Value, *args: object, **_: object) -> Dims:
    """Per channel (dimension 1), with given statistics or the input's own over all other dimensions."""
    _tie_channels(ctx, node, x, args[:4])
    # A batch norm leaves masked positions out (``masked_reference.py``). An instance norm keeps all its positions.
    own = _own_statistics(node)
    if own and name_op(node).startswith("aten.instance_norm"):
        for d in x.dims[2:]:
            ctx.freeze(d, "statistics are taken over it", node)
    elif own:
        for d in (x.dims[0], *x.dims[2:]):
            ctx.reduce(node, d, "statistic")
    ctx.note_inner(x.dims[1:2] if own else x.dims)
    return x.dims


@rule("aten._weight_norm", zero="keep")
def weight_norm(ctx: RuleContext, node: fx.Node, v: Value, g: Value, dim: int = 0) -> Dims:
    """y_d = g_d · v_d / ‖v_d‖, the norm over all other dimensions (over all, if d is −1).

    Zero if v is, also along d: a removed row has no norm and counts as zero (``masked_reference.py``).
    """
    # The norm runs over the dimensions that g lacks. Along the remaining ones a removed row is 0/0, which the masked
    # reference sets to 0.
    align(ctx, node, g.dims, v.dims)
    others = [i for i in range(v.ndim) if g.ndim != v.ndim or g.dims[i].size != v.dims[i].size]
    for i, t in enumerate(v.dims):
        ctx.reduce(node, t, "sum" if i in others else "statistic")
    record_meeting(ctx, v.dims, others)
    return v.dims


def _zero_of_cosine(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """Zero along the remaining dimensions if an operand is."""
    x, y = (a for a in node.args[:2] if isinstance(a, fx.Node))
    ndim = len(resolve_result_shape(node)) + 1
    reduced = normalize(get_argument(node, "dim", 1), ndim) - ndim
    return zero_of_kept(facts, zero, x, reduced) | zero_of_kept(facts, zero, y, reduced)


@rule("aten.cosine_similarity", zero=_zero_of_cosine)
def cosine_similarity(
    ctx: RuleContext, node: fx.Node, x: Value, y: Value, dim: int = 1, *_: object, **__: object
) -> Dims:
    """y = Σ_d x y / (‖x‖ ‖y‖): both must be zero at removed positions of d."""
    # An operand that is repeated along d has one number for all its positions, so no position of it can be removed.
    both = broadcast(ctx, node, x, y)
    d = normalize(dim, len(both))
    for value in (x, y):
        if value.ndim < len(both) - d or value.dims[d - len(both)].size != both[d].size:
            ctx.freeze(both[d], "one operand is repeated along it", node)
        ctx.reduce(node, both[d], "sum", value.node)
    return (*both[:d], *both[d + 1 :])


@rule("aten.native_layer_norm")
def native_layer_norm(ctx: RuleContext, node: fx.Node, x: Value, shape: Sequence[int], *affine: object) -> list[Dims]:
    """y = (x − mean) / deviation over the last dimensions, which cannot be cut; also returns mean and 1/deviation."""
    first = x.ndim - len(shape)
    for value in (x, *(a for a in affine if isinstance(a, Value))):
        for d in value.dims[value.ndim - len(shape) :]:
            ctx.freeze(d, "a statistic over it is a result of its own", node)
    record_meeting(ctx, x.dims, range(first, x.ndim))
    return [x.dims, *[(*x.dims[:first], *[ONE] * len(shape))] * 2]
