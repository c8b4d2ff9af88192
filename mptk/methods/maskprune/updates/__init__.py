"""updates: how masks follow the widths, an update a file (``--masks``).

A new one is a class with the methods of ``MaskUpdate``, an entry in ``UPDATES``, and a name in the setting's choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from mptk.config import Rates
from mptk.methods.maskprune.updates.hard import Hard
from mptk.methods.maskprune.updates.proximal import Proximal


class MaskUpdate(Protocol):
    """How the masks of a family move once its width has moved. An update has no state: its dual y is the solver's."""

    fades: bool
    """Whether masks of the tail are other than 0 for a while; else y says nothing."""

    def move_masks(self, m: Tensor, tail: Tensor, curvature: Tensor, beyond: Tensor, y: Tensor) -> Tensor:
        """Move the masks ``m`` of a family in place, and return the family's next dual.

        Args:
            m: float32 [layers, scopes, size].
            tail: the ⌈s⌉ units of least v in each layer and scope row, boolean.
            curvature, beyond: F and d of the solver, by which v = ½ F̂ + d.
            y: the dual of ‖m‖² = 0 in the tail, [layers], 1 at the start.
        """

    def harden_masks(self, m: Tensor, kept: Tensor, whole: bool) -> None:
        """Set the masks ``m`` to what is folded into weights. ``kept``: units that stay. ``whole``: they are blocks."""


UPDATES: Mapping[str, Callable[[Rates, int], MaskUpdate]] = {"proximal": Proximal, "hard": Hard}
"""Name → the update of a run with these rates and this number of steps."""
