"""Weights that are functions of others, and weights that are used more than once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from .catalogue import Maker, step
from .program import WIDTHS

COMPUTED: dict[str, Callable[[Maker, Tensor], Tensor]] = {
    "exp": lambda m, w: w.exp(),
    "tanh": lambda m, w: w.tanh(),
    "plus one": lambda m, w: w + 1,
    "abs": lambda m, w: w.abs(),
    "softmax": lambda m, w: w.softmax(-1),
    "softmax of columns": lambda m, w: w.softmax(0),
    "weight norm": lambda m, w: m.weight(w.shape[0], 1) * w / (w.norm(dim=1, keepdim=True) + 1e-3),
    "standardised": lambda m, w: (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-3),
    "triangle": lambda m, w: w.tril(),
    "scaled rows": lambda m, w: w * m.weight(w.shape[0], 1),
    "low rank": lambda m, w: w + m.weight(w.shape[0], 2) @ m.weight(2, w.shape[1]),
    "rounded": lambda m, w: (w * 4).round() / 4,
    "halves": lambda m, w: torch.cat([w[:2], w[2:] * 0.5]),
    "masked": lambda m, w: w * (w > 0),
    "symmetric product": lambda m, w: w @ (w.t() @ w),
}


@step("weights", out=WIDTHS, form=tuple(COMPUTED), bias=(False, True))
def computed(m: Maker, x: Tensor, *, out: int, form: str, bias: bool) -> Tensor:
    w = COMPUTED[form](m, m.weight(out, x.shape[-1]))
    return F.linear(x, w, m.weight(out) if bias else None)


@step("weights", form=("weight_norm", "module"))
def parametrized(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """The weight norm of torch, as its fused call or as a parametrization."""
    width = x.shape[-1]
    if form == "weight_norm":
        return F.linear(x, torch._weight_norm(m.weight(8, width), m.weight(8, 1), 0))
    return m.layer(lambda: parametrizations.weight_norm(nn.Linear(width, 8)))(x)


@step("weights", hidden=WIDTHS, form=("t", "mT", "einsum", "bias"))
def autoencoder(m: Maker, x: Tensor, *, hidden: int, form: str) -> Tensor:
    """The decoder is the encoder transposed."""
    w = m.weight(hidden, x.shape[-1])
    h = F.linear(x, w).relu()
    if form == "einsum":
        return torch.einsum("bth,hc->btc", h, w)
    return h @ (w.t().t() if form != "mT" else w.mT.mT) + (m.weight(x.shape[-1]) if form == "bias" else 0)


@step("weights", inputs=2, between=(True, False))
def used_twice(m: Maker, x: Tensor, y: Tensor, *, between: bool) -> Tensor:
    """One square linear layer on two values, or twice on one."""
    width = x.shape[-1]
    layer = m.layer(lambda: nn.Linear(width, width))
    return layer(layer(x).relu()) if between else layer(x) + layer(m.fit(y, width)).tanh()


@step("weights", times=(2, 3), hidden=(8, 10), norm=("none", "rms", "layer", "shared"))
def universal(m: Maker, x: Tensor, *, times: int, hidden: int, norm: str) -> Tensor:
    """The same block again and again, as in universal transformers."""
    width = x.shape[-1]
    up, down = m.layer(lambda: nn.Linear(width, hidden)), m.layer(lambda: nn.Linear(hidden, width))
    norms = {"rms": lambda: nn.RMSNorm(width, eps=1e-6), "layer": lambda: nn.LayerNorm(width)}
    layer = m.layer(norms["layer" if norm == "shared" else norm]) if norm != "none" else nn.Identity()
    for _ in range(times):
        x = x + down(up(layer(x)).relu())
    return layer(x) if norm == "shared" else x


@step("weights", form=("bias of weight", "row", "mean row", "gram", "distances", "factor"))
def borrowed(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """A weight that serves another purpose as well."""
    width = x.shape[-1]
    w = m.weight(8, width)
    extra = {"bias of weight": lambda: w[0], "row": lambda: w[-1].tanh(), "mean row": lambda: w.mean(0)}
    if form == "gram":
        return x @ (w.t() @ w)
    if form == "distances":
        return F.linear(x, w).softmax(-1) @ (w[:, None] - w).square().mean(-1)
    if form == "factor":
        factor = m.weight(8, 5)
        return F.linear(x, w).tanh() @ (factor @ factor.t())
    return x + F.linear(F.linear(x, w).relu(), w.t(), extra[form]())


@step("weights", form=("block_diag", "cat", "stack", "fused"))
def joined(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """One weight made of several."""
    n = x.shape[-1]
    a, b = m.weight(4, n), m.weight(6, n)
    if form == "block_diag":
        return F.linear(torch.cat([x, x], -1), torch.block_diag(a, b))
    if form == "stack":
        return torch.einsum("btc,koc->btko", x, torch.stack([a, b[:4]])).flatten(2)
    w = torch.cat([a, b])
    return F.linear(x, w) if form == "cat" else torch.cat(F.linear(x, w).split([4, 6], -1)[::-1], -1)
