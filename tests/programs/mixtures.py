"""Larger pieces with a structure of their own: stacked experts, states, weights that activations make."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .catalogue import Maker, step

EXPERTS, HIDDEN = 4, 6


@step("mixtures", form=("bmm", "einsum", "loop", "index_add", "matmul"), gated=(False, True), shared=(False, True))
def stacked_experts(m: Maker, x: Tensor, *, form: str, gated: bool, shared: bool) -> Tensor:
    """Experts of two layers, [E, c, f] and [E, f, c], with weights of their best two."""
    n = x.shape[-1]
    scores = m.linear(x, EXPERTS)
    values, indices = scores.topk(2, -1)
    weights = torch.zeros_like(scores).scatter(-1, indices, values.softmax(-1))
    up, down = m.weight(EXPERTS, n, HIDDEN * (1 + gated)), m.weight(EXPERTS, HIDDEN, n)
    flat = x.flatten(0, 1)
    if form in ("bmm", "matmul"):
        rows = flat.expand(EXPERTS, -1, -1) if form == "matmul" else flat.repeat(EXPERTS, 1, 1)
        y = torch.matmul(_act(torch.bmm(rows, up) if form == "bmm" else rows @ up, gated), down)
        z = torch.einsum("enc,ne->nc", y, weights.flatten(0, 1)).view(x.shape)
    elif form == "einsum":
        y = torch.einsum("btef,efc->btec", _act(torch.einsum("btc,ecf->btef", x, up), gated), down)
        z = (y * weights[..., None]).sum(2)
    else:
        z = torch.zeros_like(x)
        for e in range(EXPERTS):
            y = _act(x @ up[e], gated) @ down[e] * weights[..., e : e + 1]
            z = z + y if form == "loop" else z.index_add(0, torch.arange(x.shape[0]), y)
    return x + z + m.linear(m.linear(x, 10).relu(), n) if shared else x + z


def _act(x: Tensor, gated: bool) -> Tensor:
    if not gated:
        return x.relu()
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


@step("mixtures", form=("selective", "diagonal", "wkv", "delta"), state=(3, 4))
def state_space(m: Maker, x: Tensor, *, form: str, state: int) -> Tensor:
    """A state that the tokens read and write one after the other."""
    n = x.shape[-1]
    write, read = m.linear(x, state), m.linear(x, state)
    decay = (-m.weight(n, state).exp()).exp()
    step_size = F.softplus(m.linear(x, n))
    h, outputs = x.new_zeros(x.shape[0], n, state), []
    for t in range(x.shape[1]):
        value = x[:, t]
        if form == "selective":
            h = (
                h * (decay.log() * step_size[:, t, :, None]).exp()
                + (step_size[:, t] * value)[..., None] * write[:, t, None]
            )
        elif form == "delta":
            h = h + (value - (h * write[:, t, None]).sum(-1))[..., None] * write[:, t, None] * 0.1
        else:
            h = h * decay + value[..., None] * write[:, t, None]
        outputs.append(torch.einsum("bcs,bs->bc", h, read[:, t]))
    y = torch.stack(outputs, 1)
    return x + (y * m.weight(n) if form == "diagonal" else y * F.silu(m.linear(x, n)))


@step("mixtures", form=("matrix", "scale", "bilinear", "rank one", "film"))
def made_weights(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """Weights that the value makes itself (a hypernetwork)."""
    n, summary = x.shape[-1], x.mean(1)
    forms: dict[str, Callable[[], Tensor]] = {
        "matrix": lambda: torch.bmm(x, m.linear(summary, n * 4).unflatten(-1, (n, 4))),
        "scale": lambda: x * m.linear(summary, n)[:, None],
        "bilinear": lambda: torch.einsum("btc,bcd->btd", x, m.linear(summary, 4 * n).view(-1, 4, n).transpose(1, 2)),
        "rank one": lambda: x + (x @ m.linear(summary, n)[..., None]) * m.linear(summary, n)[:, None],
        "film": lambda: _film(x, m.linear(summary, 2 * n)),
    }
    return forms[form]()


def _film(x: Tensor, both: Tensor) -> Tensor:
    scale, offset = both[:, None].chunk(2, -1)
    return x * (1 + scale) + offset


@step("mixtures", inputs=2, form=("flat", "pooled", "tokens", "kronecker"))
def outer_product(m: Maker, x: Tensor, y: Tensor, *, form: str) -> Tensor:
    """All products of two small values."""
    a, b = m.linear(x, 3), m.linear(y, 4)
    forms: dict[str, Callable[[], Tensor]] = {
        "flat": lambda: (a[..., None] * b[..., None, :]).flatten(2),
        "pooled": lambda: torch.einsum("bti,btj->bij", a, b).flatten(1)[:, None].expand(-1, x.shape[1], -1),
        "tokens": lambda: torch.einsum("bsi,bti->bst", m.linear(x, 4), b).softmax(-1) @ a,
        "kronecker": lambda: torch.einsum("bti,btj,ijo->bto", a, b, m.weight(3, 4, 9)),
    }
    return forms[form]()


@step("mixtures", multiple=2, form=("to tokens", "patches", "grid", "squeeze"), residual=(False, True))
def space(m: Maker, x: Tensor, *, form: str, residual: bool) -> Tensor:
    """Channels that become tokens, and tokens that become channels."""
    batch, length, n = x.shape
    if form == "to tokens":
        y = m.linear(x.reshape(batch, length * 2, n // 2), n // 2).relu().reshape(x.shape)
    elif form == "patches":
        y = m.linear(m.linear(x[:, :4].reshape(batch, 2, 2 * n), 9).mean(1), n)[:, None].expand(-1, length, -1)
    elif form == "grid":
        y = x.view(batch, length, 2, n // 2).permute(0, 3, 1, 2).relu().permute(0, 2, 3, 1).reshape(x.shape)
    else:
        y = m.linear(m.linear(x, 4).unsqueeze(2).relu().squeeze(), n)
    return x + y if residual else y


@step("mixtures", form=("cross entropy", "perplexity", "entropy", "gumbel"))
def likelihood(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """Log-probabilities of classes, picked and summed."""
    logits = m.linear(x, 5)
    target = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2]) % 5
    forms: dict[str, Callable[[], Tensor]] = {
        "cross entropy": lambda: F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(
            target.shape
        ),
        "perplexity": lambda: logits.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1).exp(),
        "entropy": lambda: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1),
        "gumbel": lambda: (logits.softmax(-1) * torch.arange(5, device=x.device)).sum(-1),
    }
    return x * forms[form]()[..., None]
