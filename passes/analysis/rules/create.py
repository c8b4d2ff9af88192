"""Ops that fill tensors: their axes are fresh, or those of the tensor that gives the shape."""

from __future__ import annotations

from torch import fx

from mptk.ir.axes import Axis, axes_in, axis
from mptk.ir.axis_facts import AxisFacts, Dims
from mptk.ir.sizes import result_shape
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.pointwise import broadcast
from passes.analysis.rules.resizer import shape_argument
from passes.analysis.rules.table import ZeroOf, rule


def _every(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    return axes_in(facts.dims(node))


@rule("aten.zeros_like", zero=_every)
@rule("aten.ones_like", "aten.full_like", "aten.empty_like", "aten.rand_like", "aten.randn_like")
def like(ctx: RuleContext, node: fx.Node, x: Value, *_: object, **__: object) -> Dims:
    """y_d = x_d."""
    return x.dims


@rule("aten.new_zeros", zero=_every, resize=shape_argument())
@rule("aten.new_ones", "aten.new_full", "aten.new_empty", resize=shape_argument())
@rule("aten.zeros", zero=_every, resize=shape_argument())
@rule("aten.ones", "aten.full", "aten.empty", resize=shape_argument())
def fresh(ctx: RuleContext, node: fx.Node, *_: object, **__: object) -> Dims:
    """Fresh axes of the given sizes."""
    return tuple(axis(size) for size in result_shape(node))


@rule(
    "aten.fill",
    "aten.fill_",
    "aten.zero_",
    "aten.bernoulli",
    "aten.bernoulli_",
    "aten.normal_",
    "aten.uniform_",
)
def fill(ctx: RuleContext, node: fx.Node, x: Value, *others: object, **keywords: object) -> Dims:
    """y_d = x_d = p_d (probabilities may broadcast)."""
    broadcast(ctx, node, x, *others, **keywords)
    return x.dims
