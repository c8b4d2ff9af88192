"""Ops that move, factor, join and cut dimensions, and ops that make tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from rule_cases import Case, both, none
from torch import Tensor

aten = torch.ops.aten


def tail(x: Tensor) -> Tensor:
    """Merge what the case made of the channels: [2, 5, …] → [2, 5, n]."""
    return x.reshape(2, 5, -1)


def gated(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return parts[0] * parts[1].relu()


MOVES = {
    "to": Case(lambda x: x.to(torch.float64).to(torch.float32)),
    "_to_copy": Case(lambda x: aten._to_copy(x, dtype=torch.float32)),
    "type_as": Case(lambda x: x.type_as(x)),
    "float": Case(lambda x: x.float()),
    "clone": Case(lambda x: aten.contiguous(x.clone())),
    "alias": Case(lambda x: aten.alias(x)),
    "detach": Case(lambda x: x.detach()),
    "detach_": Case(lambda x: (x * 1).detach_()),
    "dropout": Case(lambda x: F.dropout(x, 0.5, training=False)),
    "dropout_": Case(lambda x: aten.dropout_(x * 1, 0.5, False)),
    "feature_dropout": Case(lambda x: aten.feature_dropout(x, 0.5, False)),
    "transpose": Case(lambda x: x.transpose(1, 2).swapaxes(-1, -2)),
    "transpose_": Case(lambda x: aten.transpose_(x * 1, 1, 2).transpose(1, 2)),
    "permute": Case(lambda x: x.permute(2, 0, -2).permute(1, 2, 0)),
    "mT": Case(lambda x: x.mT.adjoint()),
    "t": Case(lambda x: x.flatten(0, 1).t().t()),
    "numpy_T": Case(lambda x: x.flatten(0, 1).T.T),
    "movedim": Case(lambda x: x.movedim(-1, 0).movedim((0, 1), (2, 0))),
    "unsqueeze": Case(lambda x: x.unsqueeze(1).squeeze(1).unsqueeze(-1).squeeze(-1)),
    "unsqueeze_": Case(lambda x: aten.squeeze_(aten.unsqueeze_(x * 1, -1), -1)),
    "swapdims": Case(lambda x: x.swapdims(1, 2).moveaxis(1, 2)),
    "mH": Case(lambda x: x.mH.mT.flatten(0, 1).H.T.view(2, 5, 6)),
    "squeeze": Case(lambda x: x.unsqueeze(0).unsqueeze(-1).squeeze()),
    # Dimensions of 2 that are cut to 1.
    "squeeze_cut": both(lambda x: x.unsqueeze(0).squeeze(), (2,), (2,)),
    "squeeze_cut_dim": both(lambda x: x.squeeze(-1), (2,), (2,)),
    "squeeze_cut_dims": both(lambda x: x.unsqueeze(0).squeeze((0, -1)), (2,), (2,)),
    "squeeze_cut_": both(lambda x: aten.squeeze_(x.unsqueeze(0) * 1, [0, -1]), (2,), (2,)),
    "unfold": Case(lambda x: F.pad(x, (0, 0, 1, 0)).unfold(1, 2, 1)[..., 0]),
    "tril": none(lambda x, w: x @ (w.tril() + w.triu(1)), shapes=[(6, 6)]),
    "tril_batch": none(lambda x: tail(x.tril().unsqueeze(-1))),
}
FACTORS = {
    "view": both(lambda x: tail(x.view(2, 5, 3, 8).relu()), (3, 8), (24,)),
    "view_negative": both(lambda x: x.view(-1, 5, 3, 8).reshape(2, -1, 24), (3, 8), (24,)),
    "view_three": both(lambda x: tail(x.view(2, 5, 3, 2, 4).transpose(2, 3).reshape(2, 5, 2, 12)), (2, 3, 4), (24,)),
    "_unsafe_view": both(lambda x: tail(aten._unsafe_view(x, [2, 5, 3, 8]).relu()), (3, 8), (24,)),
    "view_as": both(lambda x, y: tail(x.view_as(y.view(2, 5, 3, 8)) + 0), (3, 8), (24, 24)),
    "reshape_as": both(lambda x, w: tail(x.reshape_as(x.view(2, 5, 3, 8)) * w), (3, 8), (24,), [(8,)]),
    "flatten": both(lambda x: x.view(2, 5, 3, 8).flatten(2), (3, 8), (24,)),
    "unflatten": both(lambda x: x.unflatten(-1, (3, 8)).transpose(2, 3).flatten(-2), (3, 8), (24,)),
    "unflatten_1": both(
        lambda x: x.transpose(1, 2).unflatten(1, (3, -1)).transpose(1, 2).flatten(1, 2).transpose(1, 2), (3, 8), (24,)
    ),
    "expand": both(lambda x, w: tail(x.unsqueeze(2).expand(2, 5, 4, 6) * w), (4, 6), shapes=[(4, 1)]),
    "expand_minus": Case(lambda x: tail(x.unsqueeze(2).expand(-1, -1, 4, -1)), linear=(4, 6)),
    "broadcast_to": Case(lambda x: tail(x.unsqueeze(2).broadcast_to(2, 5, 4, 6)), linear=(4, 6)),
    "expand_as": both(lambda x, w: tail(x.unsqueeze(2).expand_as(w.expand(2, 5, 4, 6)) * w), (4, 6), shapes=[(4, 6)]),
    "repeat": Case(lambda x: tail(x.repeat(1, 1, 3))),
    "tile": Case(lambda x: tail(x.tile(3))),
    "repeat_interleave": both(lambda x, w: x.repeat_interleave(3, -1) * w, (3, 6), shapes=[(18,)]),
    "repeat_interleave_size": both(
        lambda x, w: x.repeat_interleave(3, dim=-1, output_size=18) * w, (3, 6), shapes=[(18,)]
    ),
    "repeat_each": Case(lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1, 1]), 1, output_size=5)),
    "repeat_each_channel": none(lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1, 1, 1]), dim=-1, output_size=6)),
    "repeat_each_flat": none(
        lambda x: x[0, 0].repeat_interleave(torch.tensor([2] * 6), output_size=12).expand(2, 5, 12)
    ),
    "repeat_each_computed": Case(
        lambda x, y: x.repeat_interleave((y[0, :, 0] * 0).long() + 1, 1, output_size=5), widths=(6, 1)
    ),
    "ravel": Case(lambda x: x.ravel().view(2, 5, 6)),
    "view_dtype": Case(lambda x: x.relu().view(torch.int32).float() * 1e-9, summed=()),
    "view_bytes": none(lambda x: x.view(torch.uint8)),
    # Layouts that cannot be aligned.
    "two_layouts": none(lambda x: x + x.view(2, 5, 2, 6).transpose(2, 3).flatten(2), (12,)),
    "across": none(lambda x: tail(torch.cat((x, x), -1).view(2, 5, 3, 4))),
}
SEGMENTS = {
    "cat": Case(lambda x, y: torch.cat((x.exp(), y), -1), (4, 6), (4,), widths=(6, 4)),
    "concat": both(lambda x, y: torch.concat((x, y), -1) + torch.concatenate((x, y), -1), (4, 6), (6, 4)),
    "cat_twice": Case(lambda x: torch.cat((x, x.relu()), -1)),
    "cat_constant": Case(lambda x: torch.cat((x, torch.ones(2, 5, 3)), -1), linear=(3, 6)),
    "cat_elsewhere": Case(lambda x, w: torch.cat((x, w.expand(2, 1, 6)), 1), shapes=[(1, 1, 6)]),
    "cat_elsewhere_ones": Case(lambda x: torch.cat((x, torch.ones(2, 1, 6)), 1), summed=()),
    "cat_empty": Case(lambda x: torch.cat((torch.zeros(0), x), -1)),
    "stack": Case(lambda x, y: tail(torch.stack((x, y), -1)), widths=(6, 6)),
    "stack_exp": Case(lambda x, y: tail(torch.stack((x, y.exp()), 2)), (6,), (), widths=(6, 6)),
    "split": Case(lambda x: gated(x.split(6, -1)), widths=(12,)),
    "split_uneven": both(lambda x: x.split(4, -1)[0] * 2, (2, 4), (6,)),
    "split_with_sizes": both(lambda x: gated(x.split((6, 6, 4), -1)), (4, 6), (16,)),
    "chunk": Case(lambda x: gated(x.chunk(2, dim=-1)), widths=(12,)),
    "tensor_split": Case(lambda x: gated(aten.tensor_split.sections(x, 2, -1)), widths=(12,)),
    "split_inside": none(lambda x: tail(torch.cat(x.view(2, 5, 3, 8).flatten(2).split((10, 14), -1), -1)), (24,)),
    "unbind": none(lambda x: torch.cat(x.unbind(-1), -1).view(2, 6, 5).transpose(1, 2)),
    "unbind_heads": Case(lambda x: gated(x.view(2, 5, 2, 6).unbind(2)), widths=(12,)),
    "slice": both(lambda x: x[..., 2:], (2, 4)),
    "slice_middle": both(lambda x: x[..., 2:-3], (2, 3, 4), (9,)),
    "slice_negative": both(lambda x: x[..., -7:-3], (2, 3, 4), (9,)),
    "slice_both": Case(lambda x: gated((x[..., :6], x[..., 6:])), widths=(12,)),
    "slice_heads": both(lambda x: x.view(2, 5, 3, 8).flatten(2)[..., 8:], (2, 8), (24,)),
    "slice_step": both(lambda x: tail(torch.stack((-x[..., 1::2], x[..., ::2]), -1)), (3,)),
    "slice_step_end": both(lambda x: x[..., 0:6:2] * x[..., 1:6:2], (3,)),
    "slice_step_offset": none(lambda x: x[..., 2::2]),
    "narrow": both(lambda x: x.narrow(-1, 2, 4), (2, 3, 4), (9,)),
    "narrow_negative": both(lambda x: aten.narrow(x, -1, -7, 4), (2, 3, 4), (9,)),
    "select": both(lambda x: x.view(2, 5, 3, 8).select(2, 1), (8,), (24,)),
    "select_last": both(lambda x: x.view(2, 5, 9, 4).select(2, -3), (2, 4, 6), (36,)),
    # Counted from the end, where only what lies behind is cut.
    "select_before": both(lambda x: x.view(2, 5, 4, 6).select(2, -3), (2, 6), (24,)),
    "slice_before": both(lambda x: x.view(2, 5, 4, 6)[:, :, -3:-2].flatten(2), (2, 6), (24,)),
    "narrow_before": both(lambda x: aten.narrow(x.view(2, 5, 4, 6), 2, -3, 1).flatten(2), (2, 6), (24,)),
    "pad": Case(lambda x: F.pad(x, (1, 2))),
    "pad_ones": Case(lambda x: F.pad(x, (1, 2), value=1.0), summed=()),
    "pad_elsewhere": Case(lambda x: F.pad(x, (0, 0, 1, 0), value=1.0), summed=()),
    "constant_pad_nd": Case(lambda x: aten.constant_pad_nd(x, [0, 0, 1, 0], 1.0), summed=()),
    "pad_crop": none(lambda x: F.pad(x, (-1, 1))),
    "pad_reflect": none(lambda x: F.pad(x, (2, 1), mode="reflect")),
    "pad_circular": none(lambda x: F.pad(x, (2, 1), mode="circular")),
    "pick": both(lambda x: torch.cat((x, x[..., [4, 3]]), -1), (3,)),
    "pick_before": both(lambda x: x.view(2, 5, 6, 4)[:, :, [4]].flatten(2), (4, 4), (24,)),
    "pick_last": both(lambda x: x.view(2, 5, 6, 4)[:, :, [-2]].flatten(2), (4, 4), (24,)),
}
MADE = {
    "zeros_like": Case(lambda x: torch.cat((x, torch.zeros_like(x)), -1)),
    "ones_like": Case(lambda x: x + torch.ones_like(x), summed=()),
    "full_like": Case(lambda x: x + torch.full_like(x, 2.0), summed=()),
    "empty_like": Case(lambda x: torch.empty_like(x).copy_(x)),
    "rand_like": Case(lambda x: x + torch.rand_like(x) * 0 + torch.randn_like(x) * 0, summed=()),
    "new_zeros": Case(lambda x: x + x.new_zeros(2, 5, 6)),
    "new_ones": Case(lambda x: x + x.new_ones(2, 5, 6), summed=()),
    "new_full": Case(lambda x: x * x.new_full((6,), 2.0)),
    "new_empty": Case(lambda x: x.new_empty((2, 5, 6)).copy_(x)),
    "zeros": Case(lambda x: torch.zeros(2, 5, 6).add_(x)),
    "ones": Case(lambda x: torch.ones(2, 5, 6).mul_(x)),
    "full": Case(lambda x: torch.full((2, 5, 6), 2.0).mul_(x)),
    "empty": Case(lambda x: torch.empty(2, 5, 6).copy_(x)),
    "zeros_written": Case(lambda x: _written(x, torch.zeros(2, 5, 6)), summed=()),
    "zeros_view_written": Case(lambda x: _view_written(x), (2, 8), (2,), widths=(24,)),
    "random": Case(lambda x: x + aten.bernoulli(x.sigmoid()) * 0 + aten.bernoulli_(x * 1, 0.5) * 0, summed=()),
    "random_": Case(lambda x: x + aten.normal_(x * 1) * 0 + aten.uniform_(x * 1) * 0, summed=()),
    "fill": Case(lambda x: x + aten.fill(x, 1.0), summed=()),
    "fill_": Case(lambda x: x + (x * 1).fill_(1.0), summed=()),
    "zero_": Case(lambda x: x + (x * 1).zero_(), summed=()),
    "constant": Case(lambda x: x * torch.arange(6.0)),
    "constant_2d": both(lambda x: x.view(2, 5, 3, 8) * torch.arange(24.0).view(3, 8), (3, 8), (24,)),
}


def _written(x: Tensor, base: Tensor) -> Tensor:
    """A constant that is written to is none."""
    base[:, 1:] = x[:, 1:].exp()
    return base + x


def _view_written(x: Tensor) -> Tensor:
    """Written through a view."""
    base = torch.zeros(2, 5, 24)
    base.view(2, 5, 3, 8)[:, :, 0] += x.view(2, 5, 3, 8)[:, :, 0].exp()
    return base + x


def each(function: Callable[..., Tensor], *dims: int) -> Callable[..., Tensor]:
    """``function`` under torch.vmap over these dimensions, the outer first."""
    for d in reversed(dims):
        function = torch.vmap(function, in_dims=d, out_dims=d)
    return function


MAPPED: dict[str, Case] = {
    "vmap": Case(each(lambda x: x.relu() * 2, 0)),
    "vmap_of_tokens": Case(each(lambda x: x.softmax(-1) - x, 0, 0)),
    "vmap_exp": Case(each(lambda x: x.exp(), 1), summed=()),
    "vmap_of_channels": none(each(lambda x: x.relu(), 2)),
    "vmap_weighted": both(lambda x, w: each(lambda a: a @ w, 0)(x), (4, 6), shapes=[(6, 4)]),
    "vmap_of_heads": both(lambda x: each(lambda a: a.relu(), 2)(x.view(2, 5, 3, 8)).flatten(2), (8,), (24,)),
    "vmap_normed": Case(lambda x: each(lambda a: F.layer_norm(a, (6,)), 0)(x), summed=()),
    "vmap_of_two": Case(lambda x, y: torch.vmap(lambda a, b: a * b, (0, 0))(x, y), widths=(6, 6)),
}
GROUPS = {"mapped": MAPPED, "moves": MOVES, "factors": FACTORS, "segments": SEGMENTS, "tensors made": MADE}
