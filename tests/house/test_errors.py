"""Errors have a class that says who can mend them, and fields that a caller can act on. Each here is a real one."""

from __future__ import annotations

import ast
import copy
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import mptk
from mptk import MptkError
from mptk.errors import explain_errors
from mptk.testing import expect_error
from passes.analysis.rules import RULES

ROOT = Path(__file__).parents[2]
X = (torch.ones(2, 8),)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def prune(*more: object, **settings: object) -> mptk.Pruned | None:
    return mptk.prune(net(), *more, example_inputs=X, **{"method": "magnitude", "progress": None, **settings})


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Values(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(self[0](x))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.layer(x)


class Flipped(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[2](torch.ops.test_errors.flipped(self[0](x)))


@torch.library.custom_op("test_errors::flipped", mutates_args=())
def flipped(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


@flipped.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.fixture
def wrong_rule() -> Iterator[None]:
    """A rule that calls the units of ``flipped``'s result those of its operand, though they stand the other way round."""
    before = dict(RULES)

    @mptk.rule("test_errors::flipped", zero="keep")
    def flipped(ctx, node, x):  # type: ignore[no-untyped-def]
        """y_d = x_d."""
        return x.dims

    yield
    RULES.clear()
    RULES.update(before)


# ---- settings ----


def test_a_setting_is_named_as_in_python() -> None:
    with expect_error(mptk.InputError, name="sparsity", nearest=()):
        mptk.Settings(sparsity=2.0)
    with expect_error(mptk.InputError, name="families"):
        mptk.Settings(families=("ffn", "ffn"))
    with expect_error(mptk.InputError, name="teacher"):
        mptk.prune("x", teacher="cached", hidden_loss=1.0)


def test_a_name_that_is_not_known_has_the_nearest() -> None:
    with expect_error(mptk.KeywordError, name="sparsty", nearest=("sparsity",)):
        prune(sparsty=0.3)
    with expect_error(mptk.KeywordError, name="example_input", nearest=("example_inputs",)):
        prune(example_input=X)
    with expect_error(mptk.KeywordError, name="dta", nearest=("data",)):
        mptk.evaluate("x", dta="wikitext2")
    with expect_error(mptk.KeywordError, name="overwite", nearest=("overwrite",)):
        mptk.Plan({}).save("plan.json", overwite=True)
    with expect_error(mptk.InputError, name="wandaa") as refused:
        prune(method="wandaa")
    assert refused.value.nearest[0] == "wanda"
    assert "maskprune" in refused.value.nearest
    with expect_error(mptk.InputError, name="budget") as refused:
        mptk.Settings(budget="prams")
    assert refused.value.nearest[0] == "params"
    with expect_error(mptk.InputError, name="chanels", nearest=("channels",)):
        prune(families=("chanels",))


# ---- data, files, plans, models ----


def test_data() -> None:
    with expect_error(mptk.DataError, name="input"):
        mptk.prune(net(), example_inputs=(torch.full((2, 8), torch.nan),), method="magnitude", progress=None)


def test_files(tmp_path: Path) -> None:
    with expect_error(mptk.FileError, name=tmp_path):
        mptk.Pruned.open(tmp_path)
    with expect_error(mptk.FileError, name=tmp_path / "none"):
        mptk.load(tmp_path / "none")


def test_plans(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with expect_error(mptk.PlanError, name=tmp_path / "plan.json"):
        mptk.Plan.load(tmp_path / "plan.json")
    plan = mptk.Plan({"chanels": mptk.FamilyPlan(1, 16, {})})
    with expect_error(mptk.PlanError, name="chanels", nearest=["channels"]):
        mptk.rewrite(mptk.analyze(net(), X), plan)


def test_models() -> None:
    with expect_error(mptk.ModelError, name="Sequential"):
        mptk.generate(net(), "a prompt")
    with expect_error(mptk.TraceError, name="Branch"):
        mptk.trace(Branch(), X)
    with expect_error(mptk.AnalysisError, name="aten.linalg_svdvals.default"):
        mptk.analyze(Values(*net()), X)
    with expect_error(mptk.TargetError):
        mptk.export(Counting(), "unwritten", example_inputs=X)


# ---- the budget ----


def test_the_budgets_that_can_be_reached() -> None:
    asked = {"align": 8, "tolerance": 1e-4}
    with expect_error(mptk.BudgetError, name="sparsity", nearest=(0.5, 0.0)) as refused:
        prune(sparsity=0.29, **asked)
    pruned = prune(sparsity=refused.value.nearest[0], **asked)
    assert pruned is not None
    assert pruned.report.sparsity == 0.5
    with expect_error(mptk.BudgetError, name="channels", nearest=(14, 15, 16)):
        prune(widths={"channels": 99})


# ---- results ----


def test_results(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    prune(out, sparsity=0.25)
    (out / "README.md").write_text("changed")
    with expect_error(mptk.ChangedError, name="README.md"):
        mptk.verify(out, model=net())
    other.mkdir()
    (other / "mine").touch()
    with expect_error(mptk.OutputError, name=other):
        prune(other)


def test_a_wrong_rule_is_found_by_the_proof(wrong_rule: None) -> None:
    analysis = mptk.analyze(Flipped(*net()), X)
    (name,) = [family.name for family in analysis.all_families]
    (layer,) = [group.layer for group in analysis.variable(name).groups]
    plan = mptk.Plan({name: mptk.FamilyPlan(4, 16, {layer: ((0, 1, 2, 5),)})})
    with expect_error(mptk.ProofError) as refused:
        mptk.rewrite(analysis, plan)
    assert refused.value.name in refused.value.cause


# ---- the machine and its packages ----


def test_the_machine_and_its_packages(tmp_path: Path) -> None:
    with expect_error(mptk.MachineError, name="device"):
        prune(device="cuda:99")
    with expect_error(mptk.MachineError), explain_errors():
        raise MemoryError
    (tmp_path / "broken_package.py").write_text("raise OSError('a library is missing')")
    sys.path.insert(0, str(tmp_path))
    try:
        with expect_error(mptk.PackageError, name="broken_package"), explain_errors():
            __import__("broken_package")
    finally:
        sys.path.remove(str(tmp_path))


# ---- all classes ----

CLASSES = [value for name in mptk.__all__ if name.endswith("Error") for value in [getattr(mptk, name)]]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])  # noqa: S301
def test_copies_have_the_fields(kind: type[MptkError], way: Callable[[MptkError], MptkError]) -> None:
    error = way(kind("no such width; give another one; or none", name="width", nearest=[8, 16]))
    assert type(error) is kind
    assert str(error) == "no such width; give another one; or none"
    assert (error.name, error.nearest) == ("width", (8, 16))
    assert (error.cause, error.remedy) == ("no such width", "give another one; or none")


@pytest.mark.parametrize("kind", CLASSES)
def test_another_sentence_keeps_class_and_fields(kind: type[MptkError]) -> None:
    error = kind("no such width", name="width", nearest=(8,))
    other = error.reword(f"plan.json: {error}")
    assert type(other) is kind
    assert str(other) == "plan.json: no such width"
    assert (other.name, other.nearest, other.remedy) == ("width", (8,), "")


def test_each_class_is_tried_here_and_is_raised() -> None:
    here = set(re.findall(r"expect_error\(mptk\.(\w+)", Path(__file__).read_text()))
    assert here == {kind.__name__ for kind in CLASSES} - {"MptkError"}


def test_no_place_raises_an_error_of_no_class() -> None:
    files = [file for folder in ("mptk", "passes") for file in (ROOT / folder).rglob("*.py")]
    calls = [n for file in files for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
    assert sum(ast.unparse(call.func) == "MptkError" for call in calls) == 0


def test_the_helper_notices_another_class_and_another_name() -> None:
    for kind, name in ((mptk.DataError, None), (mptk.InputError, "budget")):
        with pytest.raises((AssertionError, mptk.InputError)), expect_error(kind, name=name):
            mptk.Settings(sparsity=2.0)
    with pytest.raises(AssertionError), expect_error(MptkError):
        mptk.Settings(sparsity=2.0)
