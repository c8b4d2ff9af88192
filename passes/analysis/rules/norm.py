"""Norms of weights, and ops that divide by a norm of their operands."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mptk.ir.axes import ONE, Axis
from mptk.ir.axis_facts import AxisFacts, Dims
from mptk.ir.ops import named_argument
from mptk.ir.sizes import result_shape
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.contract import zero_of_kept
from passes.analysis.rules.pointwise import broadcast
from passes.analysis.rules.table import ZeroOf, align, meet, normalize, rule


def _zero_of_weight_norm(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """Zero if v is, also along d: a removed row has no norm and counts as zero (``masked_reference.py``)."""
    return zero(node.args[0])


@rule("aten._weight_norm", zero=_zero_of_weight_norm)
def weight_norm(ctx: RuleContext, node: fx.Node, v: Value, g: Value, dim: int = 0) -> Dims:
    """y_d = g_d · v_d / ‖v_d‖, the norm over all other dimensions (over all, if d is −1)."""
    align(ctx, node, g.dims, v.dims)
    others = [i for i in range(v.ndim) if g.ndim != v.ndim or g.dims[i].size != v.dims[i].size]
    for i, t in enumerate(v.dims):
        ctx.reduce(node, t, "sum" if i in others else "statistic")
    meet(ctx, v.dims, others)
    return v.dims


def _zero_of_cosine(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """Zero along the remaining dimensions if an operand is."""
    x, y = (a for a in node.args[:2] if isinstance(a, fx.Node))
    ndim = len(result_shape(node)) + 1
    reduced = normalize(named_argument(node, "dim", 1), ndim) - ndim
    return zero_of_kept(facts, zero, x, reduced) | zero_of_kept(facts, zero, y, reduced)


@rule("aten.cosine_similarity", zero=_zero_of_cosine)
def cosine_similarity(
    ctx: RuleContext, node: fx.Node, x: Value, y: Value, dim: int = 1, *_: object, **__: object
) -> Dims:
    """y = Σ_d x y / (‖x‖ ‖y‖): both must be zero at removed positions of d."""
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
    meet(ctx, x.dims, range(first, x.ndim))
    return [x.dims, *[(*x.dims[:first], *[ONE] * len(shape))] * 2]
