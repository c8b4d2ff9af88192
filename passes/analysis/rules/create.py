"""Ops that fill tensors: their axes are fresh, or those of the tensor they imitate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from mptk.ir.axes import axis
from passes.analysis.rules.pointwise import broadcast
from passes.analysis.rules.shape import shape_argument
from passes.analysis.rules.table import Dims, Value, rule

if TYPE_CHECKING:
    from passes.analysis.propagate import Walk


def _every(node: fx.Node, zero: Any, w: Walk) -> Any:
    return {leaf for d in w.dims[node] for leaf in w.leaves_of(d)}


@rule("aten.zeros_like", zero=_every)
@rule("aten.ones_like", "aten.full_like", "aten.empty_like", "aten.rand_like", "aten.randn_like")
def like(w: Walk, node: fx.Node, x: Value, *_: Any, **__: Any) -> Dims:
    """y_d = x_d."""
    return x.dims


@rule("aten.new_zeros", zero=_every, resize=shape_argument(1))
@rule("aten.new_ones", "aten.new_full", "aten.new_empty", resize=shape_argument(1))
@rule("aten.zeros", zero=_every, resize=shape_argument(0))
@rule("aten.ones", "aten.full", "aten.empty", resize=shape_argument(0))
def fresh(w: Walk, node: fx.Node, *_: Any, **__: Any) -> Dims:
    """Fresh axes of the sizes asked for."""
    return tuple(axis(size) for size in w.shape(node))


@rule(
    "aten.fill",
    "aten.fill_",
    "aten.zero_",
    "aten.bernoulli",
    "aten.bernoulli_",
    "aten.normal_",
    "aten.uniform_",
)
def fill(w: Walk, node: fx.Node, x: Value, *others: Any, **keywords: Any) -> Dims:
    """y_d = x_d = p_d (probabilities may broadcast)."""
    broadcast(w, node, x, *others, **keywords)
    return x.dims
