"""Gates: one value decides how much of another passes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .catalogue import Maker, step


@step("gates", hidden=(6, 8, 10, 14), act=("silu", "gelu", "sigmoid", "relu"), form=("two", "chunk", "glu", "unbind"))
def gated_mlp(m: Maker, x: Tensor, *, hidden: int, act: str, form: str) -> Tensor:
    """SwiGLU and its kin, from two weights or from one that is taken apart."""
    function = getattr(F, act)
    if form == "glu":
        y = F.glu(m.linear(x, 2 * hidden), -1)
    elif form == "two":
        y = function(m.linear(x, hidden)) * m.linear(x, hidden, bias=False)
    else:
        both = m.linear(x, 2 * hidden)
        a, b = both.chunk(2, -1) if form == "chunk" else both.unflatten(-1, (2, hidden)).unbind(-2)
        y = function(a) * b
    return x + m.linear(y, x.shape[-1])


@step("gates", inputs=2, form=("sigmoid", "highway", "token", "tanh"))
def gate(m: Maker, x: Tensor, y: Tensor, *, form: str) -> Tensor:
    width = x.shape[-1]
    forms = {
        "sigmoid": lambda: x * m.linear(y, width).sigmoid(),
        "highway": lambda: _highway(x, m.linear(x, width).sigmoid(), m.fit(y, width)),
        "token": lambda: x * m.linear(y, 1).sigmoid(),
        "tanh": lambda: x + m.linear(y, width).tanh() * m.weight(width),
    }
    return forms[form]()


def _highway(x: Tensor, share: Tensor, y: Tensor) -> Tensor:
    return share * y + (1 - share) * x


@step("gates", hidden=(3, 4), pool=("mean", "amax", "adaptive"))
def squeeze_excite(m: Maker, x: Tensor, *, hidden: int, pool: str) -> Tensor:
    y = F.adaptive_avg_pool1d(x.transpose(1, 2), 1).squeeze(-1) if pool == "adaptive" else getattr(x, pool)(1)
    return x * m.linear(m.linear(y, hidden).relu(), x.shape[-1]).sigmoid()[:, None]


@step("gates", form=("cumsum", "loop", "decay"))
def recurrence(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """State that runs over the tokens, as in linear recurrent layers."""
    if form == "cumsum":
        return x + x.cumsum(1) * m.weight(x.shape[-1])
    decay = m.weight(x.shape[-1]).sigmoid() if form == "decay" else 0.5
    state, states = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = decay * state + x[:, t]
        states.append(state)
    return torch.stack(states, 1)
