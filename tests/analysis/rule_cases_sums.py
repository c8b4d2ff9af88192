"""Ops that sum: products, attention, convolutions, and reductions over the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rule_cases import Case, both, none
from torch import Tensor

aten = torch.ops.aten
BOTH = {"linear": (4, 6), "summed": (4, 6)}
MATRIX = {**BOTH, "shapes": [(6, 4)]}


def rows(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


PRODUCTS: dict[str, Case] = {
    "linear": Case(lambda x, w: F.linear(x, w), **BOTH, shapes=[(4, 6)]),
    "linear_bias": Case(lambda x, w, b: F.linear(x, w, b), **BOTH, shapes=[(4, 6), (4,)]),
    "linear_bias_exp": Case(lambda x, w, b: F.linear(x, w, b.exp()), (4, 6), (6,), shapes=[(4, 6), (4,)]),
    "linear_vector": Case(lambda x, w: F.linear(x, w).unsqueeze(-1), shapes=[(6,)]),
    "matmul": Case(lambda x, w: x @ w, **MATRIX),
    "matmul_vector": Case(lambda x, w: (x @ w).unsqueeze(-1), shapes=[(6,)]),
    "mm": Case(lambda x, w: torch.mm(rows(x), w).view(2, 5, 4), **MATRIX),
    "bmm": Case(lambda x, w: torch.bmm(x, w.expand(2, 6, 4)), **MATRIX),
    "mv": Case(lambda x, w: torch.mv(rows(x), w).view(2, 5, 1), shapes=[(6,)]),
    "dot": both(lambda x, v, w: x * torch.dot(v, w), (6, 8), shapes=[(8,), (8,)]),
    "addmm": Case(lambda x, w, b: torch.addmm(b, rows(x), w).view(2, 5, 4), **BOTH, shapes=[(6, 4), (4,)]),
    "addmm_exp": Case(
        lambda x, w, b: torch.addmm(b.exp(), rows(x), w).view(2, 5, 4), (4, 6), (6,), (6,), [(6, 4), (4,)]
    ),
    "baddbmm": Case(lambda x, w, b: torch.baddbmm(b, x, w.expand(2, 6, 4)), **BOTH, shapes=[(6, 4), (1, 1, 4)]),
    "einsum": Case(lambda x, w: torch.einsum("bsi,io->bso", x, w), **MATRIX),
    "einsum_implicit": Case(lambda x, w: torch.einsum("abi,io", x, w), **MATRIX),
    "einsum_ellipsis": Case(lambda x, w: torch.einsum("...i,oi->...o", x, w), **BOTH, shapes=[(4, 6)]),
    "einsum_three": Case(lambda x, v, w: torch.einsum("bsi,i,io->bso", x, v, w), **BOTH, shapes=[(6,), (6, 4)]),
    "einsum_sum": Case(lambda x: torch.einsum("bsi->bs", x).unsqueeze(-1)),
    "einsum_sum_exp": none(lambda x: torch.einsum("bsi->bs", x.exp()).unsqueeze(-1)),
    "einsum_outer": Case(lambda x: torch.einsum("bsi,bsj->bsij", x, x.exp()), summed=()),
    "einsum_outer_sum": none(lambda x: torch.einsum("bsi,bsj->bsi", x, x.exp())),
    "einsum_diagonal": Case(lambda x, w: x * torch.einsum("ii->i", w), shapes=[(6, 6)]),
    "einsum_scores": both(
        lambda x, y: torch.einsum("bqhd,bkhd->bhqk", x.view(2, 5, 3, 8), y.view(2, 5, 3, 8)).transpose(1, 2).flatten(2),
        (3, 8),
        (24, 24),
    ),
    "einsum_implicit_ellipsis": Case(lambda x, w: torch.einsum("...i,ij", x, w), **MATRIX),
    "einsum_implicit_order": both(
        lambda x, w: torch.einsum("b...z,Az", x, w).permute(0, 2, 1), (4, 6), shapes=[(4, 6)]
    ),
    "einsum_ellipsis_broadcast": Case(
        lambda x, w: torch.einsum("...i,...io->...o", x, w), **BOTH, shapes=[(1, 1, 6, 4)]
    ),
    "einsum_letter_broadcast": Case(lambda x, v: torch.einsum("bsi,i->bs", x, v).unsqueeze(-1), shapes=[(1,)]),
    "einsum_batch_diagonal": both(lambda x, w: x * torch.einsum("bii->bi", w).sum(0), (4, 6), shapes=[(4, 6, 6)]),
    "einsum_trace": both(lambda x, w: x * torch.einsum("aii->a", w).sum(), (4, 6, 8), shapes=[(4, 8, 8)]),
    "einsum_trace_exp": Case(lambda x, w: x * torch.einsum("ii->", w.exp()), shapes=[(8, 8)]),
    "vdot": both(lambda x, v, w: x * torch.vdot(v, w), (6, 8), shapes=[(8,), (8,)]),
    "inner": Case(lambda x, w: torch.inner(x, w), **BOTH, shapes=[(4, 6)]),
    "inner_exp": Case(lambda x, w: torch.inner(x.exp(), w.exp()), (4,), (), shapes=[(4, 6)]),
    "cdist": Case(lambda x, y: torch.cdist(x, y), widths=(6, 6)),
    "cdist_of_one": Case(lambda x: torch.cdist(x, x.roll(1, 1) * 2, p=1.0)),
    "cdist_of_rows": Case(lambda x, w: torch.cdist(x, w), (4, 6), (6,), shapes=[(4, 6)]),
    "cdist_of_heads": Case(
        lambda x: torch.cdist(*2 * [x.view(2, 5, 3, 8).transpose(1, 2)]).transpose(1, 2).flatten(2),
        (3, 8),
        (8,),
        widths=(24,),
    ),
    "cdist_exp": none(lambda x, y: torch.cdist(x.exp(), y), (6, 6)),
    "pairwise_distance": none(lambda x, y: F.pairwise_distance(x, y, keepdim=True), (6, 6)),
    "pairwise_distance_elsewhere": Case(lambda x, y: F.pairwise_distance(x.mT, y.mT)[:, None] * x, widths=(6, 6)),
    "outer": Case(lambda x, v, w: x @ torch.outer(v, w), **BOTH, shapes=[(6,), (4,)]),
    "outer_one": Case(lambda x, v: x + x @ torch.ger(v, v.exp()), summed=(), shapes=[(6,)]),
    "outer_exp": Case(lambda x, v, w: x + torch.outer(v.exp(), w)[:5], shapes=[(8,), (6,)]),
    "addmv": both(lambda x, w, v, b: x * torch.addmv(b, w, v), (6, 8), shapes=[(6, 8), (8,), (6,)]),
    "addmv_exp": Case(
        lambda x, w, v, b: x.exp() * torch.addmv(b.exp(), w, v), (6, 8), (8,), shapes=[(6, 8), (8,), (6,)]
    ),
    "addr": Case(lambda x, v, w, b: x @ torch.addr(b, v, w), **BOTH, shapes=[(6,), (4,), (4,)]),
    "addr_sum": both(lambda x, v, w, b: x * torch.addr(b, v, w, alpha=2).sum(), (4, 6), shapes=[(8,), (4,), (4,)]),
    "addbmm": Case(
        lambda x, w, b: x @ torch.addbmm(b, w, w.mT.contiguous() + 1), (3, 4, 6), (3, 4), (6,), [(3, 6, 4), (6,)]
    ),
    "bilinear": both(lambda x, y, w, b: F.bilinear(x, y, w, b), (3, 4, 6), (6, 3), [(4, 6, 3), (4,)]),
    "bilinear_plain": both(lambda x, y, w: F.bilinear(x, y, w), (3, 4, 6), (6, 3), [(4, 6, 3)]),
    "bilinear_exp": Case(
        lambda x, y, w, b: F.bilinear(x.exp(), y.exp(), w.exp(), b), (4,), (), (6, 3), [(4, 6, 3), (4,)]
    ),
    # A choice of 8 cannot vary along the 6, of which there are two.
    "gram": Case(lambda x, w: x @ (w @ w.mT), (6, 8), (8,), shapes=[(6, 8)]),
    "gram_einsum": both(lambda x, w: torch.einsum("bsi,ik,jk->bsj", x, w, w), (6, 8), shapes=[(6, 8)]),
    "gram_by_hand": Case(lambda x, w: x @ (w.unsqueeze(0) * w.unsqueeze(1)).sum(-1), (6, 8), (8,), shapes=[(6, 8)]),
    "residual": Case(lambda x, w: x + x @ w, shapes=[(6, 6)]),
    "residual_exp": Case(lambda x, w: x + x @ w.exp(), summed=(), shapes=[(6, 6)]),
    "both_exp": Case(lambda x, w: x.exp() @ w.exp(), (4,), (), shapes=[(6, 4)]),
}


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(**options: Any) -> Callable[..., Tensor]:
    """Attention of four heads; an additional parameter is the mask."""

    def function(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        groups = 2 if options.get("enable_gqa") else 4
        q, k, v = heads(q, 4), heads(k, groups), heads(v, groups)
        return merged(F.scaled_dot_product_attention(q, k, v, *mask, **options))

    return function


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q, 4) @ heads(k, 4).mT / 3
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    return merged(scores.masked_fill(future, -1e9).softmax(-1) @ heads(v, 4))


HEADS = {"linear": (2, 3, 4), "summed": (2, 3, 4), "widths": (12, 12, 8)}
ATTENTION: dict[str, Case] = {
    "sdpa": Case(attend(), **HEADS),
    "sdpa_causal": Case(attend(is_causal=True), **HEADS),
    "sdpa_scale": Case(attend(scale=0.3), **HEADS),
    "sdpa_bias": Case(attend(), **HEADS, shapes=[(4, 5, 5)]),
    "sdpa_gqa": Case(attend(enable_gqa=True), (2, 2, 3, 7), (2, 3, 7), widths=(12, 6, 14)),
    "sdpa_one_head": both(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (4, 6), (6, 6, 4)),
    "sdpa_exp": both(lambda q, k, v: attend()(q.exp(), k.exp(), v), (2, 4), (12, 12, 8)),
    "sdpa_exp_values": Case(lambda q, k, v: attend()(q, k, v.exp()), (2, 3, 4), (3,), widths=(12, 12, 8)),
    "sdpa_one_batch": Case(lambda q, k, v: attend()(q[:1], k, v), **HEADS),
    "sdpa_one_batch_keys": Case(lambda q, k, v: attend()(q, k[:1], v[:1]), **HEADS),
    "sdpa_one_batch_values": Case(lambda q, k, v: attend()(q, k, v[:1]), **HEADS),
    "sdpa_learned_queries": both(
        lambda x, q, w: merged(F.scaled_dot_product_attention(q, heads(x, 4), heads(x @ w, 4))),
        (2, 3, 4),
        (12,),
        [(1, 4, 5, 3), (12, 8)],
    ),
    "sdpa_one_key_head": Case(
        lambda q, k, v: merged(F.scaled_dot_product_attention(heads(q, 4), heads(k, 1), heads(v, 1))),
        (2, 3, 4),
        (2, 3),
        widths=(12, 3, 2),
    ),
    "sdpa_one_query_head": both(
        lambda q, k, v: merged(F.scaled_dot_product_attention(heads(q, 1), heads(k, 4), heads(v, 4))),
        (2, 3, 4),
        (3, 12, 8),
    ),
    "by_hand": Case(by_hand, **HEADS),
    "linear_attention": Case(lambda q, k, v: merged(heads(q, 4) @ (heads(k, 4).mT @ heads(v, 4))), **HEADS),
    "over_channels": Case(
        lambda q, k, v: merged((heads(q, 4).mT @ heads(k, 4)).softmax(-1).matmul(heads(v, 4).mT).mT),
        (3, 4, 8),
        (3, 4),
        widths=(32, 12, 12),
    ),
}


def along(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Apply ``function`` to [2, channels, 5] and put channels last again."""
    return lambda x, *weights: function(x.transpose(1, 2), *weights).transpose(1, 2)


