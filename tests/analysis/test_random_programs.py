"""Random programs: what the analysis offers is cut right, or it refuses by name. `make fuzz` tries thousands more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from inside import Inside

from tests import eager_modules
from tests.programs import CATALOGUE, FAILURES, Program, check, programs, seeded

SEEDS, BLOCKS = 200, 8
SHORT = 1
EACH = [block if block < SHORT else pytest.param(block, marks=pytest.mark.long) for block in range(BLOCKS)]


def require_right(seeds: Iterable[int]) -> None:
    """Of failures, the description is printed: `python -m tests.fuzz --program DESCRIPTION` makes it smaller."""
    outcomes = {seed: check(seeded(seed)) for seed in seeds}
    failed = [f"{o.cause}\n  {seeded(s)}" for s, o in outcomes.items() if o.verdict in FAILURES]
    assert not failed, "\n".join(failed)
    verdicts = Counter(o.verdict for o in outcomes.values())
    assert verdicts["proven"] >= 0.6 * len(outcomes), verdicts


@pytest.mark.parametrize("block", EACH)
def test_a_program_is_cut_right_or_refused_by_name(block: int) -> None:
    require_right(range(block, SEEDS, BLOCKS))


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 60))])
def test_a_module_with_python_in_its_forward_is_cut_right_or_refused(seed: int) -> None:
    outcome = eager_modules.check(eager_modules.described(seed))
    assert outcome.verdict in (eager_modules.EQUAL, eager_modules.REFUSED), outcome.cause


def kinds(seeds: Iterable[int]) -> set[str]:
    return {step.kind for seed in seeds for step in seeded(seed).steps}


def test_every_kind_of_step_is_among_the_seeds_and_tried_without_the_long_tests() -> None:
    seeds = range(SEEDS)
    assert kinds(seeds) == set(CATALOGUE)
    missing, few = set(CATALOGUE) - kinds(seed for seed in seeds if seed % BLOCKS < SHORT), []
    while missing:
        few.append(max(seeds, key=lambda seed: len(kinds([seed]) & missing)))
        missing -= kinds(few[-1:])
    require_right(few)


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


# ---- that these tests can fail ----

MLP = Program.parse(
    '["tokens", 8, [["mlp", [0], {"hidden": 10, "act": "relu", "residual": true}]], ["linear"], "tensor", 0]'
)


def test_slices_at_wrong_positions_are_found_out(inside: Inside) -> None:
    assert check(MLP).verdict == "proven"
    wrong = lambda positions, cut, term: np.sort((positions(cut, term) + 1) % term.size)  # noqa: E731
    inside.around("mptk.ir.resolved_plan.Cut.find_positions", wrong)
    assert check(MLP).cause.startswith("the proof fails at 'rewrite'")


def test_masks_at_wrong_positions_are_found_out(inside: Inside) -> None:
    inside.spoil("mptk.ir.resolved_plan.Cut.mask", lambda mask: np.roll(mask, 1))
    assert check(MLP).cause.startswith("the masked program and the zeroed module")
