"""Element-wise functions, with and without f(0) = 0, alone, of two values, and with constants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .catalogue import Maker, step

FUNCTIONS = {
    **{name: getattr(torch, name) for name in ("relu", "tanh", "abs", "square", "sigmoid", "cos", "sin", "neg")},
    **{name: getattr(F, name) for name in ("gelu", "silu", "softplus", "elu", "hardswish", "leaky_relu", "logsigmoid")},
    "exp": lambda x: x.tanh().exp(),
    "one more": lambda x: x + 1,
    "one less": lambda x: 1 - x,
    "reciprocal": lambda x: 1 / (x.abs() + 1),
    "root": lambda x: (x.square() + 1e-3).sqrt(),
    "cube": lambda x: x.clamp(-2, 2).pow(3),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp above": lambda x: x.clamp(min=0.3),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "where number": lambda x: torch.where(x > 0, x, 0.5),
    "sign": lambda x: x * (x > 0),
    "fill": lambda x: x.masked_fill(x < 0, 0.0),
    "fill one": lambda x: x.masked_fill(x < 0, 1.0),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "token softmax": lambda x: x.softmax(1),
    "round": torch.round,
    "nan_to_num": torch.nan_to_num,
}


@step("pointwise", function=tuple(FUNCTIONS))
def apply(m: Maker, x: Tensor, *, function: str) -> Tensor:
    return FUNCTIONS[function](x)


@step("pointwise", inputs=2, form=("mul", "sub", "div", "maximum", "where", "lerp", "addcmul", "atan2", "outer"))
def combine(m: Maker, x: Tensor, y: Tensor, *, form: str) -> Tensor:
    y = m.fit(y, x.shape[-1])
    forms = {
        "mul": lambda: x * y,
        "sub": lambda: x - y,
        "div": lambda: x / (1 + y.square()),
        "maximum": lambda: torch.maximum(x, y),
        "where": lambda: torch.where(x > y, x, y * 0.5),
        "lerp": lambda: torch.lerp(x, y, 0.3),
        "addcmul": lambda: torch.addcmul(x, x, y),
        "atan2": lambda: torch.atan2(x, 1 + y.abs()),
        "outer": lambda: (x[..., None] * y[..., None, :]).sum(-2),
    }
    return forms[form]()


@step("pointwise", form=("scale", "bias", "alternating", "fresh", "ones", "mask", "linspace"))
def constant(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """With a vector that is a weight, or a constant that the step makes."""
    channels = x.shape[-1]
    ramp = torch.arange(channels, device=x.device).to(x.dtype)
    forms = {
        "scale": lambda: x * m.weight(channels),
        "bias": lambda: x + m.weight(channels),
        "alternating": lambda: x * (1 - 2 * (ramp % 2)),
        "fresh": lambda: x + ramp * 0.1,
        "ones": lambda: x + x.new_ones(channels),
        "mask": lambda: x.masked_fill(ramp > 3, 0.0),
        "linspace": lambda: x * torch.linspace(0, 1, channels, dtype=x.dtype, device=x.device),
    }
    return forms[form]()
