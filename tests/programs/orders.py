"""Ops in which order counts, ranks, pools, diagonals, computed weights: on channels, on tokens and on heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from .catalogue import Maker, step

ORDERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "roll": lambda x, d: x.roll(1, d),
    "roll two": lambda x, d: x.roll((1, -1), (d, 0)),
    "flip": lambda x, d: x.flip(d),
    "flip two": lambda x, d: x.flip((0, d)),
    "cumprod": lambda x, d: x.tanh().cumprod(d),
    "cummax": lambda x, d: x.cummax(d).values,
    "cummin": lambda x, d: x.cummin(d)[0],
    "cummax positions": lambda x, d: x.cummax(d).indices.to(x.dtype) * x,
    "cumsum": lambda x, d: x.cumsum(d),
    "logcumsumexp": lambda x, d: x.tanh().logcumsumexp(d),
    "diff": lambda x, d: x.diff(dim=d, prepend=x.narrow(d, 0, 1)),
    "softmax": lambda x, d: x.softmax(d),
    "log_softmax": lambda x, d: x.log_softmax(d),
    "kthvalue": lambda x, d: x + x.kthvalue(2, d, True).values,
    "median": lambda x, d: x * x.median(d, True).values,
    "mode": lambda x, d: x + x.round().mode(d, True)[0],
    "sort": lambda x, d: x.sort(d).values,
    "renorm": lambda x, d: x.renorm(2, d, 0.7),
    "fft": lambda x, d: torch.fft.fft(x, dim=d).real,
    "quantile": lambda x, d: x * x.quantile(0.3, d, True),
    "vmap": lambda x, d: torch.vmap(lambda a: a.tanh() * a, in_dims=d, out_dims=d)(x),
    "aminmax": lambda x, d: x * sum(x.aminmax(dim=d, keepdim=True)),
    "cosine": lambda x, d: x * F.cosine_similarity(x, x.tanh() + 0.1 * x, d).unsqueeze(d),
}


@step("orders", form=tuple(ORDERS), over=("channels", "tokens", "heads", "head channels"), multiple=6)
def ordered(m: Maker, x: Tensor, *, form: str, over: str) -> Tensor:
    if over in ("channels", "tokens"):
        return ORDERS[form](x, -1 if over == "channels" else 1)
    heads = x.unflatten(-1, (3, -1))
    return ORDERS[form](heads, 2 if over == "heads" else -1).flatten(2)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: F.max_pool1d(x, 3, 1, 1),
    "average": lambda x: F.avg_pool1d(x, 3, 1, 1),
    "adaptive": lambda x: F.adaptive_avg_pool1d(x, x.shape[-1] - 1),
    "adaptive max": lambda x: F.adaptive_max_pool1d(x, x.shape[-1]),
    "max with positions": lambda x: F.max_pool1d(x, 3, 1, 1, return_indices=True)[0],
    "positions": lambda x: F.max_pool1d(x, 3, 1, 1, return_indices=True)[1].to(x.dtype),
    "lp": lambda x: F.lp_pool1d(x, 2, 2, 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "exact": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "linear": lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
    "channel shuffle": lambda x: F.channel_shuffle(x.unsqueeze(-1), 2).squeeze(-1),
    "glu": lambda x: F.glu(x, 1),
    "glu of heads": lambda x: F.glu(x.unflatten(1, (2, -1)), 2).flatten(1, 2),
}


@step("orders", form=tuple(POOLS), multiple=4, of=("channels", "tokens"))
def pooled(m: Maker, x: Tensor, *, form: str, of: str) -> Tensor:
    """Over tokens, as is usual, or over channels."""
    y = POOLS[form](x.mT).mT if of == "channels" or x.shape[1] % 4 else POOLS[form](x)
    return F.pad(y, (0, 0, 0, x.shape[1] - y.shape[1])) if y.shape[1] < x.shape[1] else y[:, : x.shape[1]]


@step("orders", form=("shuffle", "unshuffle", "both"), hidden=(8, 12))
def pixels(m: Maker, x: Tensor, *, form: str, hidden: int) -> Tensor:
    """Sub-pixel convolution; tokens and channels as an image of hidden · T · 4."""
    n = x.shape[-1]
    image = m.linear(x, hidden * 4).unflatten(-1, (hidden, 4)).movedim(2, 1).repeat(1, 1, 4, 1)[:, :, :4]
    y = F.pixel_unshuffle(image, 2) if form == "unshuffle" else F.pixel_shuffle(image, 2)
    if form == "both":
        y = F.pixel_unshuffle(y.relu(), 2)
    return x + m.linear(y.movedim(1, -1).flatten(1).unsqueeze(1), n)


@step("orders", form=("diagonal", "diag", "embed", "embed dims", "select", "slice", "trace", "einsum"))
def diagonals(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """Diagonals of weights and of products, writes at fixed positions."""
    n = x.shape[-1]
    square: Callable[[], Tensor] = lambda: m.weight(n, n)  # noqa: E731
    forms: dict[str, Callable[[], Tensor]] = {
        "diagonal": lambda: x * (square() @ square()).diagonal(),
        "diag": lambda: x @ m.weight(n).diag() + x,
        "embed": lambda: (x.diag_embed() @ m.weight(n, 5)).flatten(2),
        "embed dims": lambda: x.diag_embed(0, 1, -1).sum(1),
        "select": lambda: x.select_scatter(x[:, 0] * m.weight(n), 1, 2),
        "slice": lambda: x.slice_scatter(x[:, :2].relu(), 1, 1, 3),
        "trace": lambda: x * torch.einsum("ii->", square()),
        "einsum": lambda: x * torch.einsum("tii->ti", m.weight(x.shape[1], n, n)),
    }
    return forms[form]()


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm of columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral norm": parametrizations.spectral_norm,
}


@step("orders", form=tuple(COMPUTED), layer=("linear", "conv"), residual=(True, False))
def computed_weight(m: Maker, x: Tensor, *, form: str, layer: str, residual: bool) -> Tensor:
    """Layers whose weights are computed at each call."""
    n = x.shape[-1]
    if layer == "linear":
        y = m.layer(lambda: COMPUTED[form](nn.Linear(n, n)))(x)
    else:
        y = m.layer(lambda: COMPUTED[form](nn.Conv1d(n, n, 3, padding=1)))(x.mT).mT
    return x + y.relu() if residual else y


PRODUCTS: dict[str, Callable[[Maker, Tensor, int], Tensor]] = {
    "outer": lambda m, x, n: x @ torch.outer(m.weight(n), m.weight(10)),
    "outer of one": lambda m, x, n: x + x @ (lambda v: torch.outer(v, v.tanh()))(m.weight(n)),
    "inner": lambda m, x, n: torch.inner(x, m.weight(10, n)),
    "addr": lambda m, x, n: x @ torch.addr(m.weight(n, 10), m.weight(n), m.weight(10)),
    "addmv": lambda m, x, n: x * torch.addmv(m.weight(n), m.weight(n, 9), m.weight(9)),
    "addbmm": lambda m, x, n: x @ torch.addbmm(m.weight(n, 10), m.weight(3, n, 6), m.weight(3, 6, 10)),
    "vdot": lambda m, x, n: x * torch.vdot(m.weight(9), m.weight(9)),
    "implicit": lambda m, x, n: torch.einsum("...i,ij", x, m.weight(n, 10)),
    "letters": lambda m, x, n: torch.einsum("bti,i", x, m.weight(1)).unsqueeze(-1) * x,
    "matrix norm": lambda m, x, n: x * torch.linalg.matrix_norm(x, 2, keepdim=True).tanh(),
    "frobenius": lambda m, x, n: x * torch.linalg.norm(x, dim=(1, 2), keepdim=True).tanh(),
    "nuclear of heads": lambda m, x, n: (
        x * torch.linalg.matrix_norm(x.unflatten(-1, (2, -1)), "nuc").unsqueeze(-1).tanh()
    ),
    "squeezed": lambda m, x, n: m.linear(x, 2).unsqueeze(1).squeeze() * m.weight(2),
    "extremes": lambda m, x, n: x * (x.max() + x.min()),
    "bag": lambda m, x, n: (
        x + F.embedding_bag(torch.arange(x.shape[1], device=x.device).view(-1, 1), m.weight(9, n), mode="sum")
    ),
}


@step("orders", form=tuple(PRODUCTS), multiple=2)
def rarer_products(m: Maker, x: Tensor, *, form: str) -> Tensor:
    return PRODUCTS[form](m, x, x.shape[-1])
