"""Convolutions, pooling and resampling: channels are axes, positions in space are not cut."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from mptk.ir import (
    Axis,
    AxisFacts,
    Dims,
    Term,
    collect_axes,
    get_argument,
    make_axis,
    make_product,
    resolve_result_shape,
    resolve_shape,
)
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.resizer import Counted, count_argument
from passes.analysis.rules.table import Result, ZeroOf, record_meeting, rule, zero_of_first


def _freeze_space(ctx: RuleContext, node: fx.Node, x: Value, first: int) -> Dims:
    """Freeze the operand's spatial dimensions and make the (first) result's."""
    result = node.meta["val"]
    for d in x.dims[first:]:
        ctx.freeze(d, "positions in space", node)
    shape = resolve_shape(result[0] if isinstance(result, (tuple, list)) else result)
    return tuple(ctx.make_frozen(size, "positions in space", node) for size in shape[first:])


def _zero_of_convolution(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """Zero along groups and batches if x is, along the result's channels if W is. A bias must be zero, too."""
    x, weight, bias = (get_argument(node, name) for name in ("input", "weight", "bias"))
    dims, kernel, groups = facts.dims(x), facts.dims(weight), facts.note(node, Counted)
    assert groups is not None
    batch = dims[: max(0, len(dims) - len(resolve_result_shape(weight)) + 1)]
    kept = collect_axes((*batch, groups.term))
    found = (zero(x) & kept) | (zero(weight) & collect_axes(kernel[:1]))
    return found & zero(bias) if bias is not None else found


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", zero=_zero_of_convolution, resize=count_argument("groups"))
def conv(
    ctx: RuleContext, node: fx.Node, x: Value, weight: Value, bias: Value | None = None, *_: object, **__: object
) -> Result:
    """y[n, g·o, …] = Σ_{c, k} x[n, g·c, …+k] W[g·o, c, k]: x_1 = g · c, W_0 = y_1 = g · o, W_1 = c."""
    # Channels are groups · channels of a group. The kernel's second dimension is one group's channels, which are summed
    # over.
    g = make_axis(get_argument(node, "groups", 1))
    inner = make_axis(weight.dims[1].size)
    channel = x.ndim - (weight.ndim - 1)  # counted from the end: there may be no batch dimension
    ctx.unify(x.dims[channel], make_product((g, inner)), node)
    ctx.unify(weight.dims[0], make_product((g, make_axis(weight.dims[0].size // g.size))), node)
    out = (*x.dims[:channel], weight.dims[0], *_freeze_space(ctx, node, x, channel + 1))
    _freeze_kernel(ctx, node, weight, bias, weight.dims[0])
    ctx.contract(node, Value(x.node, (*x.dims[:channel], inner)), channel, weight, 1, out)
    _name_channels(ctx, weight, depthwise=weight.dims[1].size == 1)
    return Result(out, Counted(g))


@rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d", resize=count_argument("groups"))
def conv_transpose(
    ctx: RuleContext, node: fx.Node, x: Value, weight: Value, bias: Value | None = None, *_: object, **__: object
) -> Result:
    """x_1 = W_0 = g · c, y_1 = g · W_1."""
    g = make_axis(get_argument(node, "groups", 1))
    channel = x.ndim - (weight.ndim - 1)
    ctx.unify(weight.dims[0], make_product((g, make_axis(weight.dims[0].size // g.size))), node)
    ctx.unify(x.dims[channel], weight.dims[0], node)
    channels = make_product((g, weight.dims[1]))
    _freeze_kernel(ctx, node, weight, bias, channels)
    out = (*x.dims[:channel], channels, *_freeze_space(ctx, node, x, channel + 1))
    ctx.contract(node, x, channel, weight, 0, out)
    _name_channels(ctx, weight)
    return Result(out, Counted(g))


def _name_channels(ctx: RuleContext, weight: Value, *, depthwise: bool = False) -> None:
    """Note channels of a convolution. One of width 1 over a sequence is a linear layer, so it keeps that name."""
    if not depthwise and (weight.ndim > 3 or weight.dims[2].size > 1):
        for d in weight.dims[:2]:
            ctx.note_role(d, "convolution")


def _freeze_kernel(ctx: RuleContext, node: fx.Node, weight: Value, bias: Value | None, channels: Term) -> None:
    """Freeze the kernel's positions. The bias has one number for each of the result's ``channels``."""
    for d in weight.dims[2:]:
        ctx.freeze(d, "positions of a kernel", node)
    if bias is not None:
        ctx.unify(bias.dims[0], channels, node)


SPATIAL = {"1d": 1, "2d": 2, "3d": 3}
"""Part of an op's name → the number of its dimensions in space."""


def _pool_dims(ctx: RuleContext, node: fx.Node, x: Value) -> Dims:
    # Pooling combines neighbours, so the choice of channels must not vary by position.
    first = x.ndim - next(n for name, n in SPATIAL.items() if name in str(node.target))
    record_meeting(ctx, x.dims, range(first, x.ndim))
    return (*x.dims[:first], *_freeze_space(ctx, node, x, first))


@rule(
    *(f"aten.{name}_pool{n}" for name in ("max", "avg", "adaptive_avg") for n in SPATIAL),
    *(f"aten.{name}{n}" for name in ("upsample_nearest", "_upsample_nearest_exact") for n in SPATIAL),
    *("aten.upsample_linear1d", "aten.upsample_bilinear2d", "aten.upsample_trilinear3d", "aten.upsample_bicubic2d"),
    *("aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa"),
    zero="keep",
)
def pool(ctx: RuleContext, node: fx.Node, x: Value, *_: object, **__: object) -> Dims:
    """Channels pass, positions in space change."""
    return _pool_dims(ctx, node, x)


@rule(
    *(f"aten.max_pool{n}_with_indices" for n in SPATIAL),
    *(f"aten.adaptive_max_pool{n}" for n in SPATIAL),
    zero=zero_of_first,
)
def pool_with_positions(ctx: RuleContext, node: fx.Node, x: Value, *_: object, **__: object) -> list[Dims]:
    """Channels pass, positions in space change; the second result holds the positions of the largest values."""
    return [_pool_dims(ctx, node, x)] * 2


@rule("aten.im2col", zero="keep")
def im2col(ctx: RuleContext, node: fx.Node, x: Value, kernel: Sequence[int], *_: object, **__: object) -> Dims:
    """x = C, H, W: y = C · k · k', windows."""
    record_meeting(ctx, x.dims, range(x.ndim - 2, x.ndim))
    pixels = [ctx.make_frozen(size, "positions of a kernel", node) for size in kernel]
    return (*x.dims[:-3], make_product((x.dims[-3], *pixels)), *_freeze_space(ctx, node, x, x.ndim - 2))


@rule("aten.col2im", zero="keep")
def col2im(
    ctx: RuleContext, node: fx.Node, x: Value, sizes: object, kernel: Sequence[int], *_: object, **__: object
) -> Dims:
    """x = C · k · k', windows: y = C, H, W, the sum of the windows."""
    record_meeting(ctx, x.dims, range(x.ndim - 1, x.ndim))
    channels = make_axis(x.dims[-2].size // math.prod(kernel))
    pixels = [ctx.make_frozen(size, "positions of a kernel", node) for size in kernel]
    ctx.unify(x.dims[-2], make_product((channels, *pixels)), node)
    return (*x.dims[:-2], channels, *_freeze_space(ctx, node, x, x.ndim - 1))


@rule("aten.pixel_shuffle", zero="keep", positions="carry")
def pixel_shuffle(ctx: RuleContext, node: fx.Node, x: Value, factor: int) -> Dims:
    """x = C · r · r', H, W: y = C, H · r, W · r'."""
    channels, *pixels = (make_axis(x.dims[-3].size // factor**2), *_make_pixel_axes(ctx, node, factor))
    ctx.unify(x.dims[-3], make_product((channels, *pixels)), node)
    return (*x.dims[:-3], channels, *(make_product(pair) for pair in zip(x.dims[-2:], pixels, strict=True)))


@rule("aten.pixel_unshuffle", zero="keep", positions="carry")
def pixel_unshuffle(ctx: RuleContext, node: fx.Node, x: Value, factor: int) -> Dims:
    """x = C, H · r, W · r': y = C · r · r', H, W."""
    pixels = _make_pixel_axes(ctx, node, factor)
    space = [make_axis(d.size // factor) for d in x.dims[-2:]]
    for d, pair in zip(x.dims[-2:], zip(space, pixels, strict=True), strict=True):
        ctx.unify(d, make_product(pair), node)
    return (*x.dims[:-3], make_product((x.dims[-3], *pixels)), *space)


def _make_pixel_axes(ctx: RuleContext, node: fx.Node, factor: int) -> list[Term]:
    return [ctx.make_frozen(factor, "pixels of one position", node) for _ in range(2)]


@rule(
    "aten.channel_shuffle",
    "aten.native_channel_shuffle",
    zero="keep",
    positions="carry",
    resize=count_argument("groups"),
)
def channel_shuffle(ctx: RuleContext, node: fx.Node, x: Value, groups: int) -> Result:
    """x_1 = g · c: y_1 = c · g."""
    g, inner = make_axis(groups), make_axis(x.dims[1].size // groups)
    ctx.unify(x.dims[1], make_product((g, inner)), node)
    return Result((x.dims[0], make_product((inner, g)), *x.dims[2:]), Counted(g))
