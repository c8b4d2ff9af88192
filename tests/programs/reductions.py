"""Reductions over channels and over tokens, and running ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .catalogue import Maker, step

REDUCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sum": lambda x, d: x.sum(d, keepdim=True),
    "mean": lambda x, d: x.mean(d, keepdim=True),
    "amax": lambda x, d: x.amax(d, keepdim=True),
    "amin": lambda x, d: x.amin(d, keepdim=True),
    "max": lambda x, d: x.max(d, keepdim=True).values,
    "logsumexp": lambda x, d: x.logsumexp(d, keepdim=True),
    "var": lambda x, d: x.var(d, keepdim=True),
    "std": lambda x, d: x.std(d, keepdim=True, correction=0),
    "norm": lambda x, d: x.norm(dim=d, keepdim=True),
    "norm 1": lambda x, d: x.norm(1, dim=d, keepdim=True),
    "vector norm": lambda x, d: torch.linalg.vector_norm(x, dim=d, keepdim=True),
    "squeezed": lambda x, d: x.sum(d).unsqueeze(d),
    "prod": lambda x, d: x.tanh().prod(d, keepdim=True),
    "count": lambda x, d: (x > 0).sum(d, keepdim=True).to(x.dtype),
    "any": lambda x, d: (x > 1).any(d, keepdim=True).to(x.dtype),
    "all": lambda x, d: (x > -1).all(d, keepdim=True).to(x.dtype),
}


@step("reductions", form=tuple(REDUCTIONS), dim=(-1, 1, 2), use=("add", "multiply", "weight", "alone", "activated"))
def reduce(m: Maker, x: Tensor, *, form: str, dim: int, use: str) -> Tensor:
    """A reduction, joined with the value again."""
    r = REDUCTIONS[form](x.tanh() if use == "activated" else x, dim)
    if use == "alone":
        return r.expand(x.shape[0], x.shape[1], -1)
    if use == "weight":
        return r * m.weight(x.shape[-1])
    return x * r.tanh() if use == "multiply" else x + r


RUNNING: dict[str, Callable[[Tensor, int], Tensor]] = {
    "cumsum": lambda x, d: x.cumsum(d),
    "cumsum of exp": lambda x, d: x.tanh().exp().cumsum(d),
    "cumprod": lambda x, d: x.tanh().cumprod(d),
    "diff": lambda x, d: torch.cat([x.diff(dim=d), x.narrow(d, 0, 1)], d),
    "softmax": lambda x, d: x.softmax(d),
    "softmin": lambda x, d: (-x).softmax(d),
    "softmax of tanh": lambda x, d: x.tanh().softmax(d),
    "soft average": lambda x, d: x * x.softmax(d),
    "attention pool": lambda x, d: x + (x * x.softmax(d)).sum(d, keepdim=True),
}


@step("reductions", form=tuple(RUNNING), dim=(-1, 1))
def running(m: Maker, x: Tensor, *, form: str, dim: int) -> Tensor:
    return RUNNING[form](x, dim)


@step("reductions", multiple=2, form=("heads", "channels of heads", "all"), kind=("sum", "mean", "amax"))
def reduce_heads(m: Maker, x: Tensor, *, form: str, kind: str) -> Tensor:
    """Over the heads, over each head's channels, or over all but the batch."""
    heads = x.unflatten(-1, (2, -1))
    if form == "all":
        return x + getattr(x.flatten(1), kind)(-1)[:, None, None]
    return getattr(heads, kind)(2 if form == "heads" else 3)


@step("reductions", inputs=2, form=("cosine", "distance", "dot", "softmax"))
def similarity(m: Maker, x: Tensor, y: Tensor, *, form: str) -> Tensor:
    """How alike two values are, as a factor."""
    y = m.fit(y, x.shape[-1])
    forms: dict[str, Callable[[], Tensor]] = {
        "cosine": lambda: (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1) + 1e-3),
        "distance": lambda: (x - y).square().mean(-1),
        "dot": lambda: torch.einsum("btc,btc->bt", x, y),
        "softmax": lambda: (x.softmax(-1) * y).sum(-1),
    }
    return x * forms[form]()[..., None]


@step("reductions", kind=("sum", "mean", "amax", "var", "norm", "logsumexp"), over=("both", "all", "batch"))
def reduce_several(m: Maker, x: Tensor, *, kind: str, over: str) -> Tensor:
    """Over several dimensions at once."""
    dims = {"both": (1, 2), "all": (0, 1, 2), "batch": (0,)}[over]
    if kind == "norm":
        return x + torch.linalg.vector_norm(x, dim=dims, keepdim=True).tanh()
    return x + getattr(x, kind)(dims, keepdim=True).tanh()
