"""Convolutions, pooling and resampling: channels are axes, positions in space are not cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import fx

from mptk.ir.axes import Term, axis, product
from mptk.ir.ops import argument, named_argument, set_argument
from passes.analysis.rules.table import Dims, Value, meet, rule, zero_of_first

if TYPE_CHECKING:
    from passes.analysis.propagate import Walk
    from passes.transforms.rewrite import Resizer


def _space(w: Walk, node: fx.Node, x: Value, first: int) -> Dims:
    """Freeze the operand's spatial dimensions and make the result's (of several results, those of the first)."""
    result = node.meta["val"]
    for d in x.dims[first:]:
        w.freeze(d, "positions in space", node)
    shape = w.sizes(result[0] if isinstance(result, (tuple, list)) else result)
    return tuple(w.frozen(size, "positions in space", node) for size in shape[first:])


def _zero_of_convolution(node: fx.Node, zero: Any, w: Walk) -> Any:
    """Zero along groups and batches where x is, along the result's channels where W is; a bias must be zero too."""
    x, weight, bias = cast("tuple[fx.Node, fx.Node, Any]", (*node.args[:2], argument(node, 2, "bias")))
    dims, kernel = w.dims.get(x, ()), w.dims.get(weight, ())
    batch = dims[: max(0, len(dims) - len(w.shape(weight)) + 1)]
    kept = {leaf for t in (*batch, w.notes[node]) for leaf in w.leaves_of(t)}
    found = (zero(x) & kept) | (zero(weight) & {leaf for t in kernel[:1] for leaf in w.leaves_of(t)})
    return found & zero(bias) if bias is not None else found


def _resize_groups(position: int) -> Any:
    def resize(r: Resizer, node: fx.Node) -> None:
        if r.changed(r.note(node)):
            set_argument(node, position, "groups", r.size(r.note(node)))

    return resize


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", zero=_zero_of_convolution, resize=_resize_groups(6))
def conv(w: Walk, node: fx.Node, x: Value, weight: Value, bias: Value | None = None, *_: Any, **__: Any) -> Dims:
    """y[n, g·o, …] = Σ_{c, k} x[n, g·c, …+k] W[g·o, c, k]: x_1 = g · c, W_0 = y_1 = g · o, W_1 = c."""
    g = w.notes[node] = axis(named_argument(node, "groups", 1))
    inner = axis(weight.dims[1].size)
    channel = x.ndim - (weight.ndim - 1)
    w.unify(x.dims[channel], product((g, inner)), node)
    w.unify(weight.dims[0], product((g, axis(weight.dims[0].size // g.size))), node)
    out = (*x.dims[:channel], weight.dims[0], *_space(w, node, x, channel + 1))
    _kernel(w, node, weight, bias, weight.dims[0])
    w.contract(node, Value(x.node, (*x.dims[:channel], inner)), channel, weight, 1, out)
    return out


@rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d", resize=_resize_groups(6))
def conv_transpose(
    w: Walk, node: fx.Node, x: Value, weight: Value, bias: Value | None = None, *_: Any, **__: Any
) -> Dims:
    """x_1 = W_0 = g · c, y_1 = g · W_1."""
    g = w.notes[node] = axis(named_argument(node, "groups", 1))
    w.unify(weight.dims[0], product((g, axis(weight.dims[0].size // g.size))), node)
    w.unify(x.dims[1], weight.dims[0], node)
    channels = product((g, weight.dims[1]))
    _kernel(w, node, weight, bias, channels)
    out = (x.dims[0], channels, *_space(w, node, x, 2))
    w.contract(node, x, 1, weight, 0, out)
    return out


def _kernel(w: Walk, node: fx.Node, weight: Value, bias: Value | None, channels: Term) -> None:
    """Freeze the kernel's positions; the bias is one number for each of the result's ``channels``."""
    for d in weight.dims[2:]:
        w.freeze(d, "positions of a kernel", node)
    if bias is not None:
        w.unify(bias.dims[0], channels, node)


SPATIAL = {"1d": 1, "2d": 2, "3d": 3}


def _pooled(w: Walk, node: fx.Node, x: Value) -> Dims:
    first = x.ndim - next(n for name, n in SPATIAL.items() if name in str(node.target))
    meet(w, x.dims, range(first, x.ndim))
    return (*x.dims[:first], *_space(w, node, x, first))


@rule(
    *(f"aten.{name}_pool{n}" for name in ("max", "avg", "adaptive_avg") for n in SPATIAL),
    *(f"aten.{name}{n}" for name in ("upsample_nearest", "_upsample_nearest_exact") for n in SPATIAL),
    *("aten.upsample_linear1d", "aten.upsample_bilinear2d", "aten.upsample_trilinear3d", "aten.upsample_bicubic2d"),
    *("aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa"),
    zero="keep",
)
def pool(w: Walk, node: fx.Node, x: Value, *_: Any, **__: Any) -> Dims:
    """Channels pass, positions in space change."""
    return _pooled(w, node, x)


@rule(
    *(f"aten.max_pool{n}_with_indices" for n in SPATIAL),
    *(f"aten.adaptive_max_pool{n}" for n in SPATIAL),
    zero=zero_of_first,
)
def pool_with_positions(w: Walk, node: fx.Node, x: Value, *_: Any, **__: Any) -> list[Dims]:
    """Channels pass, positions in space change; the second result holds where the largest were."""
    return [_pooled(w, node, x)] * 2


@rule("aten.pixel_shuffle", zero="move")
def pixel_shuffle(w: Walk, node: fx.Node, x: Value, factor: int) -> Dims:
    """x = C · r · r', H, W: y = C, H · r, W · r'."""
    channels, *pixels = (axis(x.dims[-3].size // factor**2), *_pixels(w, node, factor))
    w.unify(x.dims[-3], product((channels, *pixels)), node)
    return (*x.dims[:-3], channels, *(product(pair) for pair in zip(x.dims[-2:], pixels, strict=True)))


@rule("aten.pixel_unshuffle", zero="move")
def pixel_unshuffle(w: Walk, node: fx.Node, x: Value, factor: int) -> Dims:
    """x = C, H · r, W · r': y = C · r · r', H, W."""
    pixels = _pixels(w, node, factor)
    space = [axis(d.size // factor) for d in x.dims[-2:]]
    for d, pair in zip(x.dims[-2:], zip(space, pixels, strict=True), strict=True):
        w.unify(d, product(pair), node)
    return (*x.dims[:-3], product((x.dims[-3], *pixels)), *space)


def _pixels(w: Walk, node: fx.Node, factor: int) -> list[Term]:
    return [w.frozen(factor, "pixels of one position", node) for _ in range(2)]


def _resize_shuffle(r: Resizer, node: fx.Node) -> None:
    if r.changed(r.note(node)):
        set_argument(node, 1, "groups", r.size(r.note(node)))


@rule("aten.channel_shuffle", "aten.native_channel_shuffle", zero="move", resize=_resize_shuffle)
def channel_shuffle(w: Walk, node: fx.Node, x: Value, groups: int) -> Dims:
    """x_1 = g · c: y_1 = c · g."""
    g, inner = axis(groups), axis(x.dims[1].size // groups)
    w.notes[node] = g
    w.unify(x.dims[1], product((g, inner)), node)
    return (x.dims[0], product((inner, g)), *x.dims[2:])
