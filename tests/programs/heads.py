"""Heads that see each other: units may be chosen anew in each head only where nothing lines up units of two heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .catalogue import Maker, step

HEADS, WIDTH = 3, 4

MIXED: dict[str, Callable[[Maker, Tensor], Tensor]] = {
    "alone": lambda m, y: y.relu(),
    "softmax": lambda m, y: y.softmax(2),
    "soft choice": lambda m, y: y * y.tanh().softmax(2),
    "cumsum": lambda m, y: y.cumsum(2),
    "layer norm": lambda m, y: F.layer_norm(y.mT, (HEADS,)).mT,
    "mean": lambda m, y: y - y.mean(2, keepdim=True),
    "largest": lambda m, y: y * y.amax(2, keepdim=True),
    "normalize": lambda m, y: F.normalize(y, dim=2),
    "residual mix": lambda m, y: y + torch.einsum("bthd,hg->btgd", y, m.weight(HEADS, HEADS)),
    "similarity": lambda m, y: y * (y @ y.mT).tanh().sum(-1, keepdim=True),
    "attention": lambda m, y: (y @ y.mT).softmax(-1) @ y,
    "distances": lambda m, y: y * (y[:, :, :, None] - y[:, :, None]).square().sum((-1, -2))[..., None].tanh(),
    "other way": lambda m, y: (y.mT @ y).tanh() @ y.mT,
    "permuted": lambda m, y: y + y[:, :, [1, 2, 0]],
    "first": lambda m, y: y * y[:, :, :1],
    "rolled": lambda m, y: y + y.roll(1, 2),
    "best head": lambda m, y: y.gather(2, y.sum(-1).argmax(-1)[..., None, None].expand(-1, -1, 1, WIDTH)).expand_as(y),
    "scaled": lambda m, y: y * m.weight(HEADS, WIDTH),
    "gram": lambda m, y: y * (_gram(m.weight(HEADS, WIDTH)).sum(0)[:, None]),
}


def _gram(w: Tensor) -> Tensor:
    return w @ w.t()


@step("mixtures", form=tuple(MIXED), into=("linear", "einsum"), out=("linear", "einsum", "sum", "sum over heads"))
def mixed_heads(m: Maker, x: Tensor, *, form: str, into: str, out: str) -> Tensor:
    """Heads from a linear layer or from a weight [h, c, d], mixed, and read by one or the other."""
    n = x.shape[-1]
    if into == "linear":
        y = m.linear(x, HEADS * WIDTH).unflatten(-1, (HEADS, WIDTH))
    else:
        y = torch.einsum("btc,hcd->bthd", x, m.weight(HEADS, n, WIDTH))
    y = MIXED[form](m, y)
    if form == "other way":
        y = y.mT
    outs: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: m.linear(y.flatten(2), n),
        "einsum": lambda: torch.einsum("bthd,hdc->btc", y, m.weight(HEADS, WIDTH, n)),
        "sum": lambda: y.sum((2, 3))[..., None],
        "sum over heads": lambda: m.linear(y.sum(2), n),
    }
    return x + outs[out]()
