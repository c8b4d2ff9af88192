"""Each op's axis rule, checked by cutting (``rule_cases.py`` says how), and that every rule is checked."""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable

import pytest
import rule_cases_elementwise
import rule_cases_index
import rule_cases_layout
import rule_cases_opaque
import rule_cases_order
import rule_cases_space
import rule_cases_sums
import torch
import transformers.integrations.moe  # noqa: F401 (registers its ops)
from rule_cases import BATCH, INPUT, SEQUENCE, Case, Cases

import mptk
from mptk import analyze, trace
from mptk.ir.families import Analysis
from mptk.ir.ops import name_op
from mptk.ir.resolved_plan import resolve_plan
from mptk.testing import draw_plan, measure_largest
from passes.analysis.rules import POINTWISE, RULES
from passes.transforms.masked_reference import mask

GROUPS: dict[str, dict[str, Case]] = (
    rule_cases_elementwise.GROUPS
    | rule_cases_layout.GROUPS
    | rule_cases_sums.GROUPS
    | rule_cases_index.GROUPS
    | rule_cases_opaque.GROUPS
    | rule_cases_order.GROUPS
    | rule_cases_space.GROUPS
)
X = torch.randn(BATCH, SEQUENCE, INPUT, generator=torch.Generator().manual_seed(1))


@functools.cache
def module(group: str) -> Cases:
    return Cases(GROUPS[group])


@functools.cache
def analysis(group: str) -> Analysis:
    return analyze(trace(module(group), (X,)))


def offered(group: str) -> dict[str, list[int]]:
    """Branch → sizes of the families whose members lie in it."""
    found: dict[str, list[int]] = {name: [] for name in module(group).branches}
    for f in analysis(group).families:
        found[f.groups[0].members[0].weight.split(".")[1]].append(f.size)
    return {name: sorted(sizes) for name, sizes in found.items()}


@pytest.mark.parametrize("group", GROUPS)
def test_families_around_each_op(group: str) -> None:
    expected = {}
    for branch in module(group).branches:
        name, consumer = branch.split(":")
        case = GROUPS[group][name]
        expected[branch] = sorted(case.linear if consumer == "linear" else case.summed)
    assert offered(group) == expected


def differences(group: str, share: float) -> tuple[dict[str, float], list[str]]:
    """Cut all families: where the cut model is not the masked one, and where the mask did nothing."""
    found = analysis(group)
    plan = draw_plan(found, share=share, seed=round(share * 100))
    with torch.no_grad():
        dense, cut = found.program(X), mptk.rewrite(found, plan, check=False)(X)
        masked = mask(found, resolve_plan(found, plan))(X)
    wrong, unmoved = {}, []
    for branch, columns in module(group).columns(X).items():
        error = measure_largest(masked[:, columns], cut[:, columns])
        if not error <= 1e-5 * max(1, masked[:, columns].abs().max()):
            wrong[branch] = error
        if offered(group)[branch] and not measure_largest(masked[:, columns], dense[:, columns]) > 1e-3:
            unmoved.append(branch)
    return wrong, unmoved


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_offered_around_each_op_cuts_exactly(group: str) -> None:
    assert differences(group, share=0.6) == ({}, [])


NOT_TRACED = {
    "aten._grouped_mm": "tests/analysis/test_families.py, a mixture in bfloat16",
    "transformers.grouped_mm_fallback": "tests/analysis/test_families.py, a mixture in float32",
    "aten._log_softmax": "export keeps the composite op",
    "aten.conj": "export calls _conj",
    "aten.lift_fresh_copy": "of constants only, which have no axes",
    "aten.nonzero": "its size depends on data, which the walk refuses",
    "aten.masked_select": "its size depends on data, which the walk refuses",
    "aten.bincount": "its size depends on data, which the walk refuses",
    "aten._unique2": "its size depends on data, which the walk refuses",
}


def test_every_rule_is_of_an_op_and_traced_by_a_case() -> None:
    for name in RULES:
        if name.startswith("torch."):  # a function of torch that export keeps, as those of torch.vmap
            assert callable(pkgutil.resolve_name(name))
            continue
        namespace, op, *overload = name.split(".")
        packet = getattr(getattr(torch.ops, namespace), op)
        assert not overload or overload[0] in packet.overloads()
    seen = {name_op(n) for group in GROUPS for n in analysis(group).facts.results if n.op == "call_function"}
    traced = seen | {name.rsplit(".", 1)[0] for name in seen}
    assert RULES.keys() - traced == NOT_TRACED.keys()


def lines(rule: Callable[..., object]) -> int:
    """From its ``def`` to its end: decorators and comments do not count."""
    source = inspect.getsource(rule)
    return sum(not line.lstrip().startswith("#") for line in source[source.index("def ") :].splitlines())


def test_every_rule_is_short_and_says_its_axis_equation() -> None:
    rules = {rule.propagate for rule in (*RULES.values(), POINTWISE)}
    assert [r for r in rules if lines(r) >= 15 or not r.__doc__] == []
