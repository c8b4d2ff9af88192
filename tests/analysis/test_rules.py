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
from mptk.ir import Analysis, name_op, resolve_plan
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
def analyze_group(group: str) -> tuple[Cases, Analysis]:
    cases = Cases(GROUPS[group])
    return cases, analyze(trace(cases, (X,)))


@pytest.mark.always
@pytest.mark.parametrize("group", GROUPS)
def test_what_is_offered_around_each_op_is_what_its_case_says_and_cuts_exactly(group):
    cases, analysis = analyze_group(group)
    # A branch's families are those whose members lie in it.
    offered: dict[str, list[int]] = {name: [] for name in cases.branches}
    for f in analysis.families:
        offered[f.groups[0].members[0].weight.split(".")[1]].append(f.size)
    expected = {}
    for branch in cases.branches:
        name, consumer = branch.split(":")
        case = GROUPS[group][name]
        expected[branch] = sorted(case.linear if consumer == "linear" else case.summed)
    assert {name: sorted(sizes) for name, sizes in offered.items()} == expected
    # All families are cut at once. In no branch may the cut model differ from the masked one, or the mask do nothing.
    plan = draw_plan(analysis, share=0.6, seed=60)
    with torch.no_grad():
        dense, cut = analysis.program(X), mptk.rewrite(analysis, plan, check=False)(X)
        masked = mask(analysis, resolve_plan(analysis, plan))(X)
        columns = cases.columns(X)
    wrong, unmoved = {}, []
    for branch, own in columns.items():
        error = measure_largest(masked[:, own], cut[:, own])
        if not error <= 1e-5 * max(1, masked[:, own].abs().max()):
            wrong[branch] = error
        if offered[branch] and not measure_largest(masked[:, own], dense[:, own]) > 1e-3:
            unmoved.append(branch)
    assert (wrong, unmoved) == ({}, [])


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


@pytest.mark.always
def test_every_rule_is_of_an_op_and_traced_by_a_case():
    for name in RULES:
        if name.startswith("torch."):  # a function of torch that export keeps, as those of torch.vmap
            assert callable(pkgutil.resolve_name(name))
            continue
        namespace, op, *overload = name.split(".")
        packet = getattr(getattr(torch.ops, namespace), op)
        assert not overload or overload[0] in packet.overloads()
    seen = {name_op(n) for group in GROUPS for n in analyze_group(group)[1].facts.results if n.op == "call_function"}
    traced = seen | {name.rsplit(".", 1)[0] for name in seen}
    assert RULES.keys() - traced == NOT_TRACED.keys()


def lines(rule: Callable[..., object]) -> int:
    """From its ``def`` to its end: decorators and comments do not count."""
    source = inspect.getsource(rule)
    return sum(not line.lstrip().startswith("#") for line in source[source.index("def ") :].splitlines())


def test_every_rule_is_short_and_says_its_axis_equation():
    rules = {rule.propagate for rule in (*RULES.values(), POINTWISE)}
    assert [r for r in rules if lines(r) >= 15 or not r.__doc__] == []
