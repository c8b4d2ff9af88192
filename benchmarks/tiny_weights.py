"""Random weights with no dead branch, for tiny models: no gate at 0, no layer scale at 1e-6, no vanishing signal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

SPREAD = 0.2  # of biases, of norm weights around 1, of running statistics around those of the example inputs


def randomise(model: nn.Module, seed: int) -> None:
    """New values for every floating parameter and persistent buffer of `model`, in place.

    Matrices: normal, by fan-in (embeddings: of standard deviation 1). Biases, and other vectors that start at zero or
    at a tiny constant: normal of deviation `SPREAD`. Weights of norms: around 1. Other vectors, and matrices of equal
    rows (the decay rates of a state space model): their initial value, off by a factor around 1.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = _kinds(model)
    with torch.no_grad():
        for parameter in model.parameters():
            p, kind = parameter.data, kinds.get(id(parameter))
            if not p.is_floating_point() or p.numel() == 0:
                continue
            rows_equal = p.ndim == 2 and p.shape[0] > 1 and bool((p == p[:1]).all())
            if kind in ("norm", "bias"):
                _jitter(p.fill_(kind == "norm"), generator)
            elif p.ndim >= 2 and (not rows_equal or _constant(p)):
                fan_in = p[0].numel() if kind == "convolution" else p.shape[-1]
                p.copy_(_normal(p, generator) * (1.0 if kind == "embedding" else fan_in**-0.5))
            else:
                _jitter(p, generator)
        persistent = model.state_dict(keep_vars=True)
        for name, buffer in model.named_buffers():
            if name in persistent and buffer.is_floating_point() and buffer.numel() and _constant(buffer):
                _jitter(buffer, generator)


def _kinds(model: nn.Module) -> dict[int, str]:
    """What the parameters of torch's own modules are; some model classes leave their initial values to chance."""
    kinds = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            kinds[id(module.weight)] = "embedding"
        elif isinstance(module, _ConvNd | nn.Linear | nn.LayerNorm | nn.GroupNorm | _BatchNorm):
            native_norm = not isinstance(module, _ConvNd | nn.Linear)
            kinds[id(module.bias)] = "bias"
            if native_norm or isinstance(module, _ConvNd):
                kinds[id(module.weight)] = "norm" if native_norm else "convolution"
    kinds.pop(id(None), None)
    return kinds


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _constant(p: Tensor) -> bool:
    return bool((p == p.flatten()[0]).all())


def _jitter(p: Tensor, generator: torch.Generator) -> None:
    noise = SPREAD * _normal(p, generator)
    if _constant(p) and abs(float(p.flatten()[0])) < 0.05:
        p.copy_(noise)
    else:
        p.mul_(1 + noise.clamp(-2 * SPREAD, 2 * SPREAD))


def calibrate(model: nn.Module, run: Callable[[], Any], seed: int) -> None:
    """Sets the running statistics of every batch norm to about those of its inputs in `run()`, a forward of `model`.

    Without it the signal of a deep convolutional network with random weights vanishes or explodes.
    """
    generator = torch.Generator().manual_seed(seed)

    def measure(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is None or norm.running_var is None:
            return
        x = args[0].transpose(0, 1).flatten(1)  # [channels, the rest]
        mean, variance = x.mean(1), x.var(1, correction=0) + 1e-3 * x.var(correction=0) + 1e-6
        noise = SPREAD * _normal(mean, generator)
        norm.running_mean.copy_(mean + noise * variance.sqrt())
        norm.running_var.copy_(variance * (1 + noise.clamp(-2 * SPREAD, 2 * SPREAD)))

    hooks = [m.register_forward_pre_hook(measure) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()


def revived(model: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """The result of `run()`. If most of it is 0, behind a last ReLU, the last convolution gets the other sign first."""
    last: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, *_: last.append(m)) for m in model.modules() if isinstance(m, _ConvNd)]
    out = run()
    for hook in hooks:
        hook.remove()
    if not last or float((out == 0).float().mean()) <= 0.5:
        return out
    for parameter in last[-1].parameters():
        parameter.neg_()
    return run()
