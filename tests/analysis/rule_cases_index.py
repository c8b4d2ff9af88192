"""Ops that read or write at positions, and ops that make positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rule_cases import Case, both, none
from torch import Tensor

aten = torch.ops.aten
EVEN_ROWS = torch.arange(10).reshape(2, 5, 1) % 2 == 0
EVERY = torch.arange(12)
TABLE = {"linear": (4, 6), "summed": (4, 6), "shapes": [(6, 4)]}


def first(x: Tensor, k: int = 1) -> Tensor:
    """The positions of the k largest channels, [2, 5, k]."""
    return x.topk(k, -1)[1]


def best(x: Tensor) -> Tensor:
    return x.argmax(-1)


POSITIONS: dict[str, Case] = {
    "topk": Case(lambda x: x.topk(3, -1)[0]),
    "topk_smallest": Case(lambda x: x.topk(3, -1, False)[0]),
    "topk_heads": both(lambda x: x.view(2, 5, 3, 8).flatten(2).topk(7, -1)[0], (3, 8), (24,)),
    "sort": none(lambda x: x.sort(-1)[0]),
    "argsort": both(lambda x, w: w[x.argsort(-1)].flatten(2), (4,), shapes=[(6, 4)]),
    "embedding": Case(lambda x, w: F.embedding(best(x), w), **TABLE),
    "embedding_constant": Case(lambda x, w: x * F.embedding(torch.arange(5), w), shapes=[(9, 6)]),
    "embedding_bag": both(lambda x, w: x @ F.embedding_bag(torch.arange(18).view(6, 3) % 8, w), (4,), shapes=[(8, 4)]),
    "embedding_bag_mean": none(lambda x, w: x + F.embedding_bag(best(x), w, mode="mean").unsqueeze(1), shapes=[(6, 6)]),
    "embedding_bag_weighted": both(
        lambda x, y, w: x + F.embedding_bag(EVERY.view(2, 6), w, per_sample_weights=y[:, 0], mode="sum")[:, None],
        (4,),
        (4, 6),
        [(12, 4)],
    ),
    "embedding_bag_max": Case(
        lambda x, w: x + F.embedding_bag(EVERY.view(2, 6), w, mode="max")[:, None], shapes=[(12, 6)]
    ),
    "embedding_bag_largest": Case(
        lambda x, w: x + aten.embedding_bag(w, EVERY, torch.tensor([0, 6]), False, 2)[3][:, None],
        summed=(),
        shapes=[(12, 6)],
    ),
    "embedding_renorm_exp": none(lambda x, w: x + F.embedding(torch.arange(5), w.exp(), max_norm=0.7), shapes=[(8, 6)]),
    "embedding_renorm": Case(lambda x, w: x + F.embedding(torch.arange(5), w * 1, max_norm=0.7), shapes=[(8, 6)]),
    "index": Case(lambda x, w: w[best(x)], **TABLE),
    "index_argmin": Case(lambda x, w: w[x.argmin(-1)], **TABLE),
    "index_max": Case(lambda x, w: w[x.max(-1)[1]] + w[x.min(-1)[1]], **TABLE),
    "_unsafe_index": Case(lambda x, w: aten._unsafe_index(w, [best(x)]), **TABLE),
    "index_select": Case(lambda x, w: w.index_select(0, best(x).flatten()).view(2, 5, 4), **TABLE),
    "index_second": both(lambda x, w: w[:, best(x)].permute(1, 2, 0), (4, 6), shapes=[(4, 6)]),
    "index_number": both(lambda x, w: x[..., 2:3] * w[best(x) // 2], (4,), shapes=[(6, 4)]),
    "index_constant": Case(lambda x: x[..., torch.arange(8) % 6], (8,), ()),
    "index_batch": Case(lambda x: x[torch.arange(2)[:, None], torch.arange(4)]),
    "gather": Case(lambda x, y: y.gather(-1, first(x, 2)), widths=(6, 6)),
    "take_along_dim": Case(lambda x, y: torch.take_along_dim(y, first(x, 2), -1), widths=(6, 6)),
    "gather_elsewhere": Case(lambda x: x.gather(1, torch.arange(3)[None, :, None].expand(2, 3, 6))),
    "gather_part": none(lambda x: x.gather(1, torch.arange(3)[None, :, None].expand(2, 3, 4))),
    "one_hot": Case(lambda x, w: F.one_hot(best(x), 6) * w, shapes=[(6,)]),
    "one_hot_more": none(lambda x, w: F.one_hot(best(x), 8) * w, shapes=[(8,)]),
    "histc": Case(lambda x, y, w: w * best(x).float().histc(6, 0, 5) + y, widths=(6, 6), shapes=[(6,)]),
    "histc_more": none(lambda x, w: w * best(x).float().histc(8, 0, 7) + x[..., :1], shapes=[(8,)]),
    "clamp": Case(lambda x, w: w[best(x).clamp(0, 5)], **TABLE),
    "clamp_inside": both(lambda x, w: w[best(x).clamp(0, 4)], (4,), shapes=[(6, 4)]),
    "compared": none(lambda x: x * (best(x) == 2).unsqueeze(-1)),
    "compared_all": none(lambda x: x * (best(x).unsqueeze(-1) == torch.arange(6))),
    "as_number": none(lambda x: best(x).float().unsqueeze(-1)),
    "of_positions": both(lambda x, w: w[first(x, 3).topk(1, -1)[0]].flatten(2), (4,), shapes=[(6, 4)]),
    "largest_position": both(lambda x, w: w[first(x, 3).amax(-1)], (4,), shapes=[(6, 4)]),
    "other_axis": both(lambda x, w: w[best(x)], (4,), shapes=[(9, 4)]),
}
WRITES: dict[str, Case] = {
    "masked_scatter": Case(lambda x, y: x.masked_scatter(EVEN_ROWS.expand(2, 5, 6), y), widths=(6, 6)),
    "masked_scatter_": Case(lambda x, y: (x * 1).masked_scatter_(EVEN_ROWS.expand(2, 5, 6), y), widths=(6, 6)),
    "masked_scatter_mixed": none(lambda x, y: x.masked_scatter(torch.arange(60).reshape(2, 5, 6) % 5 < 2, y), (6, 6)),
    "scatter": Case(lambda x: x.new_zeros(2, 5, 6).scatter(-1, first(x, 2), x.topk(2, -1)[0].exp())),
    "scatter_value": Case(lambda x: x * torch.zeros(2, 5, 6).scatter(-1, first(x, 2), 1.0)),
    "scatter_value_exp": Case(lambda x, w: x.new_zeros(2, 5, 6).scatter(-1, first(x, 2), 1.0) * w.exp(), shapes=[(6,)]),
    "scatter_ones": Case(lambda x: torch.ones(2, 5, 6).scatter(-1, first(x, 2), 3.0), summed=()),
    "scatter_": Case(lambda x: torch.zeros(2, 5, 6).scatter_(-1, first(x, 2), x.topk(2, -1)[0])),
    "scatter_add": Case(lambda x: x.new_zeros(2, 5, 6).scatter_add(-1, first(x, 2), x.topk(2, -1)[0])),
    "scatter_add_": Case(lambda x: (x * 1).scatter_add_(-1, first(x, 2), x.topk(2, -1)[0])),
    "scatter_reduce": Case(
        lambda x: x.new_zeros(2, 5, 6).scatter_reduce(-1, first(x, 2), x.topk(2, -1)[0], "sum", include_self=True)
    ),
    "scatter_elsewhere": Case(
        lambda x: torch.zeros(2, 5, 6).scatter(1, torch.arange(3)[None, :, None].expand(2, 3, 6), x[:, :3].exp()),
        summed=(),
    ),
    "scatter_part": none(lambda x: x.scatter(1, torch.arange(3)[None, :, None].expand(2, 3, 4), 1.0)),
    "scatter_positions": both(
        lambda x, w: w[torch.zeros(2, 5, 6, dtype=torch.long).scatter(-1, first(x, 6), first(x, 6))].flatten(2),
        (4,),
        shapes=[(6, 4)],
    ),
    "index_add": Case(lambda x: (x * 1).index_add(1, torch.tensor([1, 3]), x[:, :2])),
    "index_add_exp": Case(lambda x: (x * 1).index_add(1, torch.tensor([1, 3]), x[:, :2].exp()), summed=()),
    "index_add_": Case(lambda x: (x * 1).index_add_(1, torch.tensor([1, 3]), x[:, :2])),
    "index_add_channels": none(lambda x: (x * 1).index_add(-1, torch.tensor([1, 3]), x[..., :2])),
    "index_copy": Case(lambda x: (x * 1).index_copy(1, torch.tensor([1, 3]), x[:, :2].exp()), summed=()),
    "index_copy_": Case(lambda x: (x * 1).index_copy_(1, torch.tensor([1, 3]), x[:, :2])),
    "index_put": Case(lambda x: (x * 1).index_put((torch.tensor([0, 1]), torch.tensor([2, 4])), x[0, :2]), summed=()),
    "index_put_": Case(lambda x: (x * 1).index_put_((torch.tensor([0, 1]),), x.exp()), summed=()),
    "index_put_channels": none(
        lambda x: (
            (x * 1).transpose(0, 2).index_put((torch.tensor([0, 1]),), x[:1, :, :2].transpose(0, 2)).transpose(0, 2)
        )
    ),
}
FIXED: dict[str, Case] = {
    "diagonal": Case(lambda x, w: x * w.diagonal(), shapes=[(6, 6)]),
    "diagonal_batch": Case(lambda x, w: x @ w.diagonal(0, 0, -1), **TABLE | {"shapes": [(4, 6, 4)]}),
    "diagonal_beside": Case(lambda x, w: x + w.diagonal(1)[:1], (6,), (), shapes=[(8, 8)]),
    "diagonal_part": none(lambda x, w: x * w.diagonal(), shapes=[(6, 8)]),
    "linalg_diagonal": Case(lambda x, w: x * torch.linalg.diagonal(w).sum(0), shapes=[(1, 6, 6)]),
    "linalg_diagonal_of_channels": Case(
        lambda x: torch.linalg.diagonal(x.unsqueeze(-1) * x.exp().unsqueeze(-2)), (6,), (), (6,)
    ),
    "diag": Case(lambda x, w: x * w.diag(), shapes=[(6, 6)]),
    "fill_diagonal": Case(lambda x, w: x @ (w * 2).fill_diagonal_(0), shapes=[(6, 6)]),
    "fill_diagonal_one": Case(lambda x, w: x @ (w * 2).fill_diagonal_(1), (6,), (), shapes=[(6, 6)]),
    "fill_diagonal_exp": none(lambda x, w: x.exp() @ (w * 2).fill_diagonal_(1), shapes=[(6, 6)]),
    "fill_diagonal_part": none(lambda x, w: x @ (w * 2).fill_diagonal_(1), shapes=[(6, 8)]),
    "block_diag": Case(
        lambda x, v, w: torch.block_diag(x[0], v, w).expand(2, 10, 12), (2, 4, 6), (2, 4, 4, 6), shapes=[(4, 4), (2,)]
    ),
    "block_diag_twice": Case(lambda x: torch.block_diag(x[0], x[1].exp()).expand(2, 10, 12), summed=()),
    "block_diag_exp": Case(
        lambda x, w: torch.block_diag(x[0].exp(), w).expand(2, 9, 10), (4, 6), (4, 4), shapes=[(4, 4)]
    ),
    "diag_of_vector": Case(lambda x, w: x @ w.diag(), (6,), (), shapes=[(6,)]),
    "diag_of_vector_beside": none(lambda x, w: x @ w.diag(1)[1:, 1:], shapes=[(6,)]),
    "diag_embed": Case(lambda x: x.diag_embed().flatten(2), (6,), ()),
    "diag_embed_dims": Case(lambda x: x.diag_embed(dim1=1, dim2=-1).transpose(1, 2).flatten(2), (6,), ()),
    "diag_embed_beside": none(lambda x: x.diag_embed(-1).flatten(2)),
    "select_scatter": Case(lambda x, y: x.select_scatter(y[:, 0], 1, -2), widths=(6, 6)),
    "select_scatter_exp": Case(lambda x, y: x.select_scatter(y[:, 0].exp(), 1, 2), widths=(6, 6), summed=()),
    "select_scatter_channels": none(lambda x, y: x.select_scatter(y.squeeze(-1), dim=-1, index=2), (6, 1)),
    "slice_scatter": Case(lambda x, y: x.slice_scatter(y[:, :2], 1, 1, 3), widths=(6, 6)),
    "slice_scatter_exp": Case(lambda x, y: x.slice_scatter(y[:, :2].exp(), 1, 0, 4, 2), widths=(6, 6), summed=()),
    "slice_scatter_channels": none(lambda x, y: x.slice_scatter(y, -1, 1, 4), (6, 3)),
}
GROUPS = {"positions": POSITIONS, "writes": WRITES, "fixed positions": FIXED}
