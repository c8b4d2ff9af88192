"""Random programs: what the analysis offers is cut right, or it refuses by name. `make fuzz` tries thousands more."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import Phase, given, settings

from mptk.ir.resolved_plan import Cut
from tests.programs import CATALOGUE, FAILURES, Program, check, programs, seeded

SEEDS, BLOCKS = 200, 8


@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_program_is_cut_right_or_refused_by_name(block: int) -> None:
    """Of failures, the description is printed: `python -m tests.fuzz --program DESCRIPTION` makes it smaller."""
    outcomes = {seed: check(seeded(seed)) for seed in range(block, SEEDS, BLOCKS)}
    failed = [f"{o.cause}\n  {seeded(s)}" for s, o in outcomes.items() if o.verdict in FAILURES]
    assert not failed, "\n".join(failed)
    verdicts = Counter(o.verdict for o in outcomes.values())
    assert verdicts["proven"] >= 0.6 * len(outcomes), verdicts


@settings(max_examples=20, deadline=None, database=None, phases=(Phase.generate, Phase.shrink))
@given(programs())
def test_hypothesis_finds_no_smaller_one(program: Program) -> None:
    outcome = check(program)
    assert outcome.verdict not in FAILURES, outcome.cause


def test_a_description_is_one_line_that_gives_the_program_back() -> None:
    for seed in range(50):
        program = seeded(seed)
        assert "\n" not in repr(program)
        assert repr(Program.parse(repr(program))) == repr(program)


def test_every_kind_of_step_is_among_the_seeds() -> None:
    assert {step.kind for seed in range(SEEDS) for step in seeded(seed).steps} == set(CATALOGUE)


# ---- that these tests can fail ----

MLP = Program.parse(
    '["tokens", 8, [["mlp", [0], {"hidden": 10, "act": "relu", "residual": true}]], ["linear"], "tensor", 0]'
)


def test_slices_at_wrong_positions_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(MLP).verdict == "proven"
    positions = Cut.positions
    monkeypatch.setattr(Cut, "positions", lambda cut, term: np.sort((positions(cut, term) + 1) % term.size))
    assert check(MLP).cause.startswith("the proof fails at 'rewrite'")


def test_masks_at_wrong_positions_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Cut.mask
    monkeypatch.setattr(Cut, "mask", lambda cut, term: np.roll(mask(cut, term), 1))
    assert check(MLP).cause.startswith("the masked program and the zeroed module")
