"""Errors have fields that a caller can act on, and keep them. Which class is raised for what: tests/bad_inputs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import mptk
from mptk import MptkError
from mptk.testing import expect_error
from passes.analysis.rules import RULES

X, PART = (torch.ones(2, 8),), mptk.FamilyPlan(1, 16, {})


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def prune(**settings: object) -> mptk.Pruned | None:
    return mptk.prune(net(), example_inputs=X, **{"method": "magnitude", "progress": None, **settings})


class Flipped(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[2](torch.ops.test_errors.flipped(self[0](x)))


@torch.library.custom_op("test_errors::flipped", mutates_args=())
def flipped(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


flipped.register_fake(torch.empty_like)


@pytest.fixture
def wrong_rule():
    """A rule that calls the units of ``flipped``'s result those of its operand, though they stand the other way round."""
    before = dict(RULES)

    @mptk.rule("test_errors::flipped", zero="keep")
    def flipped(ctx, node, x):  # type: ignore[no-untyped-def]
        """y_d = x_d."""
        return x.dims

    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.parametrize(
    ("name", "nearest", "call"),
    [
        ("sparsty", "sparsity", lambda: prune(sparsty=0.3)),
        ("example_input", "example_inputs", lambda: prune(example_input=X)),
        ("dta", "data", lambda: mptk.evaluate("x", dta="wikitext2")),
        ("overwite", "overwrite", lambda: mptk.Plan({}).save("plan.json", overwite=True)),
        ("wandaa", "wanda", lambda: prune(method="wandaa")),
        ("budget", "params", lambda: mptk.Settings(budget="prams")),
        ("chanels", "channels", lambda: prune(families=("chanels",))),
        ("chan", "channels", lambda: mptk.rewrite(mptk.analyze(net(), X), mptk.Plan({"chan": PART}))),
    ],
)
def test_a_name_that_is_not_known_has_the_nearest(name, nearest, call):
    with pytest.raises(MptkError) as refused:
        call()
    assert (refused.value.name, refused.value.nearest[0]) == (name, nearest)


def test_a_setting_is_named_as_in_python():
    """Not as on the command line; a number has no nearest."""
    with expect_error(mptk.InputError, name="sparsity", nearest=()):
        mptk.Settings(sparsity=2.0)
    with expect_error(mptk.InputError, name="teacher"):
        mptk.prune("x", teacher="cached", hidden_loss=1.0)


def test_the_budgets_that_can_be_reached():
    asked = {"align": 8, "tolerance": 1e-4}
    with expect_error(mptk.BudgetError, name="sparsity", nearest=(0.5, 0.0)) as refused:
        prune(sparsity=0.29, **asked)
    pruned = prune(sparsity=refused.value.nearest[0], **asked)
    assert pruned is not None
    assert pruned.report.sparsity == 0.5
    with expect_error(mptk.BudgetError, name="channels", nearest=(14, 15, 16)):
        prune(widths={"channels": 99})


def test_a_wrong_rule_is_found_by_the_proof(wrong_rule):
    analysis = mptk.analyze(Flipped(*net()), X)
    (name,) = [family.name for family in analysis.all_families]
    (layer,) = [group.layer for group in analysis.variable(name).groups]
    plan = mptk.Plan({name: mptk.FamilyPlan(4, 16, {layer: ((0, 1, 2, 5),)})})
    with expect_error(mptk.ProofError) as refused:
        mptk.rewrite(analysis, plan)
    assert refused.value.name in refused.value.cause


CLASSES = [value for name in mptk.__all__ if name.endswith("Error") for value in [getattr(mptk, name)]]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_copy_and_another_sentence_keep_class_and_fields(kind):
    error = kind("no such width; give another one; or none", name="width", nearest=[8, 16])
    for other in (error, copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301
        assert type(other) is kind
        assert str(other) == "no such width; give another one; or none"
        assert (other.cause, other.remedy) == ("no such width", "give another one; or none")
        assert (other.name, other.nearest) == ("width", (8, 16))
    other = error.reword("plan.json: no such width")
    assert type(other) is kind
    assert str(other) == "plan.json: no such width"
    assert (other.name, other.nearest, other.remedy) == ("width", (8, 16), "")


def test_the_helper_notices_another_class_and_another_name():
    for kind, name in ((mptk.DataError, None), (mptk.InputError, "budget")):
        with pytest.raises((AssertionError, mptk.InputError)), expect_error(kind, name=name):
            mptk.Settings(sparsity=2.0)
    with pytest.raises(AssertionError), expect_error(MptkError):
        mptk.Settings(sparsity=2.0)
