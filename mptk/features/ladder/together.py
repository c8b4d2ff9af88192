"""together: the sizes of a ladder as one module, whose smaller sizes compute with slices of the largest size's weights.

Training them together follows slimmable networks (Yu & Huang 2019, arXiv 1903.05134): the sandwich rule and in-place
distillation. A weight that a size's own fit made, like a reconstructed layer's, stays its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from mptk.features.ladder.slices import Places, slice_weight
from passes.frontend.trace import find_cache_switch


class Together(nn.Module):
    """The sizes, the largest first. Only the largest size's parameters and the others' own ones require a gradient.

    A parameter is a size's own if it is not a slice of the largest size's from the start. Slices take no memory.

    Args:
        sizes: the untrained model of each size, and where its parameters are in the largest model's.
    """

    def __init__(self, sizes: Iterable[tuple[nn.Module, Places]]) -> None:
        super().__init__()
        self.sizes, self.places = nn.ModuleList(), list[Places]()
        self.own: list[dict[str, nn.Parameter]] = []
        for module, places in sizes:
            named = dict(module.named_parameters())
            largest = self.own[0] if self.own else {}
            shared = [n for n in largest if slice_weight(largest[n], places.get(n, ())).equal(named[n])]
            # The module keeps an empty parameter, for which ``functional_call`` puts the slice.
            for name in shared:
                parameter = named.pop(name).requires_grad_(False)
                parameter.data = parameter.data.new_empty(0)
            self.sizes.append(module)
            self.places.append(places)
            self.own.append(named)

    def compute_weights(self, size: int) -> dict[str, Tensor]:
        """The parameters of a size, as functions of the trained ones."""
        largest, places, own = self.own[0], self.places[size], self.own[size]
        return {
            name: own[name] if name in own else slice_weight(largest[name], places.get(name, ())) for name in largest
        }

    def forward(self, size: int, **inputs: Any) -> Any:
        module = self.sizes[size]
        inputs = {**find_cache_switch(module), **inputs}
        # The largest size holds its weights itself, and runs as it is.
        return functional_call(module, self.compute_weights(size), kwargs=inputs) if size else module(**inputs)

    @property
    def views(self) -> list[OneSize]:
        """The sizes as modules."""
        return [OneSize(self, size) for size in range(len(self.sizes))]


class OneSize(nn.Module):
    """One size of ``together``, to be called as its own module is."""

    def __init__(self, together: Together, size: int) -> None:
        super().__init__()
        self.together, self.size = together, size

    def forward(self, **inputs: Any) -> Any:
        return self.together(self.size, **inputs)
