"""Few large units, as heads, are chosen by the measured loss.

It reaches for mptk.methods.one_shot.descended: the plan before and after, and the samples, to try every choice again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import toy_checkpoints as toys
from inside import Inside, Stopped
from lab import remembered

import mptk
from mptk import Plan
from mptk.ir.plan import FamilyPlan
from mptk.ir.program import Program
from mptk.ir.resolved_plan import resolve_plan
from mptk.ir.samples import Samples
from mptk.methods.division.trial import losses
from mptk.methods.reconstruct import kept_units, reconstruct_consumers
from mptk.protocols.chain import Prepared
from passes.transforms.masked_reference import mask

SETTINGS = mptk.Settings(
    method="wanda",
    sparsity=0.4,
    tolerance=0.2,
    families=("kv_groups", "ffn"),
    widths={"kv_groups": 2, "ffn": 48},
    multiple=4,
    samples=8,
    length=24,
    eval_windows=1,
    eval_length=24,
    onnx=False,
)


@pytest.fixture(scope="module", autouse=True)
def prepared_once() -> Iterator[None]:
    with remembered():
        yield


def checkpoint(folder: Path, layers: int) -> str:
    """A model of 4 KV groups of 2 heads, whose logits differ enough to be compared."""
    model = toys.llama(layers=layers, num_attention_heads=8, num_key_value_heads=4, initializer_range=0.3)
    return toys.saved(model, folder / "dense")


def pruned(model: str, out: Path, **changes: Any) -> Plan:
    found = mptk.prune(model, out, SETTINGS, data=[toys.TEXT] * 8, progress=None, **changes)
    assert found is not None
    assert all(row["ok"] for row in found.report.proof)
    return Plan.load(out / "plan.json")


def with_heads(plan: Plan, layer: str, units: Sequence[int]) -> Plan:
    heads = plan.families["kv_groups"]
    changed = FamilyPlan(heads.width, heads.of, {**heads.keep, layer: (tuple(units),)})
    return Plan({**plan.families, "kv_groups": changed})


def measured(prepared: Prepared, plan: Plan, calibration: Samples, *, fit: bool) -> float:
    """The loss of the masked model on the calibration text, with all consumers fitted or not."""
    analysis, cut = prepared.analysis, resolve_plan(prepared.analysis, plan)
    changes = {}
    if fit:
        kept = kept_units(analysis, cut, list(plan.families))
        changes = dict(reconstruct_consumers(analysis, prepared.mask_sites, kept, {}, calibration))

    def program() -> Program:
        return mask(analysis, cut).with_state(changes)

    (loss,) = losses(prepared, [program], calibration)
    return loss


@pytest.mark.parametrize("fit", [False, True])
def test_each_layer_gets_the_best_exchange_given_the_others(inside: Inside, tmp_path: Path, fit: bool) -> None:
    inside.bound("mptk.methods.descent.MARGIN", 0)  # whatever the error of the measurement
    asked = inside.calls("mptk.methods.one_shot.descended")
    found = pruned(checkpoint(tmp_path, 2), tmp_path / "out", reconstruct=fit)
    ((prepared, plan, calibration, *_),) = asked
    for layer, (now,) in plan.families["kv_groups"].keep.items():
        sets = [now, *(s for s in itertools.combinations(range(4), 2) if len({*s} & {*now}) == 1)]
        tried = {units: measured(prepared, with_heads(plan, layer, units), calibration, fit=fit) for units in sets}
        plan = with_heads(plan, layer, min(tried, key=lambda units: tried[units]))
    assert found.families == plan.families
    assert found.families != asked[0][1].families  # the scores chose other heads


def test_an_exchange_within_the_error_of_measurement_is_not_made(inside: Inside, tmp_path: Path) -> None:
    asked = inside.calls("mptk.methods.one_shot.descended")
    model = checkpoint(tmp_path, 2)
    inside.bound("mptk.methods.descent.MARGIN", 1e9)
    assert pruned(model, tmp_path / "sure").families == asked[0][1].families
    inside.bound("mptk.methods.descent.MARGIN", 0)
    assert pruned(model, tmp_path / "any").families != asked[0][1].families


def test_families_of_many_units_keep_what_the_scores_chose(inside: Inside, tmp_path: Path) -> None:
    asked = inside.calls("mptk.methods.one_shot.descended")
    found = pruned(checkpoint(tmp_path, 2), tmp_path / "out")
    assert found.families["ffn"] == asked[0][1].families["ffn"]
    inside.bound("mptk.methods.descent.FEW", 3)
    plain = pruned(str(tmp_path / "dense"), tmp_path / "plain")
    assert len(asked) == 1
    assert plain.families == asked[0][1].families


def test_a_small_memory_and_an_unfinished_run_change_nothing(inside: Inside, tmp_path: Path) -> None:
    inside.bound("mptk.methods.descent.MARGIN", 0)
    model = checkpoint(tmp_path, 3)
    found = pruned(model, tmp_path / "out")
    inside.bound("mptk.staged.spool.SMALLEST_FILE", 1)
    assert pruned(model, tmp_path / "small", memory=20_000).families == found.families
    inside.stop("mptk.methods.descent._Descent._stage", call=2)
    with pytest.raises(Stopped):
        pruned(model, tmp_path / "resumed")
    inside.undo()
    inside.bound("mptk.methods.descent.MARGIN", 0)
    stages = inside.calls("mptk.methods.descent._Descent._stage")
    assert pruned(model, tmp_path / "resumed", resume=True).families == found.families
    assert len(stages) == 2
