"""The proof's tolerance: of float32 as a rule, of the model's own rounding errors where those are larger."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.trace import trace
from passes.verify import TOLERANCE, WIDEST, prove

TOKENS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))


class Cancelling(nn.Module):
    """Logits that are a difference of two products, which is ``part`` of either."""

    def __init__(self, part: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, 48)
        self.left, self.right = nn.Linear(48, 97, bias=False), nn.Linear(48, 97, bias=False)
        self.right.weight.data = self.left.weight.data + part * self.right.weight.data

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.right(x) - self.left(x)


def proof(part: float, change: float = 0.0):
    """Of a stage that computes in float64, an element of one weight changed by a share of the difference."""
    model = Cancelling(part)
    exact = Cancelling(part).double()
    exact.right.weight.data[3] += change * (exact.right.weight.data[3] - exact.left.weight.data[3])
    (found,) = prove(trace(model, (TOKENS,)), {"exact": (exact, TOLERANCE)}, TOKENS)
    return found


@torch.no_grad()
def test_a_model_that_rounding_moves_is_given_its_own_tolerance() -> None:
    found = proof(1e-3)
    assert TOLERANCE < found.relative < found.tolerance <= WIDEST
    assert found.ok


@torch.no_grad()
def test_a_wrong_unit_is_still_found() -> None:
    found = proof(1e-3, change=0.05)
    assert found.tolerance <= WIDEST < found.relative


@torch.no_grad()
def test_a_sound_model_keeps_the_tolerance_of_float32() -> None:
    assert proof(1.0).tolerance == TOLERANCE
    found = proof(1.0, change=2e-4)
    assert found.tolerance == TOLERANCE < found.relative < WIDEST
    assert not found.ok
