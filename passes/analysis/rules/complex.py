"""Complex numbers as pairs of real ones (rotary embeddings): the pair cannot be cut, all other dimensions pass."""

from __future__ import annotations

from torch import fx

from mptk.ir.axes import ONE, concat
from mptk.ir.axis_facts import Dims
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.pointwise import broadcast
from passes.analysis.rules.resizer import Resizer
from passes.analysis.rules.table import rule


def _resize_view(resizer: Resizer, node: fx.Node) -> None:
    """The op needs even strides, so an operand sliced to an odd width is copied first."""
    node.update_arg(0, resizer.copy(node, node.all_input_nodes[0]))


@rule("aten.view_as_complex", zero="keep", positions="carry", resize=_resize_view)
def view_as_complex(ctx: RuleContext, node: fx.Node, x: Value) -> Dims:
    """x_last = 1 + 1 (real, imaginary); the others pass."""
    ctx.unify(x.dims[-1], concat((ONE, ONE)), node)
    return x.dims[:-1]


@rule("aten.view_as_real", zero="keep", positions="carry")
def view_as_real(ctx: RuleContext, node: fx.Node, x: Value) -> Dims:
    """y = x · (1 + 1)."""
    return (*x.dims, concat((ONE, ONE)))


@rule("aten.real", "aten.imag", "aten.conj", "aten._conj", "aten.angle", zero="keep")
def part(ctx: RuleContext, node: fx.Node, x: Value) -> Dims:
    """y_d = x_d."""
    return x.dims


@rule("aten.complex", zero="all")
@rule("aten.polar", zero=lambda node, zero, facts: zero(node.args[0]))
def complex_(ctx: RuleContext, node: fx.Node, *args: object, **_: object) -> Dims:
    """y_d = a_d = b_d."""
    return broadcast(ctx, node, *args)
