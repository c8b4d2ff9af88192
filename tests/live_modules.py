"""Plain modules that are pruned in memory, and the eager module that the pruned one must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mptk
from tests.programs.oracles import zeroed

WIDTH, INNER = 8, 24
QUICK: dict[str, Any] = {"sparsity": 0.3, "tolerance": 0.1, "method": "magnitude", "align": 2, "progress": None}


def draw_input(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*sizes, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prune_live(net: nn.Module, x: Tensor, **options: Any) -> mptk.Pruned:
    found = mptk.prune(net, example_inputs=x, **{**QUICK, **options})
    assert found is not None
    return found


def zero_removed(net: nn.Module, pruned: mptk.Pruned) -> nn.Module:
    """The eager module whose removed weights are zero."""
    return zeroed(net, pruned.compiled.prepared.analysis, pruned.plan).eval()


def is_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    same = (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return same and (found - expected).abs().max().item() <= tolerance * expected.abs().max().item()
