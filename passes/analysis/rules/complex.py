"""Complex numbers as pairs of real ones (rotary embeddings): the pair is enumerated, all other dimensions pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mptk.ir.axes import ONE, concat
from passes.analysis.rules.pointwise import broadcast
from passes.analysis.rules.table import Dims, Value, rule

if TYPE_CHECKING:
    from passes.analysis.propagate import Walk
    from passes.transforms.rewrite import Resizer


def _resize_view(r: Resizer, node: fx.Node) -> None:
    """The op wants strides that are even: what was sliced to an odd width is copied first."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    with r.graph.graph.inserting_before(node):
        copied = r.graph.graph.call_function(
            torch.ops.aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
        )
    node.update_arg(0, copied)


@rule("aten.view_as_complex", zero="move", resize=_resize_view)
def view_as_complex(w: Walk, node: fx.Node, x: Value) -> Dims:
    """x_last = 1 + 1 (real, imaginary); the others pass."""
    w.unify(x.dims[-1], concat((ONE, ONE)), node)
    return x.dims[:-1]


@rule("aten.view_as_real", zero="move")
def view_as_real(w: Walk, node: fx.Node, x: Value) -> Dims:
    """y = x · (1 + 1)."""
    return (*x.dims, concat((ONE, ONE)))


@rule("aten.real", "aten.imag", "aten.conj", "aten._conj", "aten.angle", zero="keep")
def part(w: Walk, node: fx.Node, x: Value) -> Dims:
    """y_d = x_d."""
    return x.dims


@rule("aten.complex", zero="all")
@rule("aten.polar", zero=lambda node, zero, w: zero(node.args[0]))
def complex_(w: Walk, node: fx.Node, *args: Any, **_: Any) -> Dims:
    """y_d = a_d = b_d."""
    return broadcast(w, node, *args)
