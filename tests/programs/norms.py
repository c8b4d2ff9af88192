"""Norms in the spellings that models have, and things that look like norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .catalogue import Maker, step

EPS = 1e-5
Form = Callable[[Maker, Tensor, int], Tensor]


def _square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def _by_hand(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (_square(centred) + EPS).sqrt()


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(_square(x) + EPS)


def _statistics(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(var + EPS)


def _over_channels(layer: Callable[[int], nn.Module]) -> Form:
    return lambda m, x, n: m.layer(lambda: layer(n))(x.transpose(1, 2)).transpose(1, 2)


FORMS: dict[str, Form] = {
    "LayerNorm": lambda m, x, n: m.layer(lambda: nn.LayerNorm(n))(x),
    "LayerNorm without bias": lambda m, x, n: m.layer(lambda: nn.LayerNorm(n, bias=False))(x),
    "layer_norm": lambda m, x, n: F.layer_norm(x, (n,)),
    "layer_norm then affine": lambda m, x, n: F.layer_norm(x, (n,)) * m.weight(n) + m.weight(n),
    "layer norm by hand": lambda m, x, n: _by_hand(x) * m.weight(n) + m.weight(n),
    "layer norm by var_mean": lambda m, x, n: _statistics(x) * m.weight(n) + m.weight(n),
    "RMSNorm": lambda m, x, n: m.layer(lambda: nn.RMSNorm(n))(x),
    "RMSNorm with eps": lambda m, x, n: m.layer(lambda: nn.RMSNorm(n, eps=EPS))(x),
    "rms_norm": lambda m, x, n: F.rms_norm(x, (n,), eps=EPS),
    "rms_norm with weight": lambda m, x, n: F.rms_norm(x, (n,), m.weight(n)),
    "rms by hand": lambda m, x, n: _rms(x) * m.weight(n),
    "rms, weight first": lambda m, x, n: m.weight(n) * _rms(x),
    "rms by division": lambda m, x, n: m.weight(n) * (x / torch.sqrt(_square(x) + EPS)),
    "rms with 1 + weight": lambda m, x, n: _rms(x) * (1 + m.weight(n)),
    "rms with weight + 1": lambda m, x, n: _rms(x) * (m.weight(n) + 1.0),
    "rms by norm": lambda m, x, n: x / (x.norm(dim=-1, keepdim=True) * n**-0.5 + EPS) * m.weight(n),
    "rms without weight": lambda m, x, n: _rms(x),
    "rms, linear, gamma": lambda m, x, n: m.linear(_rms(x), n) * m.weight(n),
    "rms, linear without bias, gamma": lambda m, x, n: m.linear(_rms(x), n, bias=False) * m.weight(n),
    "rms, silu, gamma": lambda m, x, n: F.silu(_rms(x)) * m.weight(n),
    "rms, softmax, gamma": lambda m, x, n: _rms(x).softmax(-1) * m.weight(n),
    "rms, added, gamma": lambda m, x, n: (_rms(x) + x) * m.weight(n),
    "rms used twice": lambda m, x, n: _rms(x) * m.weight(n) + _rms(x).relu(),
    "mean gate": lambda m, x, n: torch.sigmoid(x.mean(-1, keepdim=True) + 0.5) * m.weight(n),
    "mean of squares": lambda m, x, n: x * (_square(x) + 0.5) * m.weight(n),
    "scaled mean": lambda m, x, n: x + (x.mean(-1, keepdim=True) * 2.0 + 0.25) * m.weight(n),
    "normalize": lambda m, x, n: F.normalize(x, dim=-1) * m.weight(n),
    "normalize tokens": lambda m, x, n: F.normalize(x, dim=1),
    "norm by division": lambda m, x, n: x / (x.norm(dim=-1, keepdim=True) + EPS),
    "group norm": _over_channels(lambda n: nn.GroupNorm(2, n)),
    "group norm of one": _over_channels(lambda n: nn.GroupNorm(1, n)),
    "batch norm": _over_channels(lambda n: nn.BatchNorm1d(n)),
    "batch norm without affine": _over_channels(lambda n: nn.BatchNorm1d(n, affine=False)),
    "instance norm": _over_channels(lambda n: nn.InstanceNorm1d(n, affine=True)),
    "head layer norm": lambda m, x, n: m.layer(lambda: nn.LayerNorm(n // 2))(x.unflatten(-1, (2, -1))).flatten(-2),
    "head rms": lambda m, x, n: (_rms(x.unflatten(-1, (2, -1))) * m.weight(n // 2)).flatten(-2),
    "two dimensions": lambda m, x, n: m.layer(lambda: nn.LayerNorm((x.shape[1], n)))(x),
    "standardise": lambda m, x, n: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS),
}


@step("norms", multiple=2, form=tuple(FORMS), residual=(False, True))
def norm(m: Maker, x: Tensor, *, form: str, residual: bool) -> Tensor:
    y = FORMS[form](m, x, x.shape[-1])
    return x + y if residual else y


@step("norms", inputs=2, form=("LayerNorm", "RMSNorm with eps", "rms by hand", "RMSNorm"))
def shared_norm(m: Maker, x: Tensor, y: Tensor, *, form: str) -> Tensor:
    """One norm's weight for two values."""
    width = x.shape[-1]
    y = m.fit(y, width)
    layers = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm, "RMSNorm with eps": lambda n: nn.RMSNorm(n, eps=EPS)}
    if form in layers:
        layer = m.layer(lambda: layers[form](width))
        return layer(x) + layer(y).relu()
    weight = m.weight(width)
    return _rms(x) * weight + (_rms(y) * weight).relu()


@step("norms", hidden=(6, 10, 12), form=tuple(FORMS), multiple=2)
def normed_mlp(m: Maker, x: Tensor, *, hidden: int, form: str) -> Tensor:
    """A residual block: the norm feeds two linear layers."""
    y = FORMS[form](m, x, x.shape[-1])
    return x + m.linear(F.gelu(m.linear(y, hidden)), x.shape[-1])
