"""Element-wise ops (dimensions of equal size are one axis, dimensions of 1 broadcast) and ops that fill tensors."""

from __future__ import annotations

from torch import fx

from mptk.ir import ONE, Axis, AxisFacts, Dims, Term, collect_axes, get_argument, make_axis, resolve_result_shape
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.resizer import shape_argument
from passes.analysis.rules.shape import cut_term
from passes.analysis.rules.table import Rule, ZeroOf, normalize, rule


def broadcast(ctx: RuleContext, node: fx.Node, *args: object, **kwargs: object) -> Dims:
    """y_d = x_d for every operand whose dimension is not 1."""
    values = [a for a in (*args, *kwargs.values()) if isinstance(a, Value)]
    ndim = max(v.ndim for v in values)
    out: list[Term] = [ONE] * ndim
    for v in values:
        # Dimensions are aligned from the last. A dimension of 1 has no axis to tie.
        for i, d in enumerate(v.dims, start=ndim - v.ndim):
            if d.size == 1:
                continue
            if out[i].size == d.size:
                ctx.unify(out[i], d, node)
            out[i] = d
    return tuple(out)


POINTWISE = Rule(broadcast)
"""For ops that torch tags as pointwise and that have no rule: axes are tied, and no zeros are claimed."""

KEEPING = (
    "neg relu relu_ relu6 gelu silu silu_ mish tanh sin abs sqrt square erf sign leaky_relu leaky_relu_ "
    "elu selu hardswish hardswish_ round floor trunc sinh expm1 log1p absolute negative nan_to_num "
    "hardshrink softshrink celu asinh atan tan relu6_ gelu_ tanh_ neg_"
)
"""Functions with f(0) = 0."""
rule(*(f"aten.{name}" for name in KEEPING.split()), zero="keep")(broadcast)
rule("aten.mul", "aten.mul_", "aten.multiply", "aten.__and__", "aten.logical_and", "aten.bitwise_and", zero="any")(
    broadcast
)


