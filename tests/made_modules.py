"""A module of parts, and of a function that is its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Made(nn.Module):
    """``body(module, x)`` is its forward. ``parts``: layers and parameters; a plain tensor becomes a buffer."""

    def __init__(self, body: Callable[..., Any], /, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class MadeOfMore(Made):
    """Its forward takes any number of inputs, which only a trace can: a task needs their names."""

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(self, *inputs)
