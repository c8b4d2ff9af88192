"""Element-wise ops: dimensions of equal size are the same axis, dimensions of 1 broadcast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from mptk.ir.axes import ONE, Axis
from mptk.ir.ops import argument
from passes.analysis.rules.table import Dims, Rule, Value, rule

if TYPE_CHECKING:
    from passes.analysis.propagate import Walk


def broadcast(w: Walk, node: fx.Node, *args: Any, **kwargs: Any) -> Dims:
    """y_d = x_d for every operand whose dimension is not 1."""
    values = [a for a in (*args, *kwargs.values()) if isinstance(a, Value)]
    ndim = max(v.ndim for v in values)
    out = [ONE] * ndim
    for v in values:
        for i, d in enumerate(v.dims, start=ndim - v.ndim):
            if d.size == 1:
                continue
            if out[i].size == d.size:
                w.unify(out[i], d, node)
            out[i] = d  # type: ignore[assignment]
    return tuple(out)


POINTWISE = Rule(broadcast)

rule(
    "aten.neg",
    "aten.relu",
    "aten.relu_",
    "aten.relu6",
    "aten.gelu",
    "aten.silu",
    "aten.silu_",
    "aten.mish",
    "aten.tanh",
    "aten.sin",
    "aten.abs",
    "aten.sqrt",
    "aten.square",
    "aten.erf",
    "aten.sign",
    "aten.leaky_relu",
    "aten.leaky_relu_",
    "aten.elu",
    "aten.selu",
    "aten.hardswish",
    "aten.hardswish_",
    "aten.round",
    "aten.floor",
    "aten.trunc",
    "aten.sinh",
    "aten.expm1",
    "aten.log1p",
    "aten.absolute",
    "aten.negative",
    "aten.nan_to_num",
    "aten.hardshrink",
    "aten.softshrink",
    "aten.celu",
    "aten.asinh",
    "aten.atan",
    "aten.tan",
    "aten.relu6_",
    "aten.gelu_",
    "aten.tanh_",
    "aten.neg_",
    zero="keep",
)(broadcast)
rule("aten.mul", "aten.mul_", "aten.multiply", "aten.__and__", "aten.logical_and", "aten.bitwise_and", zero="any")(
    broadcast
)


def _zero_of_sum(node: fx.Node, zero: Callable[[Any], set[Axis]], w: Walk) -> set[Axis]:
    """x + y is zero where both are; adding a number other than 0 leaves no zero."""
    other = node.args[1]
    if isinstance(other, (int, float)):
        return zero(node.args[0]) if other == 0 else set()
    return zero(node.args[0]) & zero(other)


rule("aten.add", "aten.add_", "aten.sub", "aten.sub_", "aten.subtract", zero=_zero_of_sum)(broadcast)
rule("aten.maximum", "aten.minimum", "aten.logical_or", "aten.bitwise_or", "aten.__or__", zero="all")(broadcast)
rule("aten.floor_divide", "aten.remainder", "aten.rsub", "aten.clamp_min", "aten.clamp_max", "aten.softplus")(broadcast)
rule(
    "aten.div",
    "aten.div_",
    "aten.divide",
    "aten.true_divide",
    "aten.fmod",
    zero=lambda node, zero, w: zero(node.args[0]) - zero(node.args[1]),
)(broadcast)
rule(
    "aten.where.Scalar",
    "aten.log_sigmoid",
    "aten.greater",
    "aten.less",
    "aten.greater_equal",
    "aten.less_equal",
    "aten.not_equal",
    "aten.arctan2",
    "aten.special_expm1",
    "aten.isclose",
)(broadcast)
rule("aten.addcmul", zero=lambda node, zero, w: zero(node.args[0]) & (zero(node.args[1]) | zero(node.args[2])))(
    broadcast
)
rule("aten.lerp", zero=lambda node, zero, w: zero(node.args[0]) & zero(node.args[1]))(broadcast)


def _zero_of_power(node: fx.Node, zero: Callable[[Any], set[Axis]], w: Walk) -> set[Axis]:
    exponent = node.args[1]
    return zero(node.args[0]) if isinstance(exponent, (int, float)) and exponent > 0 else set()


rule("aten.pow", "aten.pow_", zero=_zero_of_power)(broadcast)


def zero_of_clamp(node: fx.Node, zero: Callable[[Any], set[Axis]], w: Walk) -> set[Axis]:
    """Clamping keeps zeros where its bounds are numbers with 0 between them."""
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    keeps = all(b is None or isinstance(b, (int, float)) for b in (low, high))
    keeps = keeps and (low is None or low <= 0) and (high is None or high >= 0)
    return zero(node.args[0]) if keeps else set()


def _zero_of_hardtanh(node: fx.Node, zero: Callable[[Any], set[Axis]], w: Walk) -> set[Axis]:
    low, high = argument(node, 1, "min_val", -1), argument(node, 2, "max_val", 1)
    return zero(node.args[0]) if low <= 0 <= high else set()


rule("aten.hardtanh", "aten.hardtanh_", zero=_zero_of_hardtanh)(broadcast)
rule("aten.where.self", zero=lambda node, zero, w: zero(node.args[1]) & zero(node.args[2]))(broadcast)
rule("aten.where.ScalarSelf", zero=lambda node, zero, w: zero(node.args[2]) if node.args[1] == 0 else set())(broadcast)
rule("aten.where.ScalarOther", zero=lambda node, zero, w: zero(node.args[1]) if node.args[2] == 0 else set())(broadcast)


def _zero_of_fill(node: fx.Node, zero: Callable[[Any], set[Axis]], w: Walk) -> set[Axis]:
    return zero(node.args[0]) if node.args[2] == 0 else set()


@rule("aten.masked_fill", "aten.masked_fill_", zero=_zero_of_fill)
def masked_fill(w: Walk, node: fx.Node, x: Value, mask: Value, value: Any) -> Dims:
    """y_d = x_d = mask_d (the mask may broadcast)."""
    return broadcast(w, node, x, mask)


@rule("aten.copy", "aten.copy_", zero=lambda node, zero, w: zero(node.args[1]))
def copy(w: Walk, node: fx.Node, x: Value, source: Value, *_: Any) -> Dims:
    """y = source, in the shape of x."""
    broadcast(w, node, x, source)
    return x.dims


@rule("aten.glu", zero="keep")
def glu(w: Walk, node: fx.Node, x: Value, dim: int = -1) -> Dims:
    """x_d = A + A: y = x_A · σ(x_A'), both halves are one axis; zero where the first is."""
    from passes.analysis.rules.shape import _split

    half = x.dims[dim].size // 2
    first, second = _split(w, node, x, [half, half], dim)
    w.unify(first[dim], second[dim], node)
    return first


rule("aten._prelu_kernel", zero="keep")(broadcast)


@rule("aten.prelu", zero="keep")
def prelu(w: Walk, node: fx.Node, x: Value, weight: Value) -> Dims:
    """y_d = x_d; one slope a channel (dimension 1), or one for all."""
    if weight.ndim and weight.dims[0].size > 1:
        w.unify(weight.dims[0], x.dims[1], node)
    return x.dims
