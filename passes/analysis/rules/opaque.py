"""Ops whose result mixes all axes of its operands. No axis of either side can be cut; the reason is recorded.

This is the rule of last resort: it is always sound, but families are lost. An op that is not in the table is an error.
No op is opaque by default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, fx

from mptk.ir import Dims, Results, resolve_shape
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.table import rule

# Each of these depends on the order of positions, on all of them at once, or on numbers that only a run gives. Some
# could have a rule of their own for the dimensions that they keep.
OPAQUE = (
    *("aten.stft", "aten.istft", "aten.cross_entropy_loss", "aten._unique2", "aten.linalg_cholesky"),
    *("aten.grid_sampler", "aten.linalg_inv", "aten.linalg_solve", "aten.linalg_svd", "aten.linalg_qr"),
    *("aten.linalg_eigh", "aten.cross", "aten.linalg_cross", "aten.trace", "aten.nonzero", "aten.masked_select"),
    *("aten.bincount", "aten.searchsorted", "aten.bucketize", "aten.kron", "aten.tensordot"),
    *("aten.linalg_householder_product", "aten.linalg_multi_dot", "aten.matrix_exp", "aten.linalg_matrix_exp"),
    *("aten.det", "aten.linalg_det", "aten.pinverse", "aten.linalg_pinv"),
    *("aten.as_strided", "aten.diagflat", "aten.diagonal_scatter", "aten.repeat_interleave.Tensor", "aten.take"),
    *("aten.median.default", "aten.nanmedian.default", "aten.max_unpool2d", "aten._weight_norm_interface"),
    *("aten.native_group_norm", "aten.native_batch_norm", "aten._native_batch_norm_legit_no_training"),
)


@rule(*OPAQUE)
def opaque(ctx: RuleContext, node: fx.Node, *args: object, **kwargs: object) -> Results:
    """No axis can be followed: the operands' axes are frozen, and so are the result's fresh ones."""
    for value in _list_values([*args, *kwargs.values()]):
        for d in value.dims:
            ctx.freeze(d, "mixed by an op that keeps no axes apart", node)
    results = node.meta["val"]
    if not isinstance(results, (list, tuple)):
        return _make_frozen_dims(ctx, node, results)
    return [_make_frozen_dims(ctx, node, result) if isinstance(result, Tensor) else None for result in results]


def _make_frozen_dims(ctx: RuleContext, node: fx.Node, result: Tensor) -> Dims:
    return tuple(
        ctx.make_frozen(size, "made by an op that keeps no axes apart", node) for size in resolve_shape(result)
    )


def _list_values(arguments: Iterable[object]) -> Iterator[Value]:
    for a in arguments:
        if isinstance(a, Value):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _list_values(a)
