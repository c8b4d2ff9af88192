"""plan.json: written and read back, written by hand, refused with the place and the reason. And docs/plan.md's example."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptk import FamilyPlan, MptkError, Plan, analyze, trace
from mptk.conversions import read_plan_conversions
from mptk.ir.families import Analysis
from mptk.ir.plan import PLAN_FORMAT
from mptk.ir.resolved_plan import resolve_plan
from mptk.testing import make_decoder

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "plan.md"


def body(**changes: Any) -> dict[str, Any]:
    """A valid plan as JSON: one family of two layers."""
    family = {"width": 3, "of": 6, "keep": {"layers.0": "0-1,4", "layers.1": [2, 3, 5]}}
    return {"format": PLAN_FORMAT, "families": {"heads": family | changes}}


def test_ranges_and_lists_by_hand() -> None:
    plan = Plan.from_json(body())
    assert plan.families["heads"].keep == {"layers.0": ((0, 1, 4),), "layers.1": ((2, 3, 5),)}
    assert plan.widths == {"heads": 3}
    assert plan.meta == {}


def test_a_row_for_each_scope() -> None:
    plan = Plan.from_json(body(keep={"a": ["0-2", "3-5"], "b": [[0, 1, 2], "1,3,5"], "c": ["0-2"]}))
    assert plan.families["heads"].keep == {
        "a": ((0, 1, 2), (3, 4, 5)),
        "b": ((0, 1, 2), (1, 3, 5)),
        "c": ((0, 1, 2),),
    }


def test_spaces_in_ranges() -> None:
    assert Plan.from_json(body(keep={"a": "0, 2 ,5"})).families["heads"].keep == {"a": ((0, 2, 5),)}


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
def test_json_gives_the_plan_back(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_file_is_short_and_stable(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = Plan.from_json(body(), source="x")
    plan.save(path)
    assert Plan.load(path) == plan
    assert '"layers.0": "0-1,4"' in path.read_text()
    before = path.read_bytes()
    Plan.load(path).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "width above of": ({"width": 7}, r'families\.heads: "width" and "of" must be integers'),
    "width zero": ({"width": 0}, '"width" and "of" must be integers'),
    "width as text": ({"width": "3"}, '"width" and "of" must be integers'),
    "width as truth": ({"width": True}, '"width" and "of" must be integers'),
    "no width": ({"width": None}, '"width" and "of" must be integers'),
    "no layers": ({"keep": {}}, '"keep" must map each layer'),
    "layers as a list": ({"keep": ["0-2"]}, '"keep" must map each layer'),
    "too few": ({"keep": {"layers.0": "0-1"}}, r"families\.heads\.keep\.layers\.0: 2 units kept, but width is 3"),
    "too few in one scope": ({"keep": {"a": ["0-2", "0-1"]}}, "2 units kept, but width is 3"),
    "none": ({"keep": {"a": []}}, "0 units kept, but width is 3"),
    "out of range": ({"keep": {"a": "0-1,6"}}, r"units must be ascending, distinct and in 0\.\.5"),
    "far out of range": ({"keep": {"a": "0-99999999999999"}}, "units must be ascending"),
    "negative": ({"keep": {"a": [-1, 0, 1]}}, "units must be ascending"),
    "descending": ({"keep": {"a": "4,1,0"}}, "units must be ascending"),
    "twice": ({"keep": {"a": [1, 1, 2]}}, "units must be ascending"),
    "an open range": ({"keep": {"a": "0-"}}, '"0-" is not a unit or a range'),
    "words": ({"keep": {"a": "all"}}, '"all" is not a unit or a range'),
    "odd digits": ({"keep": {"a": "0-1,²"}}, "is not a unit or a range"),
    "fractions": ({"keep": {"a": [0, 1, 2.5]}}, "expected a list of integers or ranges"),
    "truth values": ({"keep": {"a": [True, True, True]}}, "expected a list of integers or ranges"),
    "a number": ({"keep": {"a": 3}}, "expected a list of integers or ranges"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_family_is_refused_with_the_place(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(MptkError, match=message) as caught:
        Plan.from_json(body(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], '"format" is not "mptk-plan/1"'),
        ({"families": {}}, '"format" is not "mptk-plan/1"'),
        ({"format": "mptk-plan/9", "families": {}}, '"format" is not "mptk-plan/1"'),
        ({"format": PLAN_FORMAT}, '"families" is not an object'),
        ({"format": PLAN_FORMAT, "families": {"heads": 3}}, r"families\.heads is not an object"),
        ({"format": PLAN_FORMAT, "families": {}, "meta": [1]}, '"meta" is not an object'),
    ],
)
def test_a_wrong_plan_is_refused(data: Any, message: str) -> None:
    with pytest.raises(MptkError, match=message):
        Plan.from_json(data)


# ---- against a model ----


@pytest.fixture(scope="module")
def analysis() -> Analysis:
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


def test_a_plan_that_fits(analysis: Analysis) -> None:
    cut = resolve_plan(analysis, Plan.from_json(fitting(analysis)))
    group = analysis.family("q_heads").groups[0]
    assert cut.choices[group.axis].table.tolist() == [[True, True, False], [False, True, True]]
    channels = analysis.family("ffn").groups[0]
    assert cut.choices[channels.axis].table.shape == (5, 80)
    assert cut.sizes[channels.axis] == 40


UNFIT: dict[str, tuple[list[Any], Any, str]] = {
    "unknown family": (
        ["families", "wings"],
        {"width": 1, "of": 2, "keep": {"a": "0"}},
        "no family 'wings'; there are",
    ),
    "other size": (["families", "ffn", "of"], 90, "ffn has 80 units in this model, not 90"),
    "unknown layer": (
        ["families", "ffn", "keep", "model.layers.7.mlp"],
        "0-39",
        "ffn has no layer 'model.layers.7.mlp'",
    ),
    "too narrow": (
        ["families", "experts"],
        {"width": 1, "of": 5, "keep": {"model.layers.0.mlp": "0", "model.layers.1.mlp": "0"}},
        "experts cannot have width 1: it needs at least 2",
    ),
    "rows": (
        ["families", "q_heads", "keep", "model.layers.0.self_attn"],
        ["0-1"] * 3,
        "has 3 rows of units; give 1 or 2",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_plan_that_does_not_fit_the_model_is_refused(analysis: Analysis, name: str) -> None:
    path, value, message = UNFIT[name]
    data = copy.deepcopy(fitting(analysis))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(MptkError, match=message) as caught:
        resolve_plan(analysis, Plan.from_json(data))
    assert "\n" not in str(caught.value)


def test_a_layer_left_out_is_refused(analysis: Analysis) -> None:
    data = fitting(analysis)
    del data["families"]["ffn"]["keep"]["model.layers.1.mlp.experts"]
    with pytest.raises(MptkError, match=r"ffn has no entry for layer 'model\.layers\.1\.mlp\.experts'"):
        resolve_plan(analysis, Plan.from_json(data))


def test_the_documented_examples_are_plans() -> None:
    examples = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert examples
    for example in examples:
        plan = Plan.from_json(json.loads(example))
        assert plan.families or plan.conversions


HEADS = {"width": 2, "of": 8}
TOKENS = {"width": 4, "of": 9, "keep": "0-2,5"}


@pytest.mark.features
def test_conversions_are_read_as_they_were_written() -> None:
    plan = Plan({}, conversions={"vocabulary": TOKENS, "kv_heads": HEADS})
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest != Plan({}).digest
    assert len(read_plan_conversions(again)) == 2


@pytest.mark.features
@pytest.mark.parametrize(
    ("name", "entry", "said"),
    [
        *(("kv_heads", {"width": w, "of": 8}, '"width" and "of" must be integers') for w in (3, 8, 0, None)),
        ("vocabulary", {**TOKENS, "keep": "0-2,9"}, "0..8"),
        ("vocabulary", {**TOKENS, "keep": "0-2"}, "3 units kept, but width is 4"),
        ("vocabulary", {**TOKENS, "keep": None}, "expected a list"),
        ("kv_heads", 2, "is not an object"),
        ("kv_head", HEADS, "is not an entry of a plan"),
    ],
)
def test_a_wrong_entry_of_a_conversion_is_refused(name: str, entry: object, said: str) -> None:
    with pytest.raises(MptkError, match=f"plan: .*{name}.*{said}"):
        read_plan_conversions(Plan.from_json({**Plan({}).to_json(), name: entry}))
