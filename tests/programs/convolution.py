"""Convolutions over the tokens, with groups and computed kernels, and pools."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from .catalogue import Maker, step
from .program import WIDTHS


@step(
    "convolution",
    multiple=2,
    out=WIDTHS,
    kernel=(1, 3),
    groups=("one", "two", "depthwise", "multiplied"),
    bias=(True, False),
    residual=(True, False),
)
def conv(m: Maker, x: Tensor, *, out: int, kernel: int, groups: str, bias: bool, residual: bool) -> Tensor:
    n = x.shape[-1]
    out = n if residual or groups == "depthwise" else 2 * n if groups == "multiplied" else out
    count = (
        {"one": 1, "two": 2, "depthwise": n, "multiplied": n}[groups]
        if not (residual and groups == "multiplied")
        else n
    )
    layer = m.layer(lambda: nn.Conv1d(n, out, kernel, padding=kernel // 2, groups=count, bias=bias))
    y = layer(x.transpose(1, 2)).transpose(1, 2)
    return x + y if residual else y


COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "plus one": lambda w: w + 1,
    "exp": lambda w: w.exp(),
    "tanh": lambda w: w.tanh(),
    "scaled": lambda w: w * 2.0,
    "normed": lambda w: w / (w.norm(dim=(1, 2), keepdim=True) + 1e-3),
    "softmax": lambda w: w.softmax(-1),
}


@step(
    "convolution",
    multiple=2,
    form=tuple(COMPUTED),
    groups=("one", "two", "depthwise"),
    residual=(True, False),
    pool=(False, True),
)
def computed_conv(m: Maker, x: Tensor, *, form: str, groups: str, residual: bool, pool: bool) -> Tensor:
    """A kernel that is a function of a weight."""
    n = x.shape[-1]
    count = {"one": 1, "two": 2, "depthwise": n}[groups]
    y = F.conv1d(x.transpose(1, 2), COMPUTED[form](m.weight(n, n // count, 3)), padding=1, groups=count).transpose(1, 2)
    y = x + y if residual else y
    return y.mean(1, keepdim=True) + y if pool else y


@step("convolution", out=WIDTHS, kernel=(1, 3), bias=(True, False))
def conv_transpose(m: Maker, x: Tensor, *, out: int, kernel: int, bias: bool) -> Tensor:
    n = x.shape[-1]
    layer = m.layer(lambda: nn.ConvTranspose1d(n, out, kernel, padding=kernel // 2, bias=bias))
    return layer(x.transpose(1, 2)).transpose(1, 2)


@step("convolution", multiple=2, out=WIDTHS, form=("plane", "heads"))
def conv2d(m: Maker, x: Tensor, *, out: int, form: str) -> Tensor:
    """Two-dimensional, on a plane one high, or on one with two heads as its rows."""
    rows = 1 if form == "plane" else 2
    plane = x.transpose(1, 2).unflatten(1, (-1, rows)).transpose(2, 3).transpose(2, 3)
    return m.layer(lambda: nn.Conv2d(plane.shape[1], out, (1, 3), padding=(0, 1)))(plane).flatten(1, 2).transpose(1, 2)


@step("convolution", form=("max", "avg", "stride", "adaptive", "upsample"))
def pool(m: Maker, x: Tensor, *, form: str) -> Tensor:
    y = x.transpose(1, 2)
    forms: dict[str, Callable[[], Tensor]] = {
        "max": lambda: F.max_pool1d(y, 3, 1, 1),
        "avg": lambda: F.avg_pool1d(y, 3, 1, 1),
        "stride": lambda: y + F.avg_pool1d(y, y.shape[-1]),
        "adaptive": lambda: y * F.adaptive_avg_pool1d(y, 1).tanh(),
        "upsample": lambda: F.interpolate(F.avg_pool1d(y, 2), size=y.shape[-1], mode="nearest"),
    }
    return forms[form]().transpose(1, 2)


@step("convolution", inner=(8, 12), act=("silu", "relu"))
def gated_conv(m: Maker, x: Tensor, *, inner: int, act: str) -> Tensor:
    """Mamba's front: one projection for two branches, one of them through a depthwise convolution."""
    a, b = m.linear(x, 2 * inner).chunk(2, -1)
    a = m.layer(lambda: nn.Conv1d(inner, inner, 3, padding=2, groups=inner))(a.transpose(1, 2))[..., : x.shape[1]]
    return x + m.linear(getattr(F, act)(a.transpose(1, 2)) * F.silu(b), x.shape[-1], bias=False)