def image(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As ``along``, with positions as a 5 × 1 image."""
    return along(lambda x, *weights: function(x.unsqueeze(-1), *weights).flatten(2))


def volume(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return along(lambda x, *weights: function(x[..., None, None], *weights).flatten(2))


CONVOLUTION: dict[str, Case] = {
    "conv1d": Case(along(lambda x, w, b: F.conv1d(x, w, b, padding=1)), **BOTH, shapes=[(4, 6, 3), (4,)]),
    "conv1d_exp": Case(along(lambda x, w: F.conv1d(x.exp(), w.exp())), (4,), (), shapes=[(4, 6, 3)]),
    "conv1d_unbatched": Case(lambda x, w: F.conv1d(rows(x).t(), w).t().view(2, 5, 4), **BOTH, shapes=[(4, 6, 1)]),
    "conv2d": Case(image(lambda x, w: F.conv2d(x, w)), **BOTH, shapes=[(4, 6, 3, 1)]),
    "conv3d": Case(volume(lambda x, w: F.conv3d(x, w)), **BOTH, shapes=[(4, 6, 3, 1, 1)]),
    "grouped": both(along(lambda x, w, b: F.conv1d(x, w, b, groups=3)), (2, 3, 4), (12,), [(6, 4, 3), (6,)]),
    "depthwise": Case(along(lambda x, w, b: F.conv1d(x, w, b, groups=6)), shapes=[(6, 1, 3), (6,)]),
    "depthwise_twice": both(along(lambda x, w: F.conv1d(x, w, groups=6)), (2, 6), shapes=[(12, 1, 3)]),
    "transpose1d": Case(along(lambda x, w, b: F.conv_transpose1d(x, w, b)), (4, 6), (6,), shapes=[(6, 4, 3), (4,)]),
    "transpose2d": Case(image(lambda x, w: F.conv_transpose2d(x, w)), (4, 6), (6,), shapes=[(6, 4, 3, 1)]),
    "transpose3d": Case(volume(lambda x, w: F.conv_transpose3d(x, w)), (4, 6), (6,), shapes=[(6, 4, 3, 1, 1)]),
    "transpose_groups": Case(
        along(lambda x, w: F.conv_transpose1d(x, w, groups=3)), (2, 3, 4), (4,), (12,), [(12, 2, 3)]
    ),
}
ROW = {"dim": -1, "keepdim": True}


def norm_by_hand(x: Tensor) -> Tensor:
    centred = x - x.mean(**ROW)
    return centred * torch.rsqrt(centred.square().mean(**ROW) + 1e-5)


def grid(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Apply ``function`` to [2, 5, 3, 8]."""
    return lambda x, *weights: function(x.view(2, 5, 3, 8), *weights).flatten(2)


GRID: dict[str, Any] = {"linear": (3, 8), "summed": (3, 8), "widths": (24,)}
SIX = (6,)
NORMS: dict[str, Case] = {
    "layer_norm": Case(lambda x, w, b: F.layer_norm(x, SIX, w, b), shapes=[SIX, SIX]),
    "layer_norm_weight": Case(lambda x, w: F.layer_norm(x, SIX, w), shapes=[SIX]),
    "layer_norm_plain": Case(lambda x: F.layer_norm(x, SIX), summed=()),
    "layer_norm_exp": Case(lambda x, w: F.layer_norm(x.exp(), SIX, w), shapes=[SIX]),
    "layer_norm_heads": Case(grid(lambda x, w, b: F.layer_norm(x, (8,), w, b)), (3, 8), (8,), (24,), [(8,), (8,)]),
    "layer_norm_heads_plain": Case(grid(lambda x: F.layer_norm(x, (8,))), (3, 8), (), (24,)),
    "layer_norm_both": Case(grid(lambda x, w, b: F.layer_norm(x, (3, 8), w, b)), **GRID, shapes=[(3, 8), (3, 8)]),
    "layer_norm_by_hand": none(norm_by_hand),
    "rms_norm": Case(lambda x, w: F.rms_norm(x, SIX, w), shapes=[SIX]),
    "rms_norm_eps": Case(lambda x, w: F.rms_norm(x, SIX, w, eps=0.1), shapes=[SIX]),
    "rms_norm_plain": Case(lambda x: F.rms_norm(x, SIX)),
    "rms_norm_default_eps": Case(lambda x: F.rms_norm(x * 1e-4, SIX)),
    "rms_norm_exp": none(lambda x, w: F.rms_norm(x.exp(), SIX, w), shapes=[SIX]),
    "rms_norm_both": Case(grid(lambda x, w: F.rms_norm(x, (3, 8), w)), **GRID, shapes=[(3, 8)]),
    "rms_norm_by_hand": Case(lambda x: x * torch.rsqrt(x.square().mean(**ROW) + 0.01)),
    "group_norm": both(along(lambda x, w, b: F.group_norm(x, 3, w, b)), (3, 4), (12,), [(12,), (12,)]),
    "group_norm_plain": Case(along(lambda x: F.group_norm(x, 3)), (3, 4), (), (12,)),
    "batch_norm": Case(
        along(lambda x, m, v, w, b: F.batch_norm(x, m.detach(), v.detach().exp(), w, b)), shapes=[SIX, SIX, SIX, SIX]
    ),
    "batch_norm_plain": Case(
        along(lambda x, m, v: F.batch_norm(x, m.detach(), v.detach().exp())), summed=(), shapes=[SIX, SIX]
    ),
    "batch_norm_own": Case(along(lambda x: F.batch_norm(x, None, None, training=True))),
    "instance_norm": Case(along(lambda x, w, b: F.instance_norm(x, None, None, w, b)), shapes=[SIX, SIX]),
    "normalize": Case(lambda x: F.normalize(x, dim=-1)),
    "native_layer_norm": none(lambda x, w: torch.native_layer_norm(x, SIX, w, None, 1e-5)[0], shapes=[SIX]),
    "native_layer_norm_heads": Case(
        grid(lambda x: sum(torch.native_layer_norm(x, (8,), None, None, 1e-5))), (3,), (), (24,)
    ),
    "weight_norm": Case(lambda x, v, g: F.linear(x, torch._weight_norm(v, g)), **BOTH, shapes=[(4, 6), (4, 1)]),
    "weight_norm_columns": Case(
        lambda x, v, g: F.linear(x, torch._weight_norm(v, g, 1)), **BOTH, shapes=[(4, 6), (1, 6)]
    ),
    "weight_norm_whole": Case(
        lambda x, v, g: F.linear(x, torch._weight_norm(v, g[0], -1)), **BOTH, shapes=[(4, 6), (1,)]
    ),
    "weight_norm_conv": Case(
        along(lambda x, v, g: F.conv1d(x, torch._weight_norm(v, g))), **BOTH, shapes=[(4, 6, 3), (4, 1, 1)]
    ),
    "weight_norm_heads": both(
        lambda x, v, g: F.linear(x, torch._weight_norm(v, g)).view(2, 5, 3, 8).relu().flatten(2),
        (3, 6, 8),
        shapes=[(24, 6), (24, 1)],
    ),
    "weight_norm_interface": none(
        lambda x, v, g: F.linear(x, aten._weight_norm_interface(v, g)[0]), shapes=[(4, 6), (4, 1)]
    ),
}


def times(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """x times a reduction of it over the channels."""
    return lambda x: x * reduce(x)


def times_weight(reduce: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: x * reduce(x, w)


REDUCTIONS: dict[str, Case] = {
    "mean": Case(times(lambda x: x.mean(-1, True))),
    "mean_exp": none(times(lambda x: x.exp().mean(-1, True))),
    "mean_all": Case(times(lambda x: x.mean())),
    "mean_two": Case(grid(times(lambda x: x.mean((2, 3), True))), **GRID),
    "sum": Case(times(lambda x: x.sum(-1, True))),
    "sum_all": Case(times(lambda x: x.sum())),
    "sum_exp": none(times(lambda x: x.exp().sum(-1, True))),
    "nansum": Case(times(lambda x: x.nansum(-1, True))),
    "any": none(times(lambda x: (x > 0.5).any(-1, True))),
    "count_nonzero": Case(times(lambda x: x.relu().count_nonzero(-1).unsqueeze(-1))),
    "all": Case(times(lambda x: (x < 0.5).all(-1, True))),
    "all_positive": Case(times(lambda x: (x > -0.5).all(-1, True))),
    "prod": none(times(lambda x: x.prod(-1, True))),
    "norm": Case(times(lambda x: 1 / (1 + x.norm(dim=-1, keepdim=True)))),
    "linalg_norm": Case(times(lambda x: torch.linalg.norm(x, dim=-1, keepdim=True))),
    "linalg_norm_all": Case(times(lambda x: torch.linalg.norm(x))),
    "linalg_norm_exp": none(times(lambda x: torch.linalg.norm(x.exp(), 1, -1, True))),
    "linalg_norm_smallest": none(times(lambda x: torch.linalg.norm(x, -1, -1, True))),
    "linalg_norm_nuclear": Case(grid(times(lambda x: torch.linalg.norm(x, "nuc", (2, 3), True))), **GRID),
    "matrix_norm": Case(grid(times(lambda x: torch.linalg.matrix_norm(x, keepdim=True))), **GRID),
    "matrix_norm_2": Case(grid(times(lambda x: torch.linalg.matrix_norm(x, 2, keepdim=True))), **GRID),
    "matrix_norm_rows": Case(grid(times(lambda x: torch.linalg.matrix_norm(x, torch.inf, (1, -1), True))), **GRID),
    "matrix_norm_smallest": none(grid(times(lambda x: torch.linalg.matrix_norm(x, -2, keepdim=True))), (24,)),
    "renorm": Case(lambda x: x.renorm(2, 1, 0.5)),
    "renorm_channels": Case(lambda x: x.renorm(1, -1, 0.5)),
    "renorm_heads": Case(grid(lambda x: x.renorm(2, 3, 0.5)), **GRID),
    "renorm_exp": none(lambda x: x.exp().renorm(2, 1, 0.5)),
    "cosine": Case(times(lambda x: F.cosine_similarity(x, x.tanh(), -1).unsqueeze(-1))),
    "cosine_weight": Case(times_weight(lambda x, w: F.cosine_similarity(x, w, dim=-1).unsqueeze(-1)), shapes=[(6,)]),
    "cosine_exp": none(times(lambda x: F.cosine_similarity(x, x.exp(), -1).unsqueeze(-1))),
    "cosine_other": none(times(lambda x: F.cosine_similarity(x.exp(), x, -1).unsqueeze(-1))),
    "cosine_repeated": none(times(lambda x: F.cosine_similarity(x, torch.ones(1), -1).unsqueeze(-1))),
    "cosine_elsewhere": Case(lambda x, w: F.cosine_similarity(x, w, 1).unsqueeze(1).repeat(1, 5, 1), shapes=[(5, 6)]),
    "norm_default": Case(times(lambda x: 1 / (1 + aten.norm(x)))),
    "vector_norm": Case(times(lambda x: torch.linalg.vector_norm(x, 3, -1, True))),
    "vector_norm_inf": Case(times(lambda x: torch.linalg.vector_norm(x, torch.inf, -1, True))),
    "vector_norm_min": none(times(lambda x: torch.linalg.vector_norm(x, -torch.inf, -1, True))),
    "cumsum": Case(lambda x: x.cumsum(-1), summed=()),
    "cumsum_": none(lambda x: (x * 1).cumsum_(-1)),
    "cumsum_exp": none(lambda x: x.exp().cumsum(-1)),
    "var": Case(times(lambda x: x.var(-1, keepdim=True))),
    "var_of_three": none(times(lambda x: x.var(-1, keepdim=True, correction=2)), (3,)),
    "var_biased": Case(times(lambda x: x.var(-1, False, True))),
    "var_correction": Case(times(lambda x: x.var(-1, correction=0).unsqueeze(-1))),
    "var_two": Case(grid(times(lambda x: x.var((2, 3), keepdim=True))), **GRID),
    "std": Case(times(lambda x: x.std(-1, keepdim=True))),
    "var_mean": Case(times(lambda x: sum(torch.var_mean(x, -1, keepdim=True)))),
    "std_mean_all": Case(times(lambda x: sum(torch.std_mean(x)))),
    "std_mean": Case(times(lambda x: sum(torch.std_mean(x, -1, keepdim=True)))),
    "var_by_hand": none(times(lambda x: (x - x.mean(-1, True)).square().mean(-1, True))),
    "amax": Case(times(lambda x: x.amax(-1, True))),
    "max_all": Case(times(lambda x: x.max() + x.min())),
    "max_all_heads": Case(grid(times(lambda x: x.max())), **GRID),
    "aminmax": none(times(lambda x: sum(x.aminmax(dim=-1, keepdim=True)))),
    "aminmax_elsewhere": Case(times(lambda x: sum(x.aminmax(dim=1, keepdim=True)))),
    "amax_two": Case(grid(times(lambda x: x.amax((2, 3), True))), **GRID),
    "amin": Case(times(lambda x: x.amin(-1, True))),
    "max_dim": Case(times(lambda x: x.max(-1, True)[0])),
    "min_dim": Case(times(lambda x: x.min(-1, True)[0])),
    "logsumexp": Case(times(lambda x: x.logsumexp(-1, True))),
    "softmax": Case(lambda x, w: x.softmax(-1) * w.exp(), shapes=[(6,)]),
    "_softmax": Case(lambda x: x * aten._softmax(x, -1, False)),
    "softmin": Case(lambda x, w: F.softmin(x, -1) * w.exp(), shapes=[(6,)]),
    "softmax_by_hand": none(lambda x: x.exp() / x.exp().sum(-1, True)),
    "log_softmax": none(lambda x: x.log_softmax(-1)),
    "softmax_elsewhere": Case(lambda x: x.softmax(1), summed=()),
}
GROUPS = {"products": PRODUCTS, "attention": ATTENTION, "convolution": CONVOLUTION}
GROUPS |= {"norms": NORMS, "reductions": REDUCTIONS}
