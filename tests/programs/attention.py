"""Attention: torch's own call with all its flags, by hand, by einsum, linear, of channels, and from learned queries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .catalogue import Maker, step

HEADS, HEAD = 4, 3


def _heads(m: Maker, x: Tensor, heads: int, width: int = HEAD, *, bias: bool = True) -> Tensor:
    """[B, heads, T, width]."""
    return m.linear(x, heads * width, bias=bias).unflatten(-1, (heads, width)).transpose(1, 2)


def _out(m: Maker, y: Tensor, x: Tensor, *, residual: bool = True) -> Tensor:
    """Heads joined, through a linear layer; of another length, then the mean over positions."""
    y = y.transpose(1, 2).flatten(2)
    y = y if y.shape[1] == x.shape[1] else y.mean(1, keepdim=True)
    return x + m.linear(y, x.shape[-1]) if residual else y.expand(-1, x.shape[1], -1)


def _mask(kind: str, x: Tensor, keys: int) -> Tensor | None:
    ones = torch.ones(x.shape[1], keys, dtype=torch.bool, device=x.device).tril()
    return {"none": None, "bool": ones, "float": torch.zeros_like(ones, dtype=x.dtype).masked_fill(~ones, -1e4)}[kind]


@step(
    "attention",
    inputs=2,
    kv=(4, 2, 1),
    sharing=("gqa", "interleave", "expand"),
    causal=(False, True),
    mask=("none", "bool", "float"),
    scale=(None, 0.4),
    value=(3, 5),
    norm=(None, "rms", "layer"),
    residual=(True, False),
)
def sdpa(
    m: Maker,
    x: Tensor,
    y: Tensor,
    *,
    kv: int,
    sharing: str,
    causal: bool,
    mask: str,
    scale: float | None,
    value: int,
    norm: str | None,
    residual: bool,
) -> Tensor:
    """scaled_dot_product_attention of x to y, with fewer keys than queries."""
    q, k, v = _heads(m, x, HEADS), _heads(m, y, kv), _heads(m, y, kv, value)
    if norm == "rms":
        q, k = F.rms_norm(q, (HEAD,), m.weight(HEAD), 1e-5), F.rms_norm(k, (HEAD,), m.weight(HEAD), 1e-5)
    elif norm == "layer":
        q, k = F.layer_norm(q, (HEAD,)), F.layer_norm(k, (HEAD,))
    gqa = sharing == "gqa" and kv < HEADS
    if not gqa:
        k, v = (_share(t, HEADS // kv, sharing) for t in (k, v))
    attended = None if causal else _mask(mask, x, y.shape[1])
    z = F.scaled_dot_product_attention(q, k, v, attended, is_causal=causal, scale=scale, enable_gqa=gqa)
    return _out(m, z, x, residual=residual)


def _share(x: Tensor, times: int, how: str) -> Tensor:
    """Each key head serves ``times`` query heads."""
    if times == 1:
        return x
    if how == "expand":
        return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)
    return x.repeat_interleave(times, 1)


@step(
    "attention",
    inputs=2,
    form=("matmul", "einsum", "bmm", "packed", "no heads"),
    causal=(None, "tril", "where", "add"),
    kv=(4, 2),
    residual=(True, False),
)
def by_hand(m: Maker, x: Tensor, y: Tensor, *, form: str, causal: str | None, kv: int, residual: bool) -> Tensor:
    """Scores, softmax and values as products."""
    if form == "no heads":
        q, k, v = m.linear(x, 6), m.linear(y, 6), m.linear(y, 10)
        return m.linear(_softmax(q @ k.transpose(1, 2), causal) @ v, x.shape[-1])
    if form == "packed":
        q, k, v = m.linear(x, 3 * HEADS * HEAD).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = _heads(m, x, HEADS), _share(_heads(m, y, kv), HEADS // kv, "interleave"), _heads(m, y, HEADS)
    if form == "einsum":
        z = torch.einsum("bhst,bhtd->bhsd", _softmax(torch.einsum("bhsd,bhtd->bhst", q, k), causal), v)
    elif form == "bmm":
        q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
        z = torch.bmm(_softmax(torch.bmm(q, k.mT) * HEAD**-0.5, causal), v).unflatten(0, (-1, HEADS))
    else:
        z = _softmax(q @ k.transpose(-2, -1) / HEAD**0.5, causal) @ v
    return _out(m, z, x, residual=residual)


def _softmax(scores: Tensor, causal: str | None) -> Tensor:
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if causal == "tril":
        scores = scores.masked_fill(~seen, float("-inf"))
    elif causal == "where":
        scores = torch.where(seen, scores, torch.tensor(-1e4, dtype=scores.dtype))
    elif causal == "add":
        scores = scores + (~seen).to(scores.dtype) * -1e4
    return scores.softmax(-1)


@step(
    "attention",
    form=("sdpa", "causal", "hand", "hand causal", "batch of one"),
    latents=(4, 6),
    read=("flat", "mean", "last"),
)
def learned_queries(m: Maker, x: Tensor, *, form: str, latents: int, read: str) -> Tensor:
    """Queries that are a weight, or latents that look at the tokens; read by a linear layer on all of them."""
    k, v = _heads(m, x, 2), _heads(m, x, 2)
    q = m.weight(2, latents, HEAD).expand(x.shape[0], -1, -1, -1)
    if form == "batch of one":
        z = F.scaled_dot_product_attention(q[:1], k, v)
    elif form in ("sdpa", "causal"):
        z = F.scaled_dot_product_attention(q, k, v, is_causal=form == "causal")
    else:
        z = _softmax(q @ k.mT, "tril" if form == "hand causal" else None) @ v
    z = z.transpose(1, 2)
    z = {"flat": lambda: z.flatten(1), "mean": lambda: z.mean(1).flatten(1), "last": lambda: z[:, -1].flatten(1)}[
        read
    ]()
    return x + m.linear(z, x.shape[-1])[:, None]


@step("attention", latents=(4, 6), width=(6, 8), back=(True, False), causal=(True, False))
def latents(m: Maker, x: Tensor, *, latents: int, width: int, back: bool, causal: bool) -> Tensor:
    """Perceiver: a learned array attends to the tokens, an MLP on it, and the tokens attend back."""
    z = m.weight(latents, width).expand(x.shape[0], -1, -1)
    z = z + _attend(m, z, x, causal)
    z = z + m.linear(m.linear(z, 10).relu(), width)
    return x + (_attend(m, x, z, causal) if back else m.linear(z.mean(1, keepdim=True), x.shape[-1]))


def _attend(m: Maker, x: Tensor, y: Tensor, causal: bool) -> Tensor:
    z = F.scaled_dot_product_attention(_heads(m, x, 2), _heads(m, y, 2), _heads(m, y, 2), is_causal=causal)
    return m.linear(z.transpose(1, 2).flatten(2), x.shape[-1])


@step("attention", form=("normalized", "plain", "temperature", "packed"))
def channel_attention(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """Scores between channels of a head, as in XCiT."""
    q, k, v = (_heads(m, x, 2).transpose(-2, -1) for _ in range(3))
    if form == "packed":
        q, k, v = m.linear(x, 18).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 4, 1).unbind(0)
    if form == "normalized":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    scores = q @ k.transpose(-2, -1)
    scores = scores * m.weight(2, 1, 1) if form == "temperature" else scores
    return x + m.linear((scores.softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2), x.shape[-1])


@step("attention", form=("softmax", "relu", "elu", "einsum", "causal"))
def linear_attention(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """Keys times values first."""
    q, k, v = _heads(m, x, 2), _heads(m, x, 2), _heads(m, x, 2, 5)
    if form == "softmax":
        q, k = q.softmax(-1), k.softmax(-2)
    elif form in ("relu", "elu"):
        q, k = getattr(F, form)(q) + 0.1, getattr(F, form)(k)
    if form == "einsum":
        return _out(m, torch.einsum("bhtd,bhse,bhsd->bhte", q, v, k), x)
    if form == "causal":
        return _out(m, (torch.tril(q @ k.mT)) @ v, x)
    return _out(m, q @ (k.mT @ v), x)


@step("attention", form=("input", "both"))
def raw_query(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """The value itself is the query, in one head."""
    k = x if form == "both" else m.linear(x, x.shape[-1])
    z = F.scaled_dot_product_attention(x[:, None], k[:, None], m.linear(x, 6)[:, None])
    return m.linear(z[:, 0], 10)
