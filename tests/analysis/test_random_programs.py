"""Random programs: what the analysis offers is cut right, or it refuses by name. `make fuzz` tries thousands more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest

from tests import eager_modules
from tests.programs import CATALOGUE, FAILURES, Program, check, seeded

SEEDS, BLOCKS = 200, 16
FEW = 2
"""Blocks that run here. `make fuzz` tries thousands of programs."""


def require_right(seeds: Iterable[int]) -> None:
    """Of failures, the description is printed: `python -m tests.fuzz --program DESCRIPTION` makes it smaller."""
    outcomes = {seed: check(seeded(seed)) for seed in seeds}
    failed = [f"{o.cause}\n  {seeded(s)}" for s, o in outcomes.items() if o.verdict in FAILURES]
    assert not failed, "\n".join(failed)
    verdicts = Counter(o.verdict for o in outcomes.values())
    assert verdicts["proven"] >= 0.6 * len(outcomes), verdicts


@pytest.mark.parametrize("block", range(FEW))
def test_a_program_is_cut_right_or_refused_by_name(block: int) -> None:
    require_right(range(block, SEEDS, BLOCKS))


@pytest.mark.parametrize("seed", range(4))
def test_a_module_with_python_in_its_forward_is_cut_right_or_refused(seed: int) -> None:
    outcome = eager_modules.check(eager_modules.described(seed))
    assert outcome.verdict in (eager_modules.EQUAL, eager_modules.REFUSED), outcome.cause


def kinds(seeds: Iterable[int]) -> set[str]:
    return {step.kind for seed in seeds for step in seeded(seed).steps}


def test_every_kind_of_step_is_among_the_seeds_and_tried() -> None:
    seeds = range(SEEDS)
    assert kinds(seeds) == set(CATALOGUE)
    missing, few = set(CATALOGUE) - kinds(seed for seed in seeds if seed % BLOCKS < FEW), []
    while missing:
        few.append(max(seeds, key=lambda seed: len(kinds([seed]) & missing)))
        missing -= kinds(few[-1:])
    require_right(few)


def test_a_description_is_one_line_that_gives_the_program_back() -> None:
    for seed in range(50):
        program = seeded(seed)
        assert "\n" not in repr(program)
        assert repr(Program.parse(repr(program))) == repr(program)
