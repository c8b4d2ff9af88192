"""Convolutions, pooling and resampling: channels are axes, positions in space are not cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import fx

from mptk.axes import Term, axis, product
from passes.rules.table import Dims, Value, argument, named_argument, rule, set_argument

if TYPE_CHECKING:
    from passes.propagate import Walk
    from passes.rewrite import Resizer


def _space(w: Walk, node: fx.Node, x: Value, first: int) -> Dims:
    """Freeze the operand's spatial dimensions and make the result's."""
    for d in x.dims[first:]:
        w.freeze(d, "positions in space", node)
    return tuple(w.frozen(s, "positions in space", node) for s in w.shape(node)[first:])


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


@rule(
    "aten.max_pool1d",
    "aten.max_pool2d",
    "aten.avg_pool1d",
    "aten.avg_pool2d",
    "aten.adaptive_avg_pool1d",
    "aten.adaptive_avg_pool2d",
    "aten.upsample_nearest1d",
    "aten.upsample_nearest2d",
    "aten.upsample_bilinear2d",
    "aten.upsample_bicubic2d",
    zero="keep",
)
def pool(w: Walk, node: fx.Node, x: Value, *_: Any, **__: Any) -> Dims:
    """Channels pass, positions in space change."""
    spatial = 2 if "2d" in str(node.target) else 1
    first = x.ndim - spatial
    return (*x.dims[:first], *_space(w, node, x, first))