def _zero_of_sum(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """x + y is zero if both are. If a number other than 0 is added, nothing is zero."""
    other = node.args[1]
    if isinstance(other, (int, float)):
        return zero(node.args[0]) if other == 0 else set()
    return zero(node.args[0]) & zero(other)


rule("aten.add", "aten.add_", "aten.sub", "aten.sub_", "aten.subtract", zero=_zero_of_sum)(broadcast)
# max(0, 0) = 0, as with a sum.
rule("aten.maximum", "aten.minimum", "aten.logical_or", "aten.bitwise_or", "aten.__or__", zero="all")(broadcast)
# No zeros are claimed of these, although some would hold.
rule("aten.floor_divide", "aten.remainder", "aten.rsub", "aten.clamp_min", "aten.clamp_max", "aten.softplus")(broadcast)
# 0/0 is not 0.
rule(
    *("aten.div", "aten.div_", "aten.divide", "aten.true_divide", "aten.fmod"),
    zero=lambda node, zero, facts: zero(node.args[0]) - zero(node.args[1]),
)(broadcast)
rule(*("aten.where.Scalar", "aten.log_sigmoid", "aten.arctan2", "aten.special_expm1", "aten.isclose"))(broadcast)
rule(*("aten.greater", "aten.less", "aten.greater_equal", "aten.less_equal", "aten.not_equal"))(broadcast)
rule("aten.addcmul", zero=lambda node, zero, facts: zero(node.args[0]) & (zero(node.args[1]) | zero(node.args[2])))(
    broadcast
)
rule("aten.lerp", zero=lambda node, zero, facts: zero(node.args[0]) & zero(node.args[1]))(broadcast)


def _zero_of_power(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    exponent = node.args[1]
    return zero(node.args[0]) if isinstance(exponent, (int, float)) and exponent > 0 else set()


rule("aten.pow", "aten.pow_", zero=_zero_of_power)(broadcast)


def zero_of_clamp(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """Clamping keeps zeros if its bounds are numbers with 0 between them."""
    low, high = get_argument(node, "min"), get_argument(node, "max")
    keeps = all(b is None or isinstance(b, (int, float)) for b in (low, high))
    keeps = keeps and (low is None or low <= 0) and (high is None or high >= 0)
    return zero(node.args[0]) if keeps else set()


def _zero_of_hardtanh(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    low, high = get_argument(node, "min_val", -1), get_argument(node, "max_val", 1)
    return zero(node.args[0]) if low <= 0 <= high else set()


rule("aten.hardtanh", "aten.hardtanh_", zero=_zero_of_hardtanh)(broadcast)
rule("aten.where.self", zero=lambda node, zero, facts: zero(node.args[1]) & zero(node.args[2]))(broadcast)
rule("aten.where.ScalarSelf", zero=lambda node, zero, facts: zero(node.args[2]) if node.args[1] == 0 else set())(
    broadcast
)
rule("aten.where.ScalarOther", zero=lambda node, zero, facts: zero(node.args[1]) if node.args[2] == 0 else set())(
    broadcast
)


@rule(
    *("aten.masked_fill", "aten.masked_fill_"),
    zero=lambda node, zero, facts: zero(node.args[0]) if node.args[2] == 0 else set(),
)
def masked_fill(ctx: RuleContext, node: fx.Node, x: Value, mask: Value, value: object) -> Dims:
    """y_d = x_d = mask_d (the mask may broadcast)."""
    return broadcast(ctx, node, x, mask)


@rule("aten.copy", "aten.copy_", zero=lambda node, zero, facts: zero(node.args[1]))
def copy(ctx: RuleContext, node: fx.Node, x: Value, source: Value, *_: object) -> Dims:
    """y = source, in the shape of x."""
    broadcast(ctx, node, x, source)
    return x.dims


@rule("aten.glu", zero="keep")
def glu(ctx: RuleContext, node: fx.Node, x: Value, dim: int = -1) -> Dims:
    """x_d = A + A: y = x_A · σ(x_A'). Both halves are one axis; zero if the first is."""
    d = normalize(dim, x.ndim)
    half = x.dims[d].size // 2
    first, second = cut_term(ctx, node, x.dims[d], [half, half])
    ctx.unify(first, second, node)
    return (*x.dims[:d], first, *x.dims[d + 1 :])


def _zero_of_fake_quantize(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """The grid holds 0 if its place is a number, which torch checks; a tensor it does not."""
    return zero(node.args[0]) if isinstance(node.args[2], int) else set()


rule("aten.fake_quantize_per_tensor_affine", zero=_zero_of_fake_quantize)(broadcast)


@rule("aten.pairwise_distance")
def pairwise_distance(
    ctx: RuleContext, node: fx.Node, x: Value, y: Value, p: float = 2, eps: float = 1e-6, keepdim: bool = False
) -> Dims:
    """z = ‖x − y + eps‖ over the last dimension, which cannot be cut, as eps counts for each of its positions."""
    # ‖x − y + eps‖ of zeros is eps · √n, which changes with n.
    *out, last = broadcast(ctx, node, x, y)
    ctx.freeze(last, "a number is added before its norm", node)
    return (*out, ONE) if keepdim else tuple(out)


rule("aten._prelu_kernel", zero="keep")(broadcast)


@rule("aten.prelu", zero="keep")
def prelu(ctx: RuleContext, node: fx.Node, x: Value, weight: Value) -> Dims:
    """y_d = x_d; one slope for each channel (dimension 1), or one for all."""
    if weight.ndim and weight.dims[0].size > 1:
        ctx.unify(weight.dims[0], x.dims[1], node)
    return x.dims


def _list_all_axes(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    return collect_axes(facts.dims(node))


@rule("aten.zeros_like", zero=_list_all_axes)
@rule("aten.ones_like", "aten.full_like", "aten.empty_like", "aten.rand_like", "aten.randn_like")
def like(ctx: RuleContext, node: fx.Node, x: Value, *_: object, **__: object) -> Dims:
    """y_d = x_d."""
    return x.dims


@rule("aten.new_zeros", zero=_list_all_axes, resize=shape_argument())
@rule("aten.new_ones", "aten.new_full", "aten.new_empty", resize=shape_argument())
@rule("aten.zeros", zero=_list_all_axes, resize=shape_argument())
@rule("aten.ones", "aten.full", "aten.empty", resize=shape_argument())
def fresh(ctx: RuleContext, node: fx.Node, *_: object, **__: object) -> Dims:
    """Fresh axes of the given sizes."""
    return tuple(make_axis(size) for size in resolve_result_shape(node))


@rule("aten.fill", "aten.fill_", "aten.zero_", "aten.bernoulli", "aten.bernoulli_", "aten.normal_", "aten.uniform_")
def fill(ctx: RuleContext, node: fx.Node, x: Value, *others: object, **keywords: object) -> Dims:
    """y_d = x_d = p_d (probabilities may broadcast)."""
    broadcast(ctx, node, x, *others, **keywords)
    return x.dims
