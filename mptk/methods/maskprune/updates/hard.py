"""hard: masks are 0 in the tail and 1 elsewhere, in every forward pass (as in GRASPrune, arXiv 2604.19398)."""

from __future__ import annotations

import torch
from torch import Tensor

from mptk.config import Rates


class Hard:
    """m ← 0 for the ⌈s⌉ units of least v, 1 for the others.

    The model that learns is the model that will be cut, and the gradient in a mask at 0 is the loss's own. The dual y
    stays 1, since the constraint always holds.
    """

    fades = False

    def __init__(self, rates: Rates, steps: int) -> None:
        pass

    @torch.no_grad()
    def move_masks(self, m: Tensor, tail: Tensor, curvature: Tensor, beyond: Tensor, y: Tensor) -> Tensor:
        """As in ``MaskUpdate``."""
        m.copy_((~tail).float())
        return y

    @torch.no_grad()
    def harden_masks(self, m: Tensor, kept: Tensor, whole: bool) -> None:
        """As in ``MaskUpdate``."""
        m.copy_(kept)
