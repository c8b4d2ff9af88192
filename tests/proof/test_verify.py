"""The proof's tolerance: of float32 as a rule, of the model's own rounding errors where those are larger."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from mptk import FileError, Plan, analyze, trace
from mptk.ir import Samples, Weights, make_token_samples
from mptk.progress import enter_stage
from mptk.proof.verification import find_changes
from mptk.report.sections import build_proof_view
from mptk.targets.graph import compare_stored
from mptk.testing import expect_error
from mptk.trust import NO_CODE
from passes.verify import TOLERANCE, WIDEST, Difference, StageOutputs, compare_outputs, prove, widen

TOKENS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = make_token_samples(TOKENS)


def run_with(module: Callable[[Tensor], Tensor]) -> StageOutputs:
    """``module`` as a stage of a proof."""
    return lambda samples: module(*samples.tensors)


class Cancelling(nn.Module):
    """Logits that are a difference of two products, which is ``part`` of either."""

    def __init__(self, part: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, 48)
        self.left, self.right = nn.Linear(48, 97, bias=False), nn.Linear(48, 97, bias=False)
        self.right.weight.data = self.left.weight.data + part * self.right.weight.data

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.right(x) - self.left(x)


def proof(part: float, change: float = 0.0):
    """Of a stage that computes in float64, an element of one weight changed by a share of the difference."""
    model = Cancelling(part)
    exact = Cancelling(part).double()
    exact.right.weight.data[3] += change * (exact.right.weight.data[3] - exact.left.weight.data[3])
    (found,) = prove(trace(model, (TOKENS,)), {"exact": (run_with(exact), TOLERANCE)}, BATCH)
    return found


@torch.no_grad()
def test_a_model_that_rounding_moves_is_given_its_own_tolerance_and_a_wrong_unit_is_still_found():
    found = proof(1e-3)
    assert TOLERANCE < found.relative < found.tolerance <= WIDEST
    assert found.ok
    found = proof(1e-3, change=0.05)
    assert found.tolerance <= WIDEST < found.relative


@torch.no_grad()
def test_a_sound_model_keeps_the_tolerance_of_float32():
    assert proof(1.0).tolerance == TOLERANCE
    found = proof(1.0, change=2e-4)
    assert found.tolerance == TOLERANCE < found.relative < WIDEST
    assert not found.ok


def test_no_number_and_a_difference_from_zeros_are_infinite_and_all_numbers_are_compared():
    reference = torch.ones(1, 4, 5)
    for broken in (float("nan"), float("inf")):
        logits = reference.clone()
        logits[0, 1, 2] = broken
        for one, other in ((logits, reference), (reference, logits)):
            found = compare_outputs("stage", one, other, 1.0)
            assert not found.ok
            assert found.max_abs == math.inf
    zeros = torch.zeros(1, 2, 3)
    assert compare_outputs("zeros", zeros, zeros, TOLERANCE).relative == 0
    found = compare_outputs("zeros", zeros + 1e-9, zeros, TOLERANCE)
    assert (found.relative, found.max_abs, found.ok) == (math.inf, pytest.approx(1e-9), False)
    for one in (torch.tensor(2.0), torch.tensor([2.0, 1.0])):
        assert compare_outputs("loss", one, one, TOLERANCE).relative == 0
        assert compare_outputs("loss", 2 * one, one, TOLERANCE).relative == 1


def test_a_stage_that_cannot_be_computed_has_failed_with_the_reason():
    model = trace(Cancelling(1.0), (TOKENS,))
    (found,) = prove(model, {"broken": (run_with(lambda ids: ids.reshape(5, 5)), TOLERANCE)}, BATCH)
    assert not found.ok
    assert "shape '[5, 5]' is invalid" in found.failure


def test_a_widened_tolerance_says_so_wherever_it_is_shown():
    found = proof(1e-3)
    assert found.widened.startswith("widened from 5e-05: rounding alone moves the logits by ")
    console = Console(width=200, file=io.StringIO())
    console.print(build_proof_view([found.to_dict()]))
    assert "ok, widened from 5e-05: rounding alone moves" in console.file.getvalue()
    assert "widened" not in proof(1.0).to_dict()


def test_the_worst_batch_counts():
    model = trace(Cancelling(1.0), (TOKENS,), dynamic=True)
    bad = make_token_samples(TOKENS[:1, :9])

    def run(ids: Tensor) -> Tensor:
        return model(ids) + (ids.shape[1] == 9)

    for batches in ((BATCH, bad), (bad, BATCH)):
        (found,) = prove(model, {"stage": (run_with(run), TOLERANCE)}, *batches)
        assert not found.ok


def test_a_tolerance_is_widened_to_ten_roundings_and_no_further_than_the_widest():
    found = Difference("stage", 1.0, 4e-4, TOLERANCE)
    assert widen(found, 5e-5).tolerance == pytest.approx(5e-4)
    assert widen(found, 1.0).tolerance == WIDEST
    assert widen(found, 1e-7) == found


@pytest.mark.parametrize(
    ("name", "bias"), [("other.bias", torch.ones(8)), ("0.weight", torch.ones(8, 5)), ("0.bias", torch.ones(7))]
)
def test_a_folder_can_bring_biases_alone(tmp_path, name, bias):
    """Of FLAP; anything else there would be weights that nobody has proven."""
    analysis = analyze(trace(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)), (torch.ones(2, 5),)))
    save_file({"0.bias": torch.ones(8)}, tmp_path / "compensation.safetensors")
    assert set(find_changes(analysis, Plan({}), tmp_path, {}, NO_CODE)) == {"0.bias"}
    save_file({name: bias}, tmp_path / "compensation.safetensors")
    with expect_error(FileError, name="compensation.safetensors"):
        find_changes(analysis, Plan({}), tmp_path, {}, NO_CODE)


def test_progress_names_the_stage_that_is_proven():
    program, said = trace(nn.Linear(3, 2), torch.ones(1, 3)), list[str]()
    with enter_stage(lambda stage, done, total, figures="": said.append(figures), "prove"):
        prove(program, {"reloaded": (program, TOLERANCE)}, Samples({"x": torch.ones(1, 3)}))
    assert "reloaded" in said


def test_an_infinite_weight_that_was_lost_counts_whatever_comes_after_it():
    expected = Weights({"a": torch.tensor([float("inf"), 1.0]), "b": torch.tensor([1.0, 2.0])})
    stored = Weights({"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0, 2.0 + 1e-6])})
    assert compare_stored(stored, expected).relative == float("inf")
