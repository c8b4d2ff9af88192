"""Linear layers and products with weights of one or two dimensions, or of one matrix a head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .catalogue import Maker, step
from .program import WIDTHS


@step("linear", out=WIDTHS, bias=(True, False))
def linear(m: Maker, x: Tensor, *, out: int, bias: bool) -> Tensor:
    return m.linear(x, out, bias=bias)


@step(
    "linear", out=WIDTHS, form=("matmul", "einsum", "einsum rest", "implicit einsum", "addmm", "mm", "mv", "transposed")
)
def product(m: Maker, x: Tensor, *, out: int, form: str) -> Tensor:
    w, flat = m.weight(x.shape[-1], out), x.flatten(0, 1)
    forms = {
        "matmul": lambda: x @ w,
        "einsum": lambda: torch.einsum("btc,co->bto", x, w),
        "einsum rest": lambda: torch.einsum("...c,co->...o", x, w),
        "implicit einsum": lambda: torch.einsum("...i,ij", x, w),
        "addmm": lambda: torch.addmm(m.weight(out), flat, w).unflatten(0, x.shape[:2]),
        "mm": lambda: torch.mm(flat, w).view(*x.shape[:2], out),
        "mv": lambda: x * torch.mv(flat, w[:, 0]).view(*x.shape[:2], 1),
        "transposed": lambda: torch.matmul(w.t(), x.transpose(1, 2)).transpose(1, 2),
    }
    return forms[form]()


@step("linear", multiple=2, width=(3, 4, 5), form=("einsum", "matmul", "bmm", "head first"), residual=(True, False))
def per_head(m: Maker, x: Tensor, *, width: int, form: str, residual: bool) -> Tensor:
    """Block diagonal: each of two heads has its own matrix [d, e]."""
    batch, length, channels = x.shape
    heads, d = 2, channels // 2
    width = d if residual else width
    w, split = m.weight(heads, d, width), x.view(batch, length, heads, d)
    if form == "einsum":
        y = torch.einsum("bthd,hde->bthe", split, w)
    elif form == "matmul":
        y = (split.transpose(1, 2) @ w).transpose(1, 2)
    elif form == "head first":
        y = torch.einsum("hbtd,hde->bthe", split.permute(2, 0, 1, 3), w)
    else:
        y = torch.bmm(split.reshape(-1, heads, d).transpose(0, 1), w).transpose(0, 1)
    y = y.reshape(batch, length, heads * width)
    return x + y if residual else y


@step("linear", multiple=2, out=WIDTHS, bias=(True, False))
def merge_heads(m: Maker, x: Tensor, *, out: int, bias: bool) -> Tensor:
    """Heads with a weight [h, d, o], summed over both."""
    y = torch.einsum("bthd,hdo->bto", x.unflatten(-1, (2, -1)), m.weight(2, x.shape[-1] // 2, out))
    return y + m.weight(out) if bias else y


@step("linear", out=WIDTHS)
def split_heads(m: Maker, x: Tensor, *, out: int) -> Tensor:
    """A weight [c, h, d] makes heads, which are joined."""
    return torch.einsum("btc,chd->bthd", x, m.weight(x.shape[-1], 2, out // 2)).flatten(2)


@step("linear", rank=(2, 3, 4), out=WIDTHS, form=("product", "added", "two steps"))
def low_rank(m: Maker, x: Tensor, *, rank: int, out: int, form: str) -> Tensor:
    a, b = m.weight(x.shape[-1], rank), m.weight(rank, out)
    if form == "two steps":
        return x @ a @ b
    return x @ (a @ b) if form == "product" else x @ (m.weight(x.shape[-1], out) + a @ b)


@step("linear", inputs=2)
def bilinear(m: Maker, x: Tensor, y: Tensor) -> Tensor:
    """x W y of each token, as a factor of x."""
    return x * torch.einsum("btc,cd,btd->bt", x, m.weight(x.shape[-1], y.shape[-1]), y)[..., None].tanh()


@step("linear", hidden=WIDTHS, act=("relu", "gelu", "silu", "tanh"), residual=(True, False))
def mlp(m: Maker, x: Tensor, *, hidden: int, act: str, residual: bool) -> Tensor:
    y = m.linear(getattr(torch, act, getattr(F, act, None))(m.linear(x, hidden)), x.shape[-1])
    return x + y if residual else y


@step("linear", inputs=2)
def residual(m: Maker, x: Tensor, y: Tensor) -> Tensor:
    return x + m.fit(y, x.shape[-1])


@step("linear", out=WIDTHS, form=("scaled", "rows", "vector", "stacked", "three", "batched", "in_proj"))
def rarer_product(m: Maker, x: Tensor, *, out: int, form: str) -> Tensor:
    """Calls with a factor, slices of one weight, products of three, a vector."""
    n, flat = x.shape[-1], x.flatten(0, 1)
    if form == "in_proj":
        first, second = m.weight(2 * out, n).chunk(2, 0)
        return F.linear(x, first).relu() * F.linear(x, second)
    if form == "batched":
        bias, w = m.weight(x.shape[0], 1, out), m.weight(n, out)
        return torch.baddbmm(bias, x, w.expand(x.shape[0], -1, -1), beta=0.5, alpha=2.0)
    forms = {
        "scaled": lambda: torch.addmm(m.weight(out), flat, m.weight(n, out), beta=0.5, alpha=2.0).view(
            *x.shape[:2], out
        ),
        "rows": lambda: F.linear(x, m.weight(out + 4, n)[2:-2]),
        "vector": lambda: (x @ m.weight(n))[..., None] * m.weight(out),
        "stacked": lambda: torch.einsum("btc,kco->btko", x, m.weight(3, n, out)).amax(2),
        "three": lambda: torch.einsum("btc,cr,ro->bto", x, m.weight(n, 3), m.weight(3, out)),
    }
    return forms[form]()


@step("linear", form=("transposed", "summed", "pairs", "square", "tokens", "outer square"))
def einsum(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """Sums of products of the value with itself."""
    forms = {
        "transposed": lambda: torch.einsum("btc->bct", x).transpose(1, 2),
        "summed": lambda: x * torch.einsum("btc->bt", x)[..., None].tanh(),
        "pairs": lambda: torch.einsum("btc,bsc->bts", x, x).tanh() @ x,
        "square": lambda: x + torch.einsum("btc,btc->bt", x, x)[..., None].tanh(),
        "tokens": lambda: torch.einsum("btc,bsd->bcd", x, x).tanh().mean(1)[:, None].expand_as(x),
        "outer square": lambda: torch.einsum("btc,btd->btcd", x, x).flatten(2).tanh(),
    }
    return forms[form]()
