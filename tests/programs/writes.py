"""Writes in place, to a value or to a view of it, seen through the value, that view or another one made before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .catalogue import Maker, step

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x,
    "heads": lambda x: x.view(*x.shape[:2], 2, -1),
    "transposed": lambda x: x.transpose(1, 2),
    "flat": lambda x: x.flatten(0, 1),
    "first chunk": lambda x: x.chunk(2, -1)[0],
    "last chunk": lambda x: x.chunk(2, -1)[1],
    "split": lambda x: x.split([x.shape[-1] - 2, 2], -1)[0],
    "slice": lambda x: x[..., 1:-1],
    "step": lambda x: x[..., ::2],
    "head": lambda x: x.view(*x.shape[:2], 2, -1)[:, :, 1],
    "unbound": lambda x: x.view(*x.shape[:2], 2, -1).unbind(2)[0],
    "token": lambda x: x[:, 0],
    "later tokens": lambda x: x[:, 1:],
    "new dimension": lambda x: x.unsqueeze(-1),
}


def _write(m: Maker, x: Tensor, operation: str) -> Tensor:
    width = x.shape[-1]
    operations: dict[str, Callable[[], Tensor]] = {
        "add number": lambda: x.add_(1.0),
        "multiply": lambda: x.mul_(0.5),
        "add weight": lambda: x.add_(m.weight(width)),
        "multiply by weight": lambda: x.mul_(m.weight(width)),
        "add copy": lambda: x.add_(m.linear(x.clone(), width)),
        "copy": lambda: x.copy_(m.linear(x.clone(), width).tanh()),
        "copy number": lambda: x.copy_(torch.ones_like(x)),
        "fill": lambda: x.masked_fill_(x > 0.5, 0.0),
        "fill one": lambda: x.masked_fill_(x > 0.5, 1.0),
        "fill all": lambda: x.fill_(0.5),
        "zero": lambda: x.zero_(),
        "relu": lambda: x.relu_(),
        "sigmoid": lambda: x.sigmoid_(),
        "clamp": lambda: x.clamp_(-0.5, 0.5),
    }
    return operations[operation]()


OPERATIONS = (
    *("add number", "multiply", "add weight", "multiply by weight", "add copy", "copy", "copy number", "fill"),
    *("fill one", "fill all", "zero", "relu", "sigmoid", "clamp"),
)


@step(
    "writes",
    multiple=2,
    writes=True,
    own=(True, False),
    target=tuple(VIEWS),
    operation=OPERATIONS,
    earlier=tuple(VIEWS),
    result=("base", "target", "returned", "earlier", "mean of earlier", "sum of base"),
)
def write(m: Maker, x: Tensor, *, own: bool, target: str, operation: str, earlier: str, result: str) -> Tensor:
    """Two views are made, one is written to, and something is used. Without ``own`` other steps see the write, too."""
    base = x.clone() if own else x
    if not base.is_contiguous():
        base = base.contiguous()
    before, written = VIEWS[earlier](base), VIEWS[target](base)
    returned = _write(m, written, operation)
    if result in ("base", "sum of base"):
        return base if result == "base" else base.sum(-1, keepdim=True) * m.weight(x.shape[-1])
    if result == "mean of earlier":
        return base + before.mean()
    return _as_tokens({"target": written, "returned": returned, "earlier": before}[result], base)


def _as_tokens(view: Tensor, base: Tensor) -> Tensor:
    """A view as [B, T, C]: with its own channels, or as a factor of the value where it has others."""
    if view.ndim == 4:
        return view.flatten(2)
    if view.ndim == 2 and view.shape[0] == base.shape[0]:
        return base * view.mean(-1)[:, None, None]
    if view.ndim == 2:
        return view.unflatten(0, base.shape[:2])
    if view.shape[1] == base.shape[1]:
        return view
    return view.transpose(1, 2) if view.shape[1] == base.shape[2] else base + view.mean(1, keepdim=True)


@step(
    "writes",
    multiple=2,
    inputs=2,
    form=("chunks", "halves", "first", "token", "steps", "heads", "zeros", "index_put", "weight", "where"),
    start=("zeros", "constant", "value"),
)
def assign(m: Maker, x: Tensor, y: Tensor, *, form: str, start: str) -> Tensor:
    """A tensor that the step makes and fills by slices; ``constant`` depends on no input until then."""
    y, half = m.fit(y, x.shape[-1]), x.shape[-1] // 2
    starts = {"zeros": x.new_zeros, "constant": lambda shape: torch.zeros(shape, dtype=x.dtype)}
    out = x.clone() if start == "value" else starts[start](x.shape)
    if form == "chunks":
        a, b = out.chunk(2, -1)
        a.copy_(y[..., :half])
        b.add_(x[..., half:])
    elif form == "halves":
        out[..., :half], out[..., half:] = x[..., half:], y[..., :half]
    elif form == "first":
        out[..., :half] = y[..., :half]
    elif form == "token":
        out[:, 0] = y[:, -1]
    elif form == "steps":
        out[..., ::2], out[..., 1::2] = x[..., 1::2], y[..., ::2]
    elif form == "heads":
        out.view(*x.shape[:2], 2, half)[:, :, 0] = y[..., :half]
    elif form == "zeros":
        out.copy_(x)
        out += y
    elif form == "index_put":
        out.index_put_((torch.tensor([0, 2], device=x.device),), x[:2])
    elif form == "weight":
        out[:, 1] = m.weight(x.shape[-1])
    else:
        out[x > 0.5] = 0.25
        out += x
    return out


@step("writes", multiple=2, writes=True, form=("+=", "*=", "slice +=", "relu_", "both chunks", "swap"))
def augmented(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """The value itself is changed, for all later steps."""
    half = x.shape[-1] // 2
    if form == "+=":
        x += m.weight(x.shape[-1])
    elif form == "*=":
        x *= m.linear(x.clone(), x.shape[-1]).sigmoid()
    elif form == "slice +=":
        x[..., :half] += x[..., half:]
    elif form == "relu_":
        x.relu_()
    elif form == "both chunks":
        for part in x.chunk(2, -1):
            part.mul_(m.weight(half))
    else:
        a, b = x[..., :half].clone(), x[..., half:]
        x[..., :half] = b
        x[..., half:] = a
    return x.view_as(x)
