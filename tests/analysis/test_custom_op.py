"""A user's own op: refused with its name, then analysed and cut by one registered rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from made_modules import Made
from torch import Tensor, fx, nn

from benchmarks.zoo import prove
from mptk import ProofError, analyze, rewrite, trace
from mptk.errors import AnalysisError
from mptk.ir import Dims
from mptk.testing import draw_plan, expect_error
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.opaque import opaque
from passes.analysis.rules.resizer import Counted, count_argument
from passes.analysis.rules.table import RULES, Result, rule


@torch.library.custom_op("mptk_test::gated", mutates_args=())
def gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * torch.sigmoid(gate)


torch.library.define("mptk_test::shifted", "(Tensor x, *, Tensor by) -> Tensor")


@torch.library.impl("mptk_test::shifted", "CompositeExplicitAutograd")
def shifted(x: Tensor, *, by: Tensor) -> Tensor:
    return x + by


@torch.library.custom_op("mptk_test::counted", mutates_args=())
def counted(x: Tensor, channels: int) -> Tensor:
    assert x.shape[-1] == channels
    return x.relu()


@counted.register_fake
def _(x: Tensor, channels: int) -> Tensor:
    torch._check(x.shape[-1] == channels)
    return torch.empty_like(x)


@torch.library.custom_op("mptk_test::moved", mutates_args=())
def moved(x: Tensor) -> Tensor:
    return x.clone()


for name in ("gated", "shifted", "moved"):
    torch.library.register_fake(f"mptk_test::{name}", lambda x, *_, **__: torch.empty_like(x))
ops = torch.ops.mptk_test


def make(body: Callable[[Made, Tensor], Tensor]) -> Made:
    """Two layers of 13 units side by side, one that takes their result, and a table of 13 rows."""
    up, gate, down = nn.Linear(7, 13), nn.Linear(7, 13), nn.Linear(13, 5)
    return Made(body, up=up, gate=gate, down=down, table=nn.Embedding(13, 5))


def put_through_gate(m: Made, x: Tensor) -> Tensor:
    return m.down(ops.gated(m.up(x), m.gate(x)))


def sum_after_gate(m: Made, x: Tensor) -> Tensor:
    """Removed channels must be zero there."""
    return ops.gated(m.up(x), m.gate(x)).sum(-1)


def shift(m: Made, x: Tensor) -> Tensor:
    """A constant that can only be given by name."""
    return m.down(ops.shifted(m.up(x), by=torch.arange(13.0)))


def count(m: Made, x: Tensor) -> Tensor:
    """Its op is told how many channels there are."""
    return m.down(ops.counted(m.up(x), 13))


def choose(m: Made, x: Tensor) -> Tensor:
    """The largest channel's position reads a table."""
    return m.table(ops.moved(m.up(x).argmax(-1)))


def gated_rule(ctx: RuleContext, node: fx.Node, x: Value, gate: Value) -> Dims:
    """y_d = x_d = gate_d."""
    for a, b in zip(x.dims, gate.dims, strict=True):
        ctx.unify(a, b, node)
    return x.dims


INPUT = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def rules_restored():
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def test_an_op_without_a_rule_is_named_with_its_module_and_the_remedy():
    program = trace(make(put_through_gate), (INPUT,))
    with expect_error(AnalysisError, name="mptk_test.gated.default"):
        analyze(program)


def test_a_registered_rule_makes_its_axes_cuttable():
    rule("mptk_test::gated")(gated_rule)
    analysis = analyze(trace(make(put_through_gate), (INPUT,)))
    (family,) = analysis.families
    assert {(m.weight, m.dim) for m in family.groups[0].members} == {
        *(("up.weight", 0), ("up.bias", 0), ("gate.weight", 0), ("gate.bias", 0), ("down.weight", 1))
    }
    assert dict(prove(analysis, (INPUT,))) == {family.name: ""}


def test_without_zero_a_sum_behind_the_op_refuses_the_axis():
    rule("mptk_test::gated")(gated_rule)
    analysis = analyze(trace(make(sum_after_gate), (INPUT,)))
    assert not analysis.families
    (blocked,) = (b for b in analysis.blocked if b.size == 13)
    assert "summed over while not zero (aten.sum.dim_IntList in the model, made_modules.py:" in blocked.reasons[0]
    rule("mptk_test::gated", zero=lambda node, zero, facts: zero(node.args[0]))(gated_rule)
    analysis = analyze(trace(make(sum_after_gate), (INPUT,)))
    assert list(dict(prove(analysis, (INPUT,))).values()) == [""]


def test_an_opaque_op_freezes_both_sides():
    rule("mptk_test::gated")(opaque)
    analysis = analyze(trace(make(put_through_gate), (INPUT,)))
    assert not analysis.families
    assert all("keeps no axes apart" in " ".join(b.reasons) for b in analysis.blocked if b.size == 13)


def test_a_constant_given_by_name_is_cut_with_the_rest():
    def shifted_rule(ctx: RuleContext, node: fx.Node, x: Value, *, by: Value) -> Dims:
        ctx.unify(x.dims[-1], by.dims[0], node)
        return x.dims

    rule("mptk_test::shifted")(shifted_rule)
    found = analyze(trace(make(shift), (INPUT,)))
    assert [f.size for f in found.families] == [13]
    assert dict(prove(found, (INPUT,))) == {found.families[0].name: ""}


def test_what_a_rule_notes_is_there_when_its_call_is_cut():
    def counted_rule(ctx: RuleContext, node: fx.Node, x: Value, channels: int) -> Result:
        return Result(x.dims, Counted(x.dims[-1]))

    rule("mptk_test::counted", zero="keep", resize=count_argument("channels"))(counted_rule)
    found = analyze(trace(make(count), (INPUT,)))
    assert [f.size for f in found.families] == [13]
    assert dict(prove(found, (INPUT,))) == {found.families[0].name: ""}


def test_a_size_that_does_not_follow_the_cut_is_named_with_its_place():
    """A rule that forgets to resize."""
    rule("mptk_test::counted", zero="keep")(lambda ctx, node, x, channels: x.dims)
    found = analyze(trace(make(count), (INPUT,)))
    with expect_error(ProofError) as refused:
        rewrite(found, draw_plan(found))
    assert refused.value.name.startswith("mptk_test.counted.default in the model")


def test_positions_stay_positions_only_of_an_op_that_carries_them():
    def moved_rule(ctx: RuleContext, node: fx.Node, x: Value) -> Dims:
        return x.dims

    rule("mptk_test::moved", zero="keep")(moved_rule)
    found = analyze(trace(make(choose), (INPUT,)))
    assert not found.families
    reasons = [reason for b in found.blocked if b.size == 13 for reason in b.reasons]
    assert any("its positions are computed with (mptk_test.moved" in reason for reason in reasons)
    rule("mptk_test::moved", zero="keep", positions="carry")(moved_rule)
    found = analyze(trace(make(choose), (INPUT,)))
    assert [f.size for f in found.families] == [13]
    assert dict(prove(found, (INPUT,))) == {found.families[0].name: ""}
