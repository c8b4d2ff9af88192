"""A pruned module has the types and ``requires_grad`` of the one that was given, several types in one module too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inside import Inside
from safetensors.torch import load_file
from test_eager import INNER, WIDTH, made, near, oracle, pruned_of
from torch import Tensor, nn

import mptk
from mptk.testing import draw_plan
from passes.verify import HALF_TOLERANCE


class Types(nn.Module):
    """Layers of two types."""

    def __init__(self, outer: torch.dtype, inner: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, INNER, dtype=outer), nn.Linear(20, WIDTH, dtype=outer)
        self.mid = nn.Linear(INNER, 20, dtype=inner)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.up(x).relu().to(self.mid.weight.dtype)).relu()
        return self.down(h.to(x.dtype))


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("outer", "inner", "tolerance"),
    [(BF16, BF16, 3e-2), (F16, F16, 5e-3), (F64, F64, 1e-12), (F32, BF16, 2e-2), (F64, F16, 5e-3), (F32, F64, 1e-5)],
)
def test_a_pruned_module_has_the_types_of_the_given_one(
    outer: torch.dtype, inner: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    net, x = Types(outer, inner), made(2, 6, dtype=outer)
    net.mid.requires_grad_(False)
    pruned = pruned_of(net, x)
    small, eager = pruned.model, oracle(net, pruned)
    given = {name: (p.dtype, p.requires_grad) for name, p in net.named_parameters()}
    assert {name: (p.dtype, p.requires_grad) for name, p in small.named_parameters()} == given
    assert near(small(made(3, 4, dtype=outer)), eager(made(3, 4, dtype=outer)), tolerance)
    stored = load_file(pruned.save(tmp_path / "out") / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        name: dtype for name, (dtype, _) in given.items()
    }
    assert all(d.ok for d in mptk.verify(tmp_path / "out", model=net))
    analysis = mptk.analyze(net, x)
    cut = mptk.rewrite(analysis, draw_plan(analysis)).module()
    assert {name: (p.dtype, p.requires_grad) for name, p in cut.named_parameters()} == given
    assert cut(x).dtype == outer


def test_a_type_that_is_asked_for_is_that_of_the_pruned_module() -> None:
    small = pruned_of(Types(F32, BF16), made(2, 6), dtype="float32").model
    assert {p.dtype for p in small.parameters()} == {F32}
    assert small(made(2, 6)).dtype == F32


class Shifted(Types):
    """Its outputs are small differences of large numbers, which rounding to a half type moves far."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + 16.0) - 16.0


def own_types(net: nn.Module) -> dict[str, Any]:
    (row,) = (row for row in pruned_of(net, made(2, 6, dtype=BF16)).report.proof if row["stage"] == "own types")
    return row


def test_the_proof_in_own_types_allows_what_these_types_do_to_the_dense_module() -> None:
    assert own_types(Types(BF16, BF16))["tolerance"] == HALF_TOLERANCE
    found = own_types(Shifted(BF16, BF16))
    assert HALF_TOLERANCE < found["relative"] <= found["tolerance"] < 0.5
    assert "rounding alone moves the logits" in found["widened"]


@pytest.mark.parametrize("kind", [Types, Shifted])
def test_a_module_that_is_wrong_only_in_its_own_types_is_refused(kind: type[Types], inside: Inside) -> None:
    def negated(module: nn.Module) -> nn.Module:
        module.down.weight.data.neg_()
        return module

    inside.spoil("mptk.targets.graph.make_cut_module", negated)
    with pytest.raises(mptk.ProofError, match="own types"):
        own_types(kind(BF16, BF16))


def test_the_proof_in_own_types_starts_each_batch_with_the_modules_own_state() -> None:
    class Running(Types):
        def __init__(self) -> None:
            super().__init__(BF16, BF16)
            self.register_buffer("seen", torch.zeros(WIDTH, dtype=BF16))

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.seen.add_(y.amax((0, 1)))
            return y + self.seen

    assert own_types(Running())["relative"] < HALF_TOLERANCE


def test_complex_parameters_are_masked_and_cut() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
            self.turn = nn.Parameter(torch.randn(INNER, dtype=torch.complex64))
            self.shift = nn.Parameter(torch.randn(INNER, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return self.down((self.up(x) * self.turn + self.shift).abs())

    net = Complex()
    analysis = mptk.analyze(net, made(2, 6))
    mptk.rewrite(analysis, draw_plan(analysis))
    pruned = pruned_of(net, made(2, 6))
    assert pruned.model.turn.dtype == torch.complex64
    assert len(pruned.model.turn) < INNER
    assert near(pruned.model(made(3, 4)), oracle(net, pruned)(made(3, 4)))
