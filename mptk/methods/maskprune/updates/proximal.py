"""proximal: masks fade. They follow the loss's gradient, then a proximal step shrinks those of the tail."""

from __future__ import annotations

import torch
from torch import Tensor

from mptk.config import Rates


class Proximal:
    """The gradient and proximal steps of MaskPrune (arXiv 2502.14008) in m, and the ascent in y, as in UVC (ICLR 2022).

    Distance and norm are in the metric of the Fisher information F, so no step size depends on the model.
    """

    fades = True

    def __init__(self, rates: Rates, steps: int) -> None:
        self.descent = min(1.0, rates.mask / steps)
        self.shrinkage = rates.proximal / steps
        self.ascent = rates.dual / steps

    @torch.no_grad()
    def move_masks(self, m: Tensor, tail: Tensor, curvature: Tensor, beyond: Tensor, y: Tensor) -> Tensor:
        """As in ``MaskUpdate``.

        1. m ← clip(m + η_m (F (1 − m) + d) / (F + mean F), 0, 1): a damped Newton step along the averaged gradient.
        2. m ← m / (1 + 2 η y) in the tail.
        3. y ← y + η_y · mean m² of the tail.
        """
        # The averaged gradient: one batch's is noise for most masks, and at 1 noise can only push a mask down.
        pull = curvature * (1 - m.to(curvature.dtype)) + beyond
        m.add_((self.descent * pull / (curvature + curvature.mean()).clamp_min(1e-12)).float()).clamp_(0, 1)
        m.copy_(torch.where(tail, shrink_mask(m, self.shrinkage, y[:, None, None]), m))
        left = (m.square() * tail).sum((1, 2)) / tail.sum((1, 2)).clamp_min(1)
        return y + self.ascent * left

    @torch.no_grad()
    def harden_masks(self, m: Tensor, kept: Tensor, whole: bool) -> None:
        """As in ``MaskUpdate``. Units that stay keep their value, which is folded into weights."""
        # No weight can absorb the value of a block's mask.
        if whole:
            m.fill_(1)
        m.mul_(kept)


def shrink_mask(m: Tensor, rate: float, y: Tensor) -> Tensor:
    """The proximal operator of rate · y · x²: argmin_x ½ (x − m)² + rate · y · x² = m / (1 + 2 · rate · y)."""
    return m / (1 + 2 * rate * y)
