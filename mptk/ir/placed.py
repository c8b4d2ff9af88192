"""placed: run a traced graph on another device than the CPU, on which it was traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Argument, Target

from mptk.compat.torch import tree_map


class Placed(fx.Interpreter):
    """An interpreter whose calls make their tensors on ``device``, wherever the graph says that they are made."""

    device: torch.device = torch.device("cpu")

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        if self.device.type != "cpu":  # where the graph was traced
            args, kwargs = tree_map(lambda a: self.device if isinstance(a, torch.device) else a, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        found = super().get_attr(target, args, kwargs)
        return found.to(self.device) if isinstance(found, Tensor) else found
