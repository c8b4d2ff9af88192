"""plan.json: written and read back, written by hand, refused with the place and the reason. And docs/plan.md's example."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptk import FamilyPlan, Plan, analyze, trace
from mptk.conversions import read_plan_conversions
from mptk.errors import PlanError
from mptk.ir import Analysis, resolve_plan
from mptk.ir.plan import PLAN_FORMAT
from mptk.testing import expect_error, make_decoder

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "plan.md"


def body(**changes: Any) -> dict[str, Any]:
    """A valid plan as JSON: one family of two layers."""
    family = {"width": 3, "of": 6, "keep": {"layers.0": "0-1,4", "layers.1": [2, 3, 5]}}
    return {"format": PLAN_FORMAT, "families": {"heads": family | changes}}


def test_ranges_and_lists_by_hand_and_a_row_for_each_scope():
    plan = Plan.from_json(body())
    assert plan.families["heads"].keep == {"layers.0": ((0, 1, 4),), "layers.1": ((2, 3, 5),)}
    assert plan.widths == {"heads": 3}
    assert plan.meta == {}
    plan = Plan.from_json(body(keep={"a": ["0-2", "3-5"], "b": [[0, 1, 2], "1,3,5"], "c": "0, 2 ,5"}))
    assert plan.families["heads"].keep == {"a": ((0, 1, 2), (3, 4, 5)), "b": ((0, 1, 2), (1, 3, 5)), "c": ((0, 2, 5),)}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    families = {}
    for name in draw(st.lists(st.sampled_from(["ffn", "heads", "hidden", "q_heads"]), unique=True)):
        of = draw(st.integers(1, 40))
        width, scopes = draw(st.integers(1, of)), draw(st.integers(1, 3))
        rows = st.permutations(range(of)).map(lambda p, w=width: tuple(sorted(p[:w])))  # type: ignore[misc]
        keep = {layer: tuple(draw(rows) for _ in range(scopes)) for layer in ("layers.0", "layers.1", "")}
        families[name] = FamilyPlan(width, of, keep)
    return Plan(families, draw(st.dictionaries(st.text(), st.integers() | st.text())))


@given(plan=plans())
@settings(max_examples=40)
def test_json_gives_the_plan_back(plan):
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_file_is_short_and_stable(tmp_path):
    path = tmp_path / "plan.json"
    plan = Plan.from_json(body(), source="x")
    plan.save(path)
    assert Plan.load(path) == plan
    assert '"layers.0": "0-1,4"' in path.read_text()
    before = path.read_bytes()
    Plan.load(path).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


WRONG = {"width": (7, 0, "3", True, None), "keep": ({}, ["0-2"])}
"""Field of a family of 6, of which 3 stay → values that it cannot have."""
WRONG_ROWS = (
    *("0-1", ["0-2", "0-1"], "0-3", [], "0-1,6", [0, 1, 6], "0-99999999999999", [-1, 0, 1], "4,1,0", [1, 1, 2]),
    *("0-", "all", "0-1,²", [0, 1, 2.5], [True, True, True], 3),
)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        *(({field: value}, "families.heads") for field, values in WRONG.items() for value in values),
        *(({"keep": {"a": rows}}, "families.heads.keep.a") for rows in WRONG_ROWS),
    ],
    ids=str,
)
def test_a_wrong_family_is_refused_with_the_place(changes, place):
    with expect_error(PlanError, name=f"plan: {place}"):
        Plan.from_json(body(**changes))


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ([], "plan"),
        ({"families": {}}, "plan"),
        ({"format": "mptk-plan/9", "families": {}}, "plan"),
        ({"format": PLAN_FORMAT}, "plan"),
        ({"format": PLAN_FORMAT, "families": {"heads": 3}}, "plan: families.heads"),
        ({"format": PLAN_FORMAT, "families": {}, "meta": [1]}, "plan"),
    ],
)
def test_a_wrong_plan_is_refused(data, place):
    with expect_error(PlanError, name=place):
        Plan.from_json(data)


# ---- against a model ----


@functools.cache
def analyze_mixtral() -> Analysis:
    return analyze(trace(make_decoder("mixtral", meta=True)))


def fitting(analysis: Analysis) -> dict[str, Any]:
    """A plan that fits the model, as JSON."""
    names = {"ffn": "0-39", "q_heads": ["0-1", "1-2"], "experts": "0,2,4"}
    families = {
        name: {
            "width": {"ffn": 40, "q_heads": 2, "experts": 3}[name],
            "of": analysis.family(name).size,
            "keep": {g.layer: units for g in analysis.family(name).groups},
        }
        for name, units in names.items()
    }
    return {"format": PLAN_FORMAT, "families": families}


def test_a_plan_that_fits():
    analysis = analyze_mixtral()
    cut = resolve_plan(analysis, Plan.from_json(fitting(analysis)))
    group = analysis.family("q_heads").groups[0]
    assert cut.choices[group.axis].table.tolist() == [[True, True, False], [False, True, True]]
    channels = analysis.family("ffn").groups[0]
    assert cut.choices[channels.axis].table.shape == (5, 80)
    assert cut.sizes[channels.axis] == 40


UNFIT: dict[str, tuple[list[str], Any, str]] = {
    "unknown family": (["wings"], {"width": 1, "of": 2, "keep": {"a": "0"}}, "wings"),
    "other size": (["ffn", "of"], 90, "ffn"),
    "unknown layer": (["ffn", "keep", "model.layers.7.mlp"], "0-39", "ffn"),
    "layer left out": (["ffn", "keep"], {"model.layers.0.mlp.experts": "0-39"}, "ffn"),
    "too narrow": (
        ["experts"],
        {"width": 1, "of": 5, "keep": {"model.layers.0.mlp": "0", "model.layers.1.mlp": "0"}},
        "experts",
    ),
    "rows": (["q_heads", "keep", "model.layers.0.self_attn"], ["0-1"] * 3, "q_heads"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_plan_that_does_not_fit_the_model_is_refused(name):
    path, value, family = UNFIT[name]
    data = fitting(analyze_mixtral())
    place = data["families"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with expect_error(PlanError, name=family) as refused:
        resolve_plan(analyze_mixtral(), Plan.from_json(data))
    assert bool(refused.value.nearest) == (name == "unknown family")


def test_the_documented_examples_are_plans():
    examples = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert examples
    for example in examples:
        plan = Plan.from_json(json.loads(example))
        assert plan.families or plan.conversions


HEADS = {"width": 2, "of": 8}
TOKENS = {"width": 4, "of": 9, "keep": "0-2,5"}


@pytest.mark.features
def test_conversions_are_read_as_they_were_written():
    plan = Plan({}, conversions={"vocabulary": TOKENS, "kv_heads": HEADS})
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest != Plan({}).digest
    assert len(read_plan_conversions(again)) == 2


@pytest.mark.features
@pytest.mark.parametrize(
    ("name", "entry", "place"),
    [
        *(("kv_heads", {"width": w, "of": 8}, "kv_heads") for w in (3, 8, 0, None)),
        *(("vocabulary", {**TOKENS, "keep": keep}, "plan: vocabulary.keep.tokens") for keep in ("0-2,9", "0-2", None)),
        ("kv_heads", 2, "plan"),
        ("kv_head", HEADS, "kv_head"),
    ],
)
def test_a_wrong_entry_of_a_conversion_is_refused(name, entry, place):
    with expect_error(PlanError, name=place):
        read_plan_conversions(Plan.from_json({**Plan({}).to_json(), name: entry}))
