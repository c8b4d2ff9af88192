"""A rule: how axes pass through an operator that torch does not have. `mptk ops` lists it."""

from __future__ import annotations

import torch
from torch import Tensor

import mptk


@torch.library.custom_op("mptk_example::gate", mutates_args=())
def gate(x: Tensor, by: Tensor) -> Tensor:
    """x · σ(by), element by element."""
    return x * torch.sigmoid(by)


@gate.register_fake
def _(x: Tensor, by: Tensor) -> Tensor:
    return torch.empty_like(x)


@mptk.rule("mptk_example::gate", zero=lambda node, zero, facts: zero(node.args[0]))
def gate_rule(ctx, node, x, by):
    """y_d = x_d = by_d."""
    for a, b in zip(x.dims, by.dims, strict=True):
        ctx.unify(a, b, node)
    return x.dims
