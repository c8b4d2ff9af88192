"""vmap: the calls that hide the samples of ``torch.vmap`` from the ops within it, and show them again."""

from __future__ import annotations

from torch import fx

from mptk.compat.torch import vmap_closes, vmap_opens
from mptk.ir.axis_facts import Dims
from mptk.ir.ops import target_name
from mptk.ir.sizes import result_shape
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.table import meet, normalize, rule

HIDDEN = "its positions are the samples of torch.vmap"


@rule(target_name(vmap_opens), zero="keep", positions="carry")
def opened(ctx: RuleContext, node: fx.Node, x: Value, dim: int, level: int) -> Dims:
    """y = x without d, which is hidden and cannot be cut; nor does a choice of other units vary along it."""
    d = normalize(dim, x.ndim)
    ctx.freeze(x.dims[d], HIDDEN, node)
    meet(ctx, x.dims, [d])
    return (*x.dims[:d], *x.dims[d + 1 :])


@rule(target_name(vmap_closes), zero="keep", positions="carry")
def closed(ctx: RuleContext, node: fx.Node, x: Value, level: int, size: int, dim: int) -> Dims:
    """y = x with the hidden dimension at d."""
    d = normalize(dim, x.ndim + 1)
    return (*x.dims[:d], ctx.frozen(result_shape(node)[d], HIDDEN, node), *x.dims[d:])
