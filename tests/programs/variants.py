"""Attention as particular models have it: what they add to scores, heads, queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .catalogue import Maker, step

HEADS, HEAD = 3, 4


def _heads(m: Maker, x: Tensor, heads: int = HEADS, width: int = HEAD) -> Tensor:
    return m.linear(x, heads * width).unflatten(-1, (heads, width)).transpose(1, 2)


def _out(m: Maker, z: Tensor, x: Tensor) -> Tensor:
    return x + m.linear(z.transpose(1, 2).flatten(2), x.shape[-1])


BIASES: dict[str, Callable[[Maker, Tensor], Tensor]] = {
    "relative": lambda m, s: s + m.weight(HEADS, s.shape[-2], s.shape[-1]),
    "one for all heads": lambda m, s: s + m.weight(s.shape[-2], s.shape[-1]),
    "table": lambda m, s: s + F.embedding(_distances(s), m.weight(9, HEADS)).permute(2, 0, 1),
    "slopes": lambda m, s: s - m.weight(HEADS, 1, 1).exp() * _distances(s).to(s.dtype),
    "constant slopes": lambda m, s: s - _distances(s) * 2.0 ** -torch.arange(HEADS).to(s.dtype)[:, None, None],
    "temperature": lambda m, s: s * m.weight(HEADS, 1, 1).exp(),
    "sink": lambda m, s: torch.cat([s, m.weight(HEADS, 1, 1).expand(s.shape[0], -1, s.shape[2], 1)], -1),
    "capped": lambda m, s: 3.0 * (s / 3.0).tanh(),
    "talking before": lambda m, s: torch.einsum("bhst,hg->bgst", s, m.weight(HEADS, HEADS)),
}


def _distances(scores: Tensor) -> Tensor:
    places = torch.arange(scores.shape[-1], device=scores.device)
    return (places[:, None] - places).abs()


@step("attention", bias=tuple(BIASES), after=("none", "talking", "sigmoid", "relu squared"))
def biased_scores(m: Maker, x: Tensor, *, bias: str, after: str) -> Tensor:
    """Something is added to the scores, or heads are mixed before and after the softmax."""
    q, k, v = _heads(m, x), _heads(m, x), _heads(m, x)
    scores = BIASES[bias](m, q @ k.mT)
    if after in ("none", "talking"):
        shares = scores.softmax(-1)
    else:
        shares = scores.sigmoid() if after == "sigmoid" else scores.relu().square()
    shares = shares[..., : x.shape[1]]
    if after == "talking":
        shares = torch.einsum("bhst,hg->bgst", shares, m.weight(HEADS, HEADS))
    return _out(m, shares @ v, x)


def _rotate(x: Tensor, form: str) -> Tensor:
    """Rotary embedding of [B, h, T, d]."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * 0.5 ** torch.arange(half, device=x.device)
    cos, sin = angles.to(x.dtype).cos(), angles.to(x.dtype).sin()
    if form == "complex":
        turned = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * torch.complex(cos, sin)
        return torch.view_as_real(turned).flatten(-2)
    if form == "interleaved":
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    if form == "halves":
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return x * torch.cat([cos, cos], -1) + torch.cat([-b, a], -1) * torch.cat([sin, sin], -1)


@step("attention", form=("table", "halves", "interleaved", "partial", "complex"), kv=(1, 3), sink=(False, True))
def rotary(m: Maker, x: Tensor, *, form: str, kv: int, sink: bool) -> Tensor:
    """Rotary embedding of queries and keys, of the first half of the channels if ``partial``."""
    q, k, v = _heads(m, x), _heads(m, x, kv), _heads(m, x, kv, 5)
    if form == "partial":
        q, k = (torch.cat([_rotate(t[..., :2], "table"), t[..., 2:]], -1) for t in (q, k))
    else:
        q, k = _rotate(q, form), _rotate(k, form)
    if sink:
        k = torch.cat([m.weight(kv, 1, HEAD).expand(x.shape[0], -1, -1, -1), k], 2)
        v = torch.cat([torch.zeros_like(v[:, :, :1]), v], 2)
    return _out(m, F.scaled_dot_product_attention(q, k, v, enable_gqa=kv < HEADS), x)


@step(
    "attention",
    form=("low rank", "shared k v", "gated", "head gate", "differential", "q is k", "values of input", "reuse"),
)
def special(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """Latent keys and values, one projection for two purposes, gates on heads, differences of two attentions."""
    q = _heads(m, x)
    if form == "low rank":
        latent = m.linear(x, 6)
        k, v = _heads(m, latent), _heads(m, latent)
    elif form in ("shared k v", "q is k"):
        k = v = _heads(m, x)
        q = k if form == "q is k" else q
    elif form == "values of input":
        k, v = _heads(m, x), x[:, None].expand(-1, HEADS, -1, -1)
    else:
        k, v = _heads(m, x), _heads(m, x)
    z = F.scaled_dot_product_attention(q, k, v)
    if form == "gated":
        z = z * _heads(m, x).sigmoid()
    elif form == "head gate":
        z = z * m.linear(x, HEADS).sigmoid().transpose(1, 2)[..., None]
    elif form == "differential":
        z = z - m.weight(HEADS, 1, 1) * F.scaled_dot_product_attention(_heads(m, x), _heads(m, x), v)
    elif form == "reuse":
        z = z + F.scaled_dot_product_attention(k, q, v)
    return _out(m, z, x)


@step("attention", form=("groups last", "groups first", "five dimensions"), value=(4, 5))
def grouped_einsum(m: Maker, x: Tensor, *, form: str, value: int) -> Tensor:
    """Two KV heads with three queries each, the groups as a dimension of their own."""
    k, v = m.linear(x, 2 * HEAD).unflatten(-1, (2, HEAD)), m.linear(x, 2 * value).unflatten(-1, (2, value))
    if form == "groups first":
        q = m.linear(x, 6 * HEAD).unflatten(-1, (3, 2, HEAD)).transpose(2, 3)
    else:
        q = m.linear(x, 6 * HEAD).unflatten(-1, (2, 3, HEAD))
    if form == "five dimensions":
        scores = q.permute(0, 2, 3, 1, 4) @ k.permute(0, 2, 1, 3)[:, :, None].mT
        z = (scores.softmax(-1) @ v.permute(0, 2, 1, 3)[:, :, None]).permute(0, 3, 1, 2, 4)
    else:
        shares = torch.einsum("bskgd,btkd->bkgst", q, k).softmax(-1)
        z = torch.einsum("bkgst,btkd->bskgd", shares, v)
    return x + m.linear(z.flatten(2), x.shape[-1])


@step("attention", form=("separate", "out", "all"), bias=(True, False))
def head_weights(m: Maker, x: Tensor, *, form: str, bias: bool) -> Tensor:
    """Projections stored with a dimension for the heads: [c, h, d] in, [h, d, c] out."""
    n = x.shape[-1]

    def project() -> Tensor:
        y = torch.einsum("btc,chd->bhtd", x, m.weight(n, HEADS, HEAD))
        return y + m.weight(HEADS, 1, HEAD) if bias else y

    q, k = (project(), project()) if form != "out" else (_heads(m, x), _heads(m, x))
    v = project() if form == "all" else _heads(m, x)
    z = (q @ k.mT).softmax(-1) @ v
    if form == "separate":
        return _out(m, z, x)
    return x + torch.einsum("bhtd,hdc->btc", z, m.weight(HEADS, HEAD, n))
