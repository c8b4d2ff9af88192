"""A pruned module has the types and ``requires_grad`` of the one that was given, several types in one module too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_modules import INNER, WIDTH, draw_input, is_near, prune_live, zero_removed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mptk
from mptk.ir import Samples
from mptk.targets.graph import WEIGHTS, GraphTarget
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
    ("outer", "inner", "tolerance"), [(BF16, BF16, 3e-2), (F64, F64, 1e-12), (F32, BF16, 2e-2), (F64, F16, 5e-3)]
)
def test_a_pruned_module_has_the_types_of_the_given_one(outer, inner, tolerance, tmp_path):
    net, x = Types(outer, inner), draw_input(2, 6, dtype=outer)
    net.mid.requires_grad_(False)
    pruned = prune_live(net, x)
    small, eager = pruned.model, zero_removed(net, pruned)
    given = {name: (p.dtype, p.requires_grad) for name, p in net.named_parameters()}
    assert {name: (p.dtype, p.requires_grad) for name, p in small.named_parameters()} == given
    assert is_near(small(draw_input(3, 4, dtype=outer)), eager(draw_input(3, 4, dtype=outer)), tolerance)
    stored = load_file(pruned.save(tmp_path / "out") / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {n: dtype for n, (dtype, _) in given.items()}
    assert all(d.ok for d in mptk.verify(tmp_path / "out", model=net))
    analysis = mptk.analyze(net, x)
    cut = mptk.rewrite(analysis, draw_plan(analysis)).module()
    assert {name: (p.dtype, p.requires_grad) for name, p in cut.named_parameters()} == given
    assert cut(x).dtype == outer


def test_a_type_that_is_asked_for_is_that_of_the_pruned_module():
    small = prune_live(Types(F32, BF16), draw_input(2, 6), dtype="float32").model
    assert {p.dtype for p in small.parameters()} == {F32}
    assert small(draw_input(2, 6)).dtype == F32


class Shifted(Types):
    """Its outputs are small differences of large numbers, which rounding to a half type moves far."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + 16.0) - 16.0


def own_types(net: nn.Module) -> dict[str, Any]:
    (row,) = (row for row in prune_live(net, draw_input(2, 6, dtype=BF16)).report.proof if row["stage"] == "own types")
    return row


def test_the_proof_in_own_types_allows_what_these_types_do_to_the_dense_module():
    assert own_types(Types(BF16, BF16))["tolerance"] == HALF_TOLERANCE
    found = own_types(Shifted(BF16, BF16))
    assert HALF_TOLERANCE < found["relative"] <= found["tolerance"] < 0.5
    assert "rounding alone moves the logits" in found["widened"]


@pytest.mark.parametrize("kind", [Types, Shifted])
def test_a_module_that_is_wrong_only_in_its_own_types_is_found_out(kind, tmp_path):
    pruned, folder = prune_live(kind(BF16, BF16), draw_input(2, 6, dtype=BF16)), tmp_path / "out"
    weights = load_file(pruned.save(folder) / WEIGHTS)
    save_file(weights | {"down.weight": -weights["down.weight"]}, folder / WEIGHTS)
    (found,) = GraphTarget().compare_rounded(pruned.compiled, folder, [Samples({"x": draw_input(2, 6, dtype=BF16)})])
    assert found.stage == "own types"
    assert not found.ok


def test_the_proof_in_own_types_starts_each_batch_with_the_modules_own_state():
    class Running(Types):
        def __init__(self) -> None:
            super().__init__(BF16, BF16)
            self.register_buffer("seen", torch.zeros(WIDTH, dtype=BF16))

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.seen.add_(y.amax((0, 1)))
            return y + self.seen

    assert own_types(Running())["relative"] < HALF_TOLERANCE


def test_complex_parameters_are_masked_and_cut():
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
    analysis = mptk.analyze(net, draw_input(2, 6))
    mptk.rewrite(analysis, draw_plan(analysis))
    pruned = prune_live(net, draw_input(2, 6))
    assert pruned.model.turn.dtype == torch.complex64
    assert len(pruned.model.turn) < INNER
    assert is_near(pruned.model(draw_input(3, 4)), zero_removed(net, pruned)(draw_input(3, 4)))
