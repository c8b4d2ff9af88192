"""`mptk prune --quantize auto`: type and sparsity are chosen together by a limit. Operators take made-up times."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from commands import done
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import mptk
from mptk.cli.main import app
from mptk.errors import BudgetError, InputError
from mptk.features.advise.advice import Advice
from mptk.features.advise.view import describe_ways
from mptk.reading import make_typed
from mptk.testing import expect_error

ASKED = {"quantize": "auto", "budget": "latency", "method": "wanda", "samples": 8, "length": 32, "align": 8}
TYPES = ("float32", "int8", "int4")


@pytest.fixture(scope="module")
def dense(laboratory, made_up_times):
    return str(laboratory.open_model())


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 97, (16, 32), generator=torch.Generator().manual_seed(3))


def prune(dense: str, ids: torch.Tensor, out: Path, max_ms: float, **more: object) -> tuple[mptk.Pruned, Advice]:
    pruned = mptk.prune(dense, out, data=ids, max_ms=max_ms, progress=None, **{**ASKED, **more})
    return pruned, make_typed(Advice, pruned.report.rows["advice"])


@pytest.fixture(scope="module")
def whole(dense, ids):
    """Type → the predicted milliseconds of the dense model."""
    asked = {"sparsities": [0.2], "samples": 8, "length": 32, "align": 8, "progress": None}
    found = mptk.advise(dense, data=ids, max_decode_ms=1e6, **asked)
    return {way.type: way.ms["decode"] for way in found.ways if not way.sparsity}


def test_no_cut_is_made_if_a_type_meets_the_limit(dense, ids, whole, tmp_path):
    """Nor is anything trained."""
    assert max(whole["int8"], whole["int4"]) < whole["float32"]
    limit = (max(whole["int8"], whole["int4"]) + whole["float32"]) / 2
    pruned, found = prune(dense, ids, tmp_path / "out", limit, steps=2, eval_data=ids)
    best = found.find_way()
    assert (best.sparsity, pruned.report.sparsity) == (0, 0)
    assert pruned.report.settings.quantize == (best.type,) == tuple(pruned.report.quantized)
    assert not pruned.report.trained
    assert "No cut is needed" in " ".join(describe_ways(found))
    assert any("no cut is needed" in note for note in pruned.report.notes)
    whole = LlamaForCausalLM.from_pretrained(dense).state_dict()
    assert all(torch.equal(weight, whole[name]) for name, weight in pruned.model.state_dict().items())
    done("verify", str(tmp_path / "out"), "-q")


def test_the_dense_model_itself_may_meet_the_limit(dense, ids, whole, tmp_path):
    """Then nothing is cut to find that out."""
    pruned, found = prune(dense, ids, tmp_path / "out", 2 * whole["float32"])
    assert (found.find_way().sparsity, pruned.report.sparsity, len(found.ways)) == (0, 0, len(TYPES))


def test_the_smallest_cut_that_meets_the_limit_is_made(dense, ids, whole, tmp_path):
    limit = 0.9 * min(whole.values())
    pruned, found = prune(dense, ids, tmp_path / "out", limit)
    best, report = found.find_way(), pruned.report
    assert 0.8 * limit < best.ms["decode"] <= limit
    assert report.settings.quantize == (best.type,) == tuple(report.quantized)
    assert report.settings.sparsity == pytest.approx(best.sparsity, abs=1e-3)
    assert all(row["width"] == best.widths.get(name, row["of"]) for name, row in report.families.items())
    assert any(width < found.dense.widths[name] for name, width in best.widths.items())
    assert {stage["stage"] for stage in report.proof} >= {f"{best.type} weights", f"{best.type} in use"}
    done("verify", str(tmp_path / "out"), "-q")
    # The same by the command line, by a recipe: it chooses anew.
    done("prune", "--config", tmp_path / "out/run.yaml", "--data", "self", "--out", tmp_path / "again", "-q")
    assert "Round or cut" in done("report", tmp_path / "again").stdout
    assert set(mptk.Pruned.open(tmp_path / "again").report.quantized) <= set(TYPES)


def test_what_is_chosen_is_trained(dense, ids, whole, tmp_path):
    pruned, found = prune(dense, ids, tmp_path / "out", 0.9 * min(whole.values()), steps=3, method="maskprune")
    assert found.find_way().sparsity > 0
    assert pruned.report.trained
    assert asdict(found.limits)["decode_ms"] == 0.9 * min(whole.values())


def test_a_limit_below_every_cut_names_the_fastest(dense, ids, tmp_path):
    with expect_error(BudgetError, name="max_ms") as refused:
        prune(dense, ids, tmp_path / "out", 1e-3)
    (fastest,) = refused.value.nearest
    prune(dense, ids, tmp_path / "out", fastest)


@pytest.mark.parametrize(
    "more",
    [
        {"max_ms": None, "budget": "params"},
        {"onnx": False},
        {"search": True},
        {"widths": {"ffn": 40}},
        {"kv_heads": 1, "portable": False},
        {"quantize": ("auto", "int8")},
        {"plan": "plan.json"},
    ],
)
def test_what_leaves_nothing_to_choose(dense, ids, tmp_path, more):
    mptk.Plan({}).save(tmp_path / "plan.json")
    more = {name: str(tmp_path / value) if name == "plan" else value for name, value in more.items()}
    with expect_error(InputError, name="quantize"):
        mptk.prune(dense, tmp_path / "out", data=ids, progress=None, **{**ASKED, "max_ms": 1.0, **more})
    assert not (tmp_path / "out").exists()


def test_other_commands_take_no_auto(dense, tmp_path):
    for words in (
        ["export", dense, "--quantize", "auto", "--out", str(tmp_path / "out")],
        ["bench", dense, "--quantize", "auto"],
        ["prune", dense, "--ladder", "0.2,0.3", "--quantize", "auto", "--out", str(tmp_path / "out")],
    ):
        with expect_error(InputError, name="quantize"):
            CliRunner().invoke(app, words, catch_exceptions=False)
