"""A user's own op: refused with its name, then analysed and cut by one registered rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo import prove
from mptk.errors import MptkError
from passes.analysis.group import analyze
from passes.analysis.rules.opaque import opaque
from passes.analysis.rules.table import RULES, rule
from passes.frontend.trace import trace


@torch.library.custom_op("mptk_test::gated", mutates_args=())
def gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * torch.sigmoid(gate)


@gated.register_fake
def _(x: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


torch.library.define("mptk_test::shifted", "(Tensor x, *, Tensor by) -> Tensor")


@torch.library.impl("mptk_test::shifted", "CompositeExplicitAutograd")
def shifted(x: Tensor, *, by: Tensor) -> Tensor:
    return x + by


@torch.library.register_fake("mptk_test::shifted")
def _(x: Tensor, *, by: Tensor) -> Tensor:
    return torch.empty_like(x)


class Shifted(nn.Module):
    """A constant that can only be given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.ops.mptk_test.shifted(self.up(x), by=torch.arange(13.0)))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(7, 13), nn.Linear(7, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.ops.mptk_test.gated(self.up(x), self.gate(x)))  # type: ignore[no-any-return]


class GatedSum(GatedMLP):
    """The same, summed over: removed channels must be zero there."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mptk_test.gated(self.up(x), self.gate(x)).sum(-1)  # type: ignore[no-any-return]


def gated_rule(w: Any, node: Any, x: Any, gate: Any) -> Any:
    """y_d = x_d = gate_d."""
    for a, b in zip(x.dims, gate.dims, strict=True):
        w.unify(a, b, node)
    return x.dims


INPUT = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def rules_restored() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def test_an_op_without_a_rule_is_named_with_its_module_and_the_remedy() -> None:
    program = trace(GatedMLP(), (INPUT,))
    with pytest.raises(MptkError, match=r"mptk_test\.gated\.default.*mptk\.rule.*docs/adding-an-op\.md"):
        analyze(program)


def test_a_registered_rule_makes_its_axes_cuttable() -> None:
    rule("mptk_test::gated")(gated_rule)
    analysis = analyze(trace(GatedMLP(), (INPUT,)))
    (family,) = analysis.families
    assert {(m.weight, m.dim) for m in family.groups[0].members} == {
        *(("up.weight", 0), ("up.bias", 0), ("gate.weight", 0), ("gate.bias", 0), ("down.weight", 1))
    }
    assert dict(prove(analysis, (INPUT,))) == {family.name: ""}


def test_without_zero_a_sum_behind_the_op_refuses_the_axis() -> None:
    rule("mptk_test::gated")(gated_rule)
    analysis = analyze(trace(GatedSum(), (INPUT,)))
    assert not analysis.families
    (blocked,) = (b for b in analysis.blocked if b.size == 13)
    assert "summed over while not zero (aten.sum.dim_IntList in the model, test_custom_op.py:" in blocked.reasons[0]
    rule("mptk_test::gated", zero=lambda node, zero, walk: zero(node.args[0]))(gated_rule)
    analysis = analyze(trace(GatedSum(), (INPUT,)))
    assert list(dict(prove(analysis, (INPUT,))).values()) == [""]


def test_an_opaque_op_freezes_both_sides() -> None:
    rule("mptk_test::gated")(opaque)
    analysis = analyze(trace(GatedMLP(), (INPUT,)))
    assert not analysis.families
    assert all("keeps no axes apart" in " ".join(b.reasons) for b in analysis.blocked if b.size == 13)


def test_a_constant_given_by_name_is_cut_with_the_rest() -> None:
    def shifted_rule(w: Any, node: Any, x: Any, *, by: Any) -> Any:
        w.unify(x.dims[-1], by.dims[0], node)
        return x.dims

    rule("mptk_test::shifted")(shifted_rule)
    found = analyze(trace(Shifted(), (INPUT,)))
    assert [f.size for f in found.families] == [13]
    assert dict(prove(found, (INPUT,))) == {found.families[0].name: ""}
