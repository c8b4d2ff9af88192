"""Ops in which the order of positions counts, along channels (where nothing can be cut) and along other dimensions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from rule_cases import Case, both
from torch import Tensor

NONE = {"linear": (), "summed": ()}


def heads(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Apply ``function`` to [2, 5, 3, 8], where it pins the 3."""
    return lambda x: function(x.view(2, 5, 3, 8)).flatten(2)


def grid(function: Callable[[Tensor], Tensor], *, keeps: bool = True) -> Case:
    return Case(heads(function), (8,), (8,) if keeps else (), widths=(24,))


MOVED: dict[str, Case] = {
    "roll": Case(lambda x: x.roll(1, -1), **NONE),
    "roll_all": Case(lambda x: x.roll(1), **NONE),
    "roll_two": Case(lambda x: x.roll((1, 2), (0, 1))),
    "roll_heads": grid(lambda x: x.roll(2, dims=-2)),
    "flip": Case(lambda x: x.flip(-1), **NONE),
    "flip_two": Case(lambda x: x.flip((0, -2))),
    "flip_heads": grid(lambda x: x.flip(dims=(2,))),
    "fliplr": Case(lambda x: x.fliplr()),
    "flipud": Case(lambda x: x.flipud()),
    "flipud_channels": Case(lambda x: x.movedim(-1, 0).flipud().movedim(0, -1), **NONE),
    "msort": Case(lambda x: x.msort()),
    "rot90": Case(lambda x: x.rot90(2, (1, 2)), **NONE),
    "rot90_elsewhere": Case(lambda x: x.rot90().transpose(0, 1)),
    # The result is tied to what it was made of: a choice of the 8 cannot vary along the 3.
    "rolled_heads": grid(lambda x: x + x.roll(1, 2)),
    "sorted_heads": grid(lambda x: x + x.sort(2)[0], keeps=False),
    "permuted_heads": grid(lambda x: x + x[:, :, torch.tensor([2, 0, 1]).repeat(3)][:, :, :3], keeps=True),
    "selected_heads": grid(lambda x: x + x.index_select(2, torch.tensor([2, 0, 1]))),
    "gathered_heads": grid(lambda x: x + x.gather(2, torch.tensor([2, 0, 1])[None, None, :, None].expand(2, 5, 3, 8))),
    "pooled_heads": grid(lambda x: x + F.max_pool1d(x.flatten(0, 1).mT, 3, 1, 1).mT.view(2, 5, 3, 8)),
    "unfolded_heads": grid(lambda x: x + F.pad(x, (0, 0, 1, 1)).unfold(2, 3, 1)[..., 0]),
    "repeated_heads": grid(lambda x: x + x.repeat_interleave(torch.tensor([2, 0, 1]), 2, output_size=3)),
    "rolled_positions": both(
        lambda x, w: F.embedding(x.topk(2, -1)[1].roll(1, -1).flip(1), w).flatten(2), (4, 6), shapes=[(6, 4)]
    ),
}
SCANS: dict[str, Case] = {
    "cumprod": Case(lambda x: x.cumprod(-1), **NONE),
    "cumprod_elsewhere": Case(lambda x: x.cumprod(dim=1)),
    "cumprod_heads": grid(lambda x: x.cumprod(-2)),
    "logcumsumexp": Case(lambda x: x.logcumsumexp(-1), **NONE),
    "logcumsumexp_heads": grid(lambda x: x.logcumsumexp(2), keeps=False),
    "cumsum_heads": Case(heads(lambda x: x.cumsum(-2)), (3, 8), (8,), widths=(24,)),
    "softmax_heads": both(heads(lambda x: x.softmax(-2) * x), (3, 8), (24,)),
    "log_softmax_heads": grid(lambda x: x.log_softmax(-2), keeps=False),
    "layer_norm_heads": Case(
        lambda x: F.layer_norm(x.view(2, 5, 8, 3).mT, (8,)).mT.flatten(2), (3, 8), (), widths=(24,)
    ),
    "cummax": Case(lambda x: x.cummax(-1)[0], **NONE),
    "cummax_heads": grid(lambda x: x.cummax(-2)[0] + x.cummin(2)[0]),
    "cummax_positions": grid(lambda x: x.cummax(-2)[1] * 1.0, keeps=False),
    "diff": Case(lambda x: x.diff(dim=-1), **NONE),
    "diff_twice": Case(lambda x: F.pad(x.diff(2, 1), (0, 0, 2, 0))),
    "diff_joined": Case(lambda x, y: x.diff(dim=1, prepend=y[:, :1]), widths=(6, 6)),
    "diff_ones": Case(lambda x: x.diff(dim=1, append=torch.ones(2, 1, 6)), summed=()),
}
RANKS: dict[str, Case] = {
    "kthvalue": Case(lambda x: x * x.kthvalue(2, -1, True)[0], **NONE),
    "kthvalue_elsewhere": Case(lambda x: x.exp() * x.kthvalue(2, 1, keepdim=True)[0]),
    "median": Case(lambda x: x * x.median(-1)[0].unsqueeze(-1), **NONE),
    "median_elsewhere": Case(lambda x: x.exp() * x.median(1, True)[0]),
    "nanmedian": Case(lambda x: x.exp() * x.nanmedian(1, True)[0]),
    "median_positions": Case(lambda x: x.median(1, True)[1] + x * 0, summed=()),
    "mode": Case(lambda x: x.exp() * x.round().mode(1, True)[0]),
    "quantile": Case(lambda x: x * x.quantile(0.3, -1, keepdim=True), **NONE),
    "quantile_elsewhere": Case(lambda x: x.exp() * x.quantile(0.3, 1, True) + x.nanquantile(0.7, 1).unsqueeze(1)),
    "quantiles": Case(lambda x: x.quantile(torch.tensor([0.1, 0.5]), 1).mT.reshape(2, 6, 2).sum(2)[:, None] * x),
    "quantile_heads": grid(lambda x: x.exp() * x.quantile(0.4, 2, True)),
    "median_heads": grid(lambda x: x.exp() * x.median(2, True)[0]),
}
FOURIER: dict[str, Case] = {
    "fft_elsewhere": Case(lambda x: torch.fft.fft(x, dim=1).real + torch.fft.ifft(x, dim=0).imag),
    "rfft_elsewhere": Case(lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=5, dim=1)),
    "fft2_elsewhere": Case(lambda x: torch.fft.fft2(x, dim=(0, 1)).abs() + torch.fft.ifft2(x, dim=(0, 1)).real),
    "fftn_elsewhere": Case(lambda x: torch.fft.irfftn(torch.fft.rfftn(x, s=(5,), dim=(1,)), s=(5,), dim=(1,))),
    "fftn_of_sizes": Case(lambda x: torch.fft.fftn(x.mT, s=(5,)).real.mT),
    "fft_heads": grid(lambda x: x + torch.fft.fft(x, dim=2).real),
}
GROUPS = {"fourier": FOURIER, "moved": MOVED, "scans": SCANS, "ranks": RANKS}
