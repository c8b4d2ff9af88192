"""Layers of torch.nn as they are, and tables that modules keep as buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .catalogue import Maker, step


@step("modules", kv=("same", "other"), bias=(True, False), weights=(False, True))
def multihead_attention(m: Maker, x: Tensor, *, kv: str, bias: bool, weights: bool) -> Tensor:
    """Its projections are one weight, of which queries, keys and values are slices."""
    z = m.linear(x, 6)
    layer = m.layer(lambda: nn.MultiheadAttention(6, 2, bias=bias, batch_first=True))
    other = m.linear(x, 6) if kv == "other" else z
    y, shares = layer(z, other, other, need_weights=weights)
    return x + m.linear(y if shares is None else y * shares.amax(-1, keepdim=True), x.shape[-1])


@step("modules", norm_first=(True, False), act=("relu", "gelu"), layers=(1, 2))
def transformer(m: Maker, x: Tensor, *, norm_first: bool, act: str, layers: int) -> Tensor:
    z = m.linear(x, 6)
    for _ in range(layers):
        layer = m.layer(
            lambda: nn.TransformerEncoderLayer(6, 2, 9, activation=act, batch_first=True, norm_first=norm_first)
        )
        z = layer(z)
    return z


@step(
    "modules", kind=("PReLU", "one PReLU", "Softshrink", "LocalResponseNorm", "Dropout", "ChannelShuffle", "Identity")
)
def layer(m: Maker, x: Tensor, *, kind: str) -> Tensor:
    """Layers that take channels second."""
    kinds: dict[str, Callable[[], nn.Module]] = {
        "PReLU": lambda: nn.PReLU(x.shape[-1]),
        "one PReLU": lambda: nn.PReLU(),
        "Softshrink": lambda: nn.Softshrink(),
        "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
        "Dropout": lambda: nn.Dropout(),
        "ChannelShuffle": lambda: nn.ChannelShuffle(1),
        "Identity": lambda: nn.Identity(),
    }
    y = x.transpose(1, 2)
    return m.layer(kinds[kind])(y[..., None] if kind == "ChannelShuffle" else y).reshape(y.shape).transpose(1, 2)


@step("mixtures")
def bilinear_layer(m: Maker, x: Tensor) -> Tensor:
    """Products of two inputs."""
    n = x.shape[-1]
    return m.layer(lambda: nn.Bilinear(n, n, 6))(x, x)


@step(
    "recurrent",
    kind=("GRU", "LSTM", "RNN", "relu", "projected"),
    layers=(1, 1, 2),
    both=(False, True),
    bias=(True, True, False),
    start=("zeros", "made"),
    taken=("steps", "steps", "state", "both"),
)
def recurrent(m: Maker, x: Tensor, *, kind: str, layers: int, both: bool, bias: bool, start: str, taken: str) -> Tensor:
    """Layers whose units carry a state over the steps. ``start``: the first state; ``taken``: what is used of them."""
    name = {"relu": "RNN", "projected": "LSTM"}.get(kind, kind)
    more = {"relu": {"nonlinearity": "relu"}, "projected": {"proj_size": 4}}.get(kind, {})
    options = {"num_layers": layers, "bidirectional": both, "bias": bias, "batch_first": True, **more}
    layer = m.layer(lambda: getattr(nn, name)(x.shape[-1], 6, **options))
    count = layers * (2 if both else 1)
    first: Any = None
    if start == "made":
        first = torch.stack([m.linear(x.mean(1), 4 if kind == "projected" else 6)] * count)
        if name == "LSTM":
            first = (first, torch.stack([m.linear(x.amax(1), 6)] * count))
    steps, last = layer(x, first)
    state = last[1] if name == "LSTM" and kind != "projected" else last[0] if name == "LSTM" else last
    if taken == "steps":
        return steps
    if taken == "state":
        return state[-1][:, None].expand(-1, x.shape[1], -1)
    return steps + m.linear(state.mean(0), steps.shape[-1])[:, None]


@step("recurrent", kind=("GRU", "LSTM", "RNN"), bias=(True, False), steps=(1, 3))
def cell(m: Maker, x: Tensor, *, kind: str, bias: bool, steps: int) -> Tensor:
    """Steps of a recurrent cell that Python writes out."""
    layer = m.layer(lambda: getattr(nn, f"{kind}Cell")(x.shape[-1], 6, bias=bias))
    state: Any = None
    for t in range(steps):
        state = layer(x[:, t], state)
    return x + m.linear(state[0] if kind == "LSTM" else state, x.shape[-1])[:, None]


class Table(nn.Module):
    """Keeps a table of numbers, and positions in it."""

    def __init__(self, rows: int, width: int, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(rows, width), persistent=persistent)
        self.register_buffer("places", torch.arange(rows).flip(0), persistent=persistent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.table.to(x.dtype), self.places


@step("modules", persistent=(True, False), form=("add", "multiply", "twice", "lookup", "project", "order"))
def buffer(m: Maker, x: Tensor, *, persistent: bool, form: str) -> Tensor:
    """A buffer that is added, multiplied, read at positions, or used as a fixed weight."""
    n = x.shape[-1]
    table, places = m.layer(lambda: Table(x.shape[1], n, persistent=persistent))(x)
    forms: dict[str, Callable[[], Tensor]] = {
        "add": lambda: x + table,
        "multiply": lambda: x * table,
        "twice": lambda: m.linear((x + table).relu(), n) * table,
        "lookup": lambda: x + table[places],
        "project": lambda: x @ (table.t() @ table),
        "order": lambda: x + m.linear(x[:, places], n),
    }
    return forms[form]()
