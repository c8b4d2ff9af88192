"""Layers of torch.nn as they are, and tables that modules keep as buffers."""

from __future__ import annotations

from collections.abc import Callable

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


@step("mixtures", kind=("GRU", "LSTM", "GRUCell", "Bilinear"))
def recurrent(m: Maker, x: Tensor, *, kind: str) -> Tensor:
    """Layers whose units carry a state, and products of two inputs."""
    n = x.shape[-1]
    if kind == "Bilinear":
        return m.layer(lambda: nn.Bilinear(n, n, 6))(x, x)
    if kind == "GRUCell":
        return m.layer(lambda: nn.GRUCell(n, 6))(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return m.layer(lambda: getattr(nn, kind)(n, 6, batch_first=True))(x)[0]


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
